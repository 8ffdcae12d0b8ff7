"""The scenarios: each starts routers, sends traffic, and injects faults into routers, model servers or Kafka."""

import asyncio
import signal
from collections.abc import Awaitable, Callable
from typing import Final

from deploy.local.postgres import postgres_spec
from deploy.local.processes import LOOPBACK
from deploy.triton.stand_in.faults import FaultRules
from shared.messages import GenerationRequest
from tests.drills.gateways import gateway_killed, gateway_router_killed
from tests.drills.malformed import KINDS, Malformed
from tests.drills.malformed import malformed as draw_malformed
from tests.drills.run import SESSION_TIMEOUT_S, ScenarioRun
from tests.drills.schedule import faults, storm
from tests.drills.services import kafka_faults, leader_faults, ledger_faults, model_server_faults, postgres_faults
from tests.support.environment import KAFKA

MODEL_SERVER_RATE: Final = 90.0
"""Requests per second during faults of model servers."""
STORM_RATE: Final = 100.0
"""Requests per second during a rebalance storm."""
FREEZE_RATE: Final = 40.0
"""Requests per second while a router is frozen, for 18 to 22 s."""
RECOVERY_S: Final = 5.0
"""Pause between two restarts of Kafka, in which serving resumes."""
UNKNOWN_MODEL_SHARE: Final = 0.05
"""Share of the valid requests that ask for an unknown model and get an error response."""


FEW: Final = 24
"""Requests of the tenant that comes behind a crowd; not scaled."""
MOST_WAITING: Final = 3.0
"""How many times as long as alone they may wait."""


async def sigkill(run: ScenarioRun) -> None:
    """One of two routers is killed with hundreds of requests in flight and restarted, three times."""
    await _three_times(run, signal.SIGKILL, requests=5_000, hold_s=(0.0, 2.0), within=(0.04, 0.7))


async def sigterm(run: ScenarioRun) -> None:
    """One of two routers is stopped with hundreds of requests in flight and restarted, three times."""
    await _three_times(run, signal.SIGTERM, requests=4_000, hold_s=(0.0, 1.5), within=(0.05, 0.7))


async def rebalance_storm(run: ScenarioRun) -> None:
    """Routers join and leave every few seconds; then one is frozen for longer than its session timeout."""
    await run.serve(routers=2)
    run.send(run.requests(3_500), rate=STORM_RATE)
    joining = []
    for move in storm(run.rng, moves=run.number(8), routers=2, most=4):
        await run.traffic.until(move.after)
        if move.kind == "join":
            run.note("a router joins")
            # The next change does not wait until it is ready.
            joining.append(asyncio.create_task(run.join()))
        else:
            await run.leave(move.victim)
    await asyncio.gather(*joining)
    (fault,) = faults(run.rng, number=1, victims=len(run.routers), hold_s=(1.5, 4.0), within=(0.05, 0.15))
    # Not scaled: the traffic must last longer than the session timeout.
    run.send(run.requests(round(1_800 / run.scale)), rate=STORM_RATE)
    await run.traffic.until(fault.after)
    zombie = await run.busy_router(fault.victim)
    await run.inject("SIGSTOP", zombie, signal.SIGSTOP)
    await asyncio.sleep(SESSION_TIMEOUT_S + fault.hold_s)
    await run.inject("SIGCONT", zombie, signal.SIGCONT)


async def router_frozen(run: ScenarioRun) -> None:
    """A router is frozen with answers that it has released but not sent, until the other one has answered in its place.

    The routers wait a second for more messages before they send, so that there are always such answers.
    """
    await run.serve(routers=2, settings={"SPROUT_ROUTER_LINGER_MS": "1000"})
    (fault,) = faults(run.rng, number=1, victims=2, hold_s=(12.0, 16.0), within=(0.05, 0.2))
    # Not scaled: the traffic must last longer than the takeover.
    run.send(run.requests(round(1_400 / run.scale)), rate=FREEZE_RATE)
    await run.traffic.until(fault.after)
    frozen = await run.busy_router(fault.victim)
    await run.inject("SIGSTOP", frozen, signal.SIGSTOP)
    await asyncio.sleep(SESSION_TIMEOUT_S + fault.hold_s)
    await run.inject("SIGCONT", frozen, signal.SIGCONT)


async def triton_killed(run: ScenarioRun) -> None:
    """A model server is killed and restarted, again the same or the other one, then both at once."""
    await run.serve()
    names = [server.name for server in run.environment.model_servers]
    run.send(run.requests(2_700), rate=MODEL_SERVER_RATE)
    *single, last = faults(run.rng, number=run.number(2) + 1, victims=2, hold_s=(1.0, 3.0))
    for fault in single:
        await run.traffic.until(fault.after)
        await _killed(run, [names[fault.victim]], fault.hold_s)
    await run.traffic.until(last.after)
    await _killed(run, names, last.hold_s)


async def triton_hung(run: ScenarioRun) -> None:
    """One of two model servers is frozen for a while: it accepts requests but does not answer."""
    await run.serve(settings={"SPROUT_ROUTER_FIRST_CHUNK_TIMEOUT_S": "2", "SPROUT_ROUTER_CHUNK_TIMEOUT_S": "2"})
    names = [server.name for server in run.environment.model_servers]
    run.send(run.requests(2_700), rate=MODEL_SERVER_RATE)
    for fault in faults(run.rng, number=run.number(2), victims=2, hold_s=(6.0, 9.0), within=(0.1, 0.9)):
        await run.traffic.until(fault.after)
        victim = names[fault.victim]
        await run.inject("SIGSTOP", victim, signal.SIGSTOP)
        try:
            await asyncio.sleep(fault.hold_s)
        finally:
            await run.inject("SIGCONT", victim, signal.SIGCONT)


async def triton_errors(run: ScenarioRun) -> None:
    """Both model servers fail 30 % of their generations, at any point."""
    first, second = run.rng.sample(range(1_000_000), 2)
    servers = [await run.model_server(FaultRules(error_share=0.3, seed=seed)) for seed in (first, second)]
    await run.serve(model_servers=tuple(servers))
    run.note("30 % of all generations fail")
    run.send(run.requests(2_700), rate=MODEL_SERVER_RATE)


async def kafka_restarted(run: ScenarioRun) -> None:
    """Kafka is stopped under load and restarted with the same data and port."""
    await run.serve()
    run.send(run.requests(3_500), rate=90.0)
    for fault in faults(run.rng, number=run.number(2), victims=1, hold_s=(1.0, 4.0), within=(0.15, 0.85)):
        await run.traffic.until(fault.after)
        await run.inject("SIGTERM", KAFKA, signal.SIGTERM)
        await asyncio.sleep(fault.hold_s)
        await run.restart(KAFKA)
        await asyncio.sleep(RECOVERY_S)


async def kafka_frozen(run: ScenarioRun) -> None:
    """Kafka is frozen for longer than the routers' delivery timeout, then continues.

    It then accepts the answers in its socket buffers, of which the routers never get the acknowledgement. Their session
    timeout is longer, so there is no rebalance that would make them check.
    """
    await run.serve(settings={"SPROUT_ROUTER_SESSION_TIMEOUT_S": "120"})
    run.send(run.requests(3_000))
    for fault in faults(run.rng, number=1, victims=1, hold_s=(43.0, 48.0), within=(0.2, 0.6)):
        await run.traffic.until(fault.after)
        await run.inject("SIGSTOP", KAFKA, signal.SIGSTOP)
        await asyncio.sleep(fault.hold_s)
        await run.inject("SIGCONT", KAFKA, signal.SIGCONT)


async def postgres_absent(run: ScenarioRun) -> None:
    """PostgreSQL is killed before the routers start, which have its address, and is not restarted."""
    spec, url = await asyncio.to_thread(postgres_spec, run.environment.folder / "postgres")
    await run.environment.start(spec)
    await run.inject("SIGKILL", spec.name, signal.SIGKILL)
    await run.serve(settings={"SPROUT_DATABASE_URL": url})
    run.send(run.requests(2_000))
    await run.traffic.until(0.5)
    if spec.port is None or await _is_open(spec.port):
        raise RuntimeError(f"port {LOOPBACK}:{spec.port} of PostgreSQL is open, but it must be absent")
    run.note("PostgreSQL is still absent")


async def malformed(run: ScenarioRun) -> None:
    """As many malformed messages as valid requests, shuffled; some requests ask for an unknown model."""
    await run.serve()
    valid = run.requests(2_000)
    unknown = set(run.rng.sample(range(len(valid)), round(UNKNOWN_MODEL_SHARE * len(valid))))
    messages: list[GenerationRequest | Malformed] = [
        request.model_copy(update={"model": "nobody-serves-this"}) if number in unknown else request
        for number, request in enumerate(valid)
    ]
    bad = draw_malformed(run.rng, run.number(2_000))
    messages += bad
    run.rng.shuffle(messages)
    kinds = min(len(bad), len(KINDS))
    run.note(f"{len(bad)} malformed messages of {kinds} kinds; {len(unknown)} requests for an unknown model")
    run.send(messages)


async def crowding(run: ScenarioRun) -> None:
    """A tenant sends a few requests alone, then behind tens of thousands of another tenant: it hardly waits longer."""
    # As many as the machine serves without being slower: else it is the machine that few requests wait for.
    await run.serve(routers=1, settings={"SPROUT_ROUTER_MAX_IN_FLIGHT": "100"}, tenants=("crowd", "few"))
    alone, behind = (run.requests(round(FEW / run.scale), tenant="few") for _ in range(2))
    run.send(alone)
    alone_s = await run.traffic.longest_wait_s(alone)
    crowd = [one.model_copy(update={"directive": "L2"}) for one in run.requests(30_000, tenant="crowd")]
    run.send(crowd)
    await run.traffic.sent()
    ahead = len(run.traffic.messages.sent) - run.traffic.messages.answered
    run.send(behind)
    behind_s = await run.traffic.longest_wait_s(behind)
    ratio = behind_s / alone_s
    run.note(
        f"{len(behind)} requests waited at most {alone_s:.1f} s alone and {behind_s:.1f} s behind {ahead} of another "
        f"tenant: {ratio:.1f} times as long"
    )
    run.check(ratio <= MOST_WAITING, f"a tenant waited {ratio:.1f} times as long behind another's requests as alone")


Scenario = Callable[[ScenarioRun], Awaitable[None]]

_OF_SERVICES: Final = (ledger_faults, leader_faults, postgres_faults, kafka_faults, model_server_faults)
SERVICE_SCENARIOS: Final = frozenset(one.__name__ for one in _OF_SERVICES)
"""Scenarios of all services, with model servers of their own."""

SCENARIOS: Final[dict[str, Scenario]] = {
    one.__name__: one
    for one in (
        sigkill,
        sigterm,
        rebalance_storm,
        router_frozen,
        triton_killed,
        triton_hung,
        triton_errors,
        kafka_restarted,
        kafka_frozen,
        postgres_absent,
        malformed,
        crowding,
        gateway_killed,
        gateway_router_killed,
        *_OF_SERVICES,
    )
}
"""The scenarios by name, in order of running."""


async def _killed(run: ScenarioRun, names: list[str], hold_s: float) -> None:
    for name in names:
        await run.inject("SIGKILL", name, signal.SIGKILL)
    await asyncio.sleep(hold_s)
    await asyncio.gather(*(run.restart(name) for name in names))


async def _three_times(
    run: ScenarioRun, number: signal.Signals, *, requests: int, hold_s: tuple[float, float], within: tuple[float, float]
) -> None:
    await run.serve(routers=2)
    run.send(run.requests(requests))
    for fault in faults(run.rng, number=run.number(3), victims=2, hold_s=hold_s, within=within):
        await run.traffic.until(fault.after)
        victim = await run.busy_router(fault.victim)
        await run.inject(number.name, victim, number)
        await asyncio.sleep(fault.hold_s)
        await run.restart(victim)


async def _is_open(port: int) -> bool:
    try:
        _, writer = await asyncio.open_connection(LOOPBACK, port)
    except OSError:
        return False
    writer.close()
    await writer.wait_closed()
    return True
