"""The text of a directive is changed in a rolling upgrade of optimizer and evaluator, on real Kafka and PostgreSQL.

What was judged and measured of the old text must not count for the new one (decision 0051).
"""

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import asyncpg
import pytest

from deploy.local.processes import Supervisor
from shared.messages import Footprint, Policy, Quality
from shared.runtime.clock import Clock
from shared.runtime.settings import DatabaseSettings, KafkaSettings
from shared.topics import CARBON_INTENSITY, DEAD_LETTERS, FOOTPRINTS, QUALITY, SAMPLES
from tests.support.deadlines import until
from tests.support.evaluator import (
    TOKEN,
    EvaluatorProcess,
    ask_for_evaluation,
    judged_fleet,
    sample,
    start_judged_triton,
)
from tests.support.fleets import DIRECTIVES
from tests.support.optimizer import Peers, footprint, intensity, peers, start_optimizer
from tests.support.router import LEVELS, TritonServer, reading

pytestmark = pytest.mark.integration

PROMPTS = 60
REWORDED = "Always answer briefly, in plain words."
"""The new text of L1."""


@pytest.fixture(scope="module")
def triton(supervisor: Supervisor, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    folder = tmp_path_factory.mktemp("triton")
    server = start_judged_triton(
        supervisor, folder, name="reworded-triton", clock=Clock(), position_bias=0.0, prompts=PROMPTS
    )
    yield server
    supervisor.stop(server.name)


class Pair:
    """An optimizer and an evaluator with the same fleet file."""

    def __init__(self, supervisor: Supervisor, kafka: KafkaSettings, database: DatabaseSettings, fleet: Path) -> None:
        self.supervisor, self.kafka, self.database, self.fleet = supervisor, kafka, database, fleet
        settings = {
            "SPROUT_EVALUATOR_GRACE_H": "0",
            "SPROUT_EVALUATOR_HTTP_TOKEN": TOKEN,
            "SPROUT_EVALUATOR_MAX_CARBON_SHARE": "null",
            "SPROUT_EVALUATOR_MIN_SAMPLES": str(PROMPTS),
            "SPROUT_KAFKA_LEADER_SESSION_TIMEOUT_S": "60",  # however long the machine pauses
        }
        self.evaluators = EvaluatorProcess(supervisor, kafka, database, fleet, Clock(), settings)
        self.names: dict[str, str] = {}

    def start(self, service: str) -> None:
        if service == "evaluator":
            self.names[service] = self.evaluators.start()
        else:
            self.names[service] = start_optimizer(
                self.supervisor, self.kafka, self.database, self.fleet, SPROUT_OPTIMIZER_EVALUATION_INTERVAL_S="1"
            )

    def restart(self, service: str) -> None:
        assert self.alive(service)
        self.supervisor.stop(self.names[service])
        self.start(service)

    def alive(self, service: str) -> bool:
        return self.supervisor.process(self.names[service]).alive

    def log(self, service: str) -> str:
        return self.supervisor.process(self.names[service]).log.read_text()

    async def evaluate(self, *, stored: int) -> None:
        """Ask for an evaluation, and wait until the optimizer has stored this number of them."""
        await ask_for_evaluation(self.evaluators.url(self.names["evaluator"]))
        await self.until_stored(stored)

    async def until_stored(self, number: int) -> None:
        connection = await asyncpg.connect(self.database.url.get_secret_value())
        try:
            query = "SELECT count(*) FROM optimizer.evaluations"
            await until(lambda: connection.fetchval(query), lambda found: found == number)
        finally:
            await connection.close()

    def stop(self) -> None:
        for name in self.names.values():
            if name in self.supervisor.names:
                self.supervisor.stop(name)


@pytest.fixture
def pair(
    supervisor: Supervisor, kafka: KafkaSettings, database: DatabaseSettings, triton: TritonServer, tmp_path: Path
) -> Iterator[Pair]:
    fleet = tmp_path / "fleet.toml"
    fleet.write_text(judged_fleet(triton.address))
    running = Pair(supervisor, kafka, database, fleet)
    yield running
    running.stop()


def footprints(level: str, numbers: range) -> list[Footprint]:
    """Of calls that begin now."""
    now = datetime.now(UTC)
    times = {"started_at": now, "finished_at": now}
    return [footprint(number, level).model_copy(update=times) for number in numbers]


async def after(around: Peers, g_per_kwh: float) -> Policy:
    """The policy for a carbon intensity that is published now."""
    await around.send(CARBON_INTENSITY, "GB", intensity(g_per_kwh))
    return await around.policy(lambda one: one.inputs.k0_g_per_kwh == g_per_kwh)


@pytest.mark.parametrize("first", ["optimizer", "evaluator"])
async def test_a_reworded_level_is_used_again_once_it_is_judged_and_measured(pair, kafka, producer, first):
    second = {"optimizer": "evaluator", "evaluator": "optimizer"}[first]
    pair.start("optimizer")
    async with peers(kafka) as around, reading(kafka, QUALITY) as found, reading(kafka, DEAD_LETTERS) as dead:
        await around.send(CARBON_INTENSITY, "GB", intensity(292.0))
        for level in LEVELS:
            await around.send(FOOTPRINTS, level, *footprints(level, range(40)))
        await around.until_counted()
        for number in range(PROMPTS):
            await producer.post(SAMPLES, sample(number), "qa")
        pair.start("evaluator")
        bold = await around.policy(lambda one: one.row("qa").get("p/L1", 0.0) > 0)
        assert bold.inputs.estimates["qa"]["p/L1"].trials == pytest.approx(PROMPTS, rel=0.01)

        pair.fleet.write_text(pair.fleet.read_text().replace(DIRECTIVES["L1"], REWORDED))
        pair.restart(first)
        assert "the text of directives has changed" in pair.log(first)
        if first == "optimizer":
            # The evaluator still judges the old text.
            await pair.evaluate(stored=2)
            cautious = await after(around, 250.0)
            assert (cautious.status, cautious.row("qa")) == ("reference", {"p/L0": 1.0})
            assert "p/L1 not used: 0.0 of 10 footprints" in cautious.reason
            assert "p/L2 not used: 0.0 of 20 judged prompts" in cautious.reason  # it has its footprints
        else:
            # The optimizer still has the old text, of which it knows as much as before.
            await pair.evaluate(stored=2)
            unchanged = await after(around, 250.0)
            assert unchanged.row("qa")["p/L1"] > 0.0
            assert unchanged.inputs.estimates["qa"]["p/L1"].trials == pytest.approx(PROMPTS, rel=0.01)

        pair.restart(second)
        assert "the text of directives has changed" in pair.log(second)
        if second == "evaluator":
            await pair.evaluate(stored=3)
        # The new text has been judged once, and not been served: the other levels are used.
        without = await around.policy(lambda one: one.row("qa").get("p/L2", 0.0) > 0 and "p/L1" not in one.row("qa"))
        assert without.inputs.estimates["qa"]["p/L2"].trials == pytest.approx(PROMPTS, rel=0.01)
        await around.send(FOOTPRINTS, "L1", *footprints("L1", range(40, 80)))
        again = await around.policy(lambda one: one.row("qa").get("p/L1", 0.0) > 0)
        cell = again.inputs.estimates["qa"]["p/L1"]
        assert cell.trials == pytest.approx(PROMPTS, rel=0.01)
        assert cell.requests == pytest.approx(40.0, rel=0.01)

        judged = [Quality.model_validate_json(record.value) for record in await found.read_to_end()]
        # The first evaluation, and that of an evaluator that was not restarted yet, are of the old text.
        assert len(judged) == (3 if first == "optimizer" else 2)
        assert len({one.directives["L1"] for one in judged}) == 2
        assert len({(one.directives["L0"], one.directives["L2"]) for one in judged}) == 1
        assert await dead.read_to_end() == []
    assert all(pair.alive(service) for service in pair.names)
