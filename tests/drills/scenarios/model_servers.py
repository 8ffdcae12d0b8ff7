"""Model servers die, hang, and fail."""

import asyncio
import signal

from deploy.triton.stand_in.faults import FaultRules
from tests.drills.run import Run
from tests.drills.schedule import faults

RATE = 90.0
"""Requests a second."""


async def triton_killed(run: Run) -> None:
    """One of two model servers is killed and started again, then the other or the same one, then both at once."""
    await run.serve()
    names = [endpoint.name for endpoint in run.ground.endpoints]
    run.flow(run.requests(2_700), rate=RATE)
    *single, last = faults(run.rng, number=run.number(2) + 1, victims=2, hold_s=(1.0, 3.0))
    for fault in single:
        await run.traffic.until(fault.after)
        await _killed(run, [names[fault.victim]], fault.hold_s)
    await run.traffic.until(last.after)
    await _killed(run, names, last.hold_s)


async def triton_hung(run: Run) -> None:
    """One of two model servers accepts requests and says nothing for a while, then goes on."""
    await run.serve(settings={"SPROUT_ROUTER_FIRST_CHUNK_TIMEOUT_S": "2", "SPROUT_ROUTER_CHUNK_TIMEOUT_S": "2"})
    names = [endpoint.name for endpoint in run.ground.endpoints]
    run.flow(run.requests(2_700), rate=RATE)
    for fault in faults(run.rng, number=run.number(2), victims=2, hold_s=(6.0, 9.0), within=(0.1, 0.9)):
        await run.traffic.until(fault.after)
        victim = names[fault.victim]
        await run.strike("SIGSTOP", victim, signal.SIGSTOP)
        try:
            await asyncio.sleep(fault.hold_s)
        finally:
            await run.strike("SIGCONT", victim, signal.SIGCONT)


async def triton_errors(run: Run) -> None:
    """Both model servers fail 30 % of their generations, anywhere on their way."""
    first, second = run.rng.sample(range(1_000_000), 2)
    endpoints = [await run.failing_server(FaultRules(error_share=0.3, seed=seed)) for seed in (first, second)]
    await run.serve(endpoints=tuple(endpoints))
    run.note("30 % of all generations fail")
    run.flow(run.requests(2_700), rate=RATE)


async def _killed(run: Run, names: list[str], hold_s: float) -> None:
    for name in names:
        await run.strike("SIGKILL", name, signal.SIGKILL)
    await asyncio.sleep(hold_s)
    await asyncio.gather(*(run.again(name) for name in names))
