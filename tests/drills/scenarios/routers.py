"""Routers die, leave, join, and come back from the dead."""

import asyncio
import signal

from tests.drills.run import SESSION_TIMEOUT_S, Run
from tests.drills.schedule import faults, storm

RATE = 100.0
"""Requests a second, in a storm."""


async def sigkill(run: Run) -> None:
    """One of two routers is killed with hundreds of requests in flight, again and again, and started each time."""
    await _three_times(run, signal.SIGKILL, requests=5_000, hold_s=(0.0, 2.0), within=(0.04, 0.7))


async def sigterm(run: Run) -> None:
    """One of two routers is asked to end with hundreds of requests in flight, three times, and started each time."""
    await _three_times(run, signal.SIGTERM, requests=4_000, hold_s=(0.0, 1.5), within=(0.05, 0.7))


async def rebalance_storm(run: Run) -> None:
    """Routers join and leave every few seconds; then one sleeps for longer than its session lasts, and wakes up."""
    await run.serve(routers=2)
    run.flow(run.requests(3_500), rate=RATE)
    joining = []
    for move in storm(run.rng, moves=run.number(8), routers=2, most=4):
        await run.traffic.until(move.after)
        if move.kind == "join":
            run.note("a router joins")
            # The next move does not wait for it to be ready.
            joining.append(asyncio.create_task(run.join()))
        else:
            await run.leave(move.victim)
    await asyncio.gather(*joining)
    (fault,) = faults(run.rng, number=1, victims=len(run.routers), hold_s=(1.5, 4.0), within=(0.05, 0.15))
    # Not scaled: it is to flow for longer than a session lasts.
    run.flow(run.requests(round(1_800 / run.scale)), rate=RATE)
    await run.traffic.until(fault.after)
    zombie = await run.busy(fault.victim)
    await run.strike("SIGSTOP", zombie, signal.SIGSTOP)
    await asyncio.sleep(SESSION_TIMEOUT_S + fault.hold_s)
    await run.strike("SIGCONT", zombie, signal.SIGCONT)


async def _three_times(
    run: Run, number: signal.Signals, *, requests: int, hold_s: tuple[float, float], within: tuple[float, float]
) -> None:
    await run.serve(routers=2)
    run.flow(run.requests(requests))
    for fault in faults(run.rng, number=run.number(3), victims=2, hold_s=hold_s, within=within):
        await run.traffic.until(fault.after)
        victim = await run.busy(fault.victim)
        await run.strike(number.name, victim, number)
        await asyncio.sleep(fault.hold_s)
        await run.again(victim)
