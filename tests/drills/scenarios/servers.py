"""Kafka is away for a while, or says nothing for longer than its clients wait; PostgreSQL is not there at all."""

import asyncio
import signal

from deploy.local.ports import LOOPBACK
from deploy.local.postgres import postgres_spec
from tests.drills.ground import KAFKA
from tests.drills.run import Run
from tests.drills.schedule import faults

BREATH_S = 5.0
"""Between a return and the next absence: serving must have begun again."""


async def kafka_restarted(run: Run) -> None:
    """Kafka is stopped under load and started again, on the same data and port."""
    await run.serve()
    run.flow(run.requests(3_500), rate=90.0)
    for fault in faults(run.rng, number=run.number(2), victims=1, hold_s=(1.0, 4.0), within=(0.15, 0.85)):
        await run.traffic.until(fault.after)
        await run.strike("SIGTERM", KAFKA, signal.SIGTERM)
        await asyncio.sleep(fault.hold_s)
        await run.again(KAFKA)
        await asyncio.sleep(BREATH_S)


async def kafka_frozen(run: Run) -> None:
    """Kafka's process is stopped for longer than the routers wait for it to acknowledge an answer, and goes on.

    What the routers had sent meanwhile it then finds in its sockets, and takes; they never hear of it. Their session
    outlasts it: no rebalance makes them look.
    """
    await run.serve(settings={"SPROUT_ROUTER_SESSION_TIMEOUT_S": "120"})
    run.flow(run.requests(3_000))
    for fault in faults(run.rng, number=1, victims=1, hold_s=(43.0, 48.0), within=(0.2, 0.6)):
        await run.traffic.until(fault.after)
        await run.strike("SIGSTOP", KAFKA, signal.SIGSTOP)
        await asyncio.sleep(fault.hold_s)
        await run.strike("SIGCONT", KAFKA, signal.SIGCONT)


async def postgres_absent(run: Run) -> None:
    """PostgreSQL is killed before the routers start, with its address in their environment, and stays away."""
    spec, url = await asyncio.to_thread(postgres_spec, run.ground.folder / "postgres")
    await run.ground.start(spec)
    await run.strike("SIGKILL", spec.name, signal.SIGKILL)
    await run.serve(settings={"SPROUT_DATABASE_URL": url})
    run.flow(run.requests(2_000))
    await run.traffic.until(0.5)
    if spec.port is None or await _somebody_at(spec.port):
        raise RuntimeError(f"something answers at PostgreSQL's address {LOOPBACK}:{spec.port}: it was not absent")
    run.note("PostgreSQL is still absent")


async def _somebody_at(port: int) -> bool:
    try:
        _, writer = await asyncio.open_connection(LOOPBACK, port)
    except OSError:
        return False
    writer.close()
    await writer.wait_closed()
    return True
