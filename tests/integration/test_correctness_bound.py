"""Evaluator and optimizer as processes: a bound on correctness leads to directives, and an unusable judge does not."""

import asyncio
import json
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from deploy.local.processes import Supervisor, free_ports
from deploy.local.services import ServiceEnvironment, service_spec
from services.optimizer.cells import BOUND_TOLERANCE
from shared.messages import Footprint, Policy, Quality
from shared.runtime.clock import Clock
from shared.runtime.settings import DatabaseSettings, KafkaSettings
from shared.topics import CARBON_INTENSITY, FOOTPRINTS, POLICIES, QUALITY, SAMPLES
from tests.support.evaluator import (
    REFERENCE,
    EvaluatorProcess,
    intensities,
    judged_fleet,
    sample,
    shares,
    start_judged_triton,
)
from tests.support.router import LEVELS, MODEL, ZONE, TritonServer, producing, reading

pytestmark = pytest.mark.integration

CLOCK = Clock.starting(datetime(2023, 2, 10, 12, tzinfo=UTC), rate=60.0)
PROMPTS = 120
XI = 0.03


@pytest.fixture(scope="module")
def triton(supervisor: Supervisor, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    folder = tmp_path_factory.mktemp("triton")
    server = start_judged_triton(
        supervisor, folder, name="correctness-triton", clock=CLOCK, position_bias=0.1, prompts=PROMPTS
    )
    yield server
    supervisor.stop(server.name)


@pytest.fixture
def evaluators(
    supervisor: Supervisor, kafka: KafkaSettings, database: DatabaseSettings, triton: TritonServer, tmp_path: Path
) -> Iterator[EvaluatorProcess]:
    fleet = tmp_path / "fleet.toml"
    fleet.write_text(judged_fleet(triton.address))
    settings = {
        "SPROUT_EVALUATOR_MIN_SAMPLES": str(PROMPTS),
        "SPROUT_EVALUATOR_PROMPTS_PER_EVALUATION": str(PROMPTS),
        "SPROUT_EVALUATOR_GRACE_H": "0",
    }
    running = EvaluatorProcess(supervisor, kafka, database, fleet, CLOCK, settings)
    yield running
    running.stop_all()


@pytest.fixture
def optimizer(
    supervisor: Supervisor, kafka: KafkaSettings, database: DatabaseSettings, evaluators: EvaluatorProcess
) -> Iterator[str]:
    name = f"{kafka.topic_prefix}optimizer"
    environment = ServiceEnvironment(
        bootstrap_servers=kafka.bootstrap_servers,
        topic_prefix=kafka.topic_prefix,
        database_url=database.url.get_secret_value(),
        fleet_file=evaluators.fleet,
        clock=CLOCK.environment(),
    )
    settings = {
        "SPROUT_KAFKA_GROUP_PREFIX": kafka.group_prefix,
        "SPROUT_OPTIMIZER_ESTIMATES_INTERVAL_MIN": "0.001",
        "SPROUT_OPTIMIZER_XI": json.dumps({"correctness": XI}),
        "SPROUT_OPTIMIZER_CONSTANT_BOUNDS": json.dumps(["correctness"]),
    }
    (port,) = free_ports(1)
    supervisor.start(service_spec("optimizer", port=port, environment=environment, settings=settings, name=name))
    yield name
    supervisor.stop(name)


def footprint(number: int, level: str) -> Footprint:
    tokens, _ = LEVELS[level]
    now = CLOCK.now()
    return Footprint(
        request_id=f"{level}-{number}", purpose="request", model=MODEL, group="qa", pool="p", level=level, zone=ZONE,
        endpoint="e0", started_at=now, finished_at=now, processing_s=tokens / 50, completion_tokens=tokens,
        energy_j=6.0 * tokens, embodied_g=0.0,
    )  # fmt: skip


async def test_a_bound_on_correctness_leads_to_directives(kafka, evaluators, optimizer):
    async with producing(kafka) as producer, reading(kafka, POLICIES) as published, reading(kafka, QUALITY) as found:

        async def policy_with(wanted) -> Policy:
            for count in range(1, 100):
                await published.read(until=count)
                policy = Policy.model_validate_json(published.records[count - 1].value)
                if wanted(policy):
                    return policy
            raise AssertionError("no such policy")

        await producer.post(CARBON_INTENSITY, intensities(CLOCK.now(), 400, 420, 300, 200, 300), ZONE)
        for level in LEVELS:
            for number in range(40):
                await producer.post(FOOTPRINTS, footprint(number, level), f"{level}-{number}")
        first = await policy_with(lambda policy: policy.inputs.weights.get("qa") == 1.0)
        assert (first.status, first.bounds) == ("reference", {"correctness": pytest.approx(1 - XI)})

        evaluators.start()  # it reads the policies before it has samples
        # Half of the producers know the right answer; the other answers are compared with the baseline's.
        samples = [
            sample(number, at=CLOCK.now(), reference=REFERENCE if number % 4 < 2 else None) for number in range(PROMPTS)
        ]
        await asyncio.gather(*(producer.post(SAMPLES, one, "qa") for one in samples))
        await found.read(until=1)
        quality = Quality.model_validate_json(found.records[0].value)
        counts = [one for one in quality.counts if one.metric == "correctness"]
        assert shares(counts, group="qa") == {"p/L0": 1.0, "p/L1": 1.0, "p/L2": 0.5}
        assert {one.trials for one in counts} == {PROMPTS}
        assert all(one.paired is not None for one in counts)
        card = quality.judge
        assert card is not None
        controls = card.controls_same + card.controls_other
        assert controls > 10
        # Three answers against a reference, or two against the baseline's in both orders.
        assert card.checks == PROMPTS // 2 * 3 + PROMPTS // 2 * 4 + controls
        assert (card.controls_same_wrong, card.controls_other_wrong, card.check_flips) == (0, 0, 0)
        assert quality.cost.judgements == card.checks + card.votes

        policy = await policy_with(lambda policy: policy.row("qa").get("p/L1", 0.0) > 0.5)
        assert policy.status == "optimal"
        assert policy.expected_quality["correctness"] >= 1 - XI - BOUND_TOLERANCE
        assert policy.row("qa").get("p/L2", 0.0) < 0.1
        assert policy.expected_g_per_request < 0.6 * policy.reference_g_per_request
