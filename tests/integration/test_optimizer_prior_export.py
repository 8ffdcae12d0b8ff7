"""A prior from an earlier fleet, through the command line and the optimizer, on real Kafka and PostgreSQL."""

import asyncio
from collections.abc import AsyncIterator

import asyncpg
import pytest
from pydantic import SecretStr
from typer.testing import CliRunner

from deploy.local.postgres import create_database
from shared.kafka.admin import create_topics
from shared.runtime.settings import DatabaseSettings
from shared.topics import (
    CARBON_INTENSITY,
    FOOTPRINTS,
)
from tests.support.optimizer import (
    FLEET,
    footprint,
    intensity,
    peers,
    start_optimizer,
)
from tools.cli.main import app

pytestmark = pytest.mark.integration


@pytest.fixture
async def other_database(database: DatabaseSettings) -> AsyncIterator[DatabaseSettings]:
    """A second database, of another fleet; dropped after the test."""
    url = f"{database.url.get_secret_value()}b"
    await create_database(url)
    yield database.model_copy(update={"url": SecretStr(url)})
    connection = await asyncpg.connect(database.url.get_secret_value())
    try:
        await connection.execute(f'DROP DATABASE "{url.rpartition("/")[2]}" WITH (FORCE)')
    finally:
        await connection.close()


async def test_a_fleet_without_verdicts_starts_with_what_another_one_knew(
    supervisor, kafka, database, other_database, tmp_path
):
    """`sprout policy export-prior` reads the policies of a running fleet; another optimizer begins with it."""
    fleet, prior = tmp_path / "fleet.toml", tmp_path / "prior.json"
    fleet.write_text(FLEET)
    names = [start_optimizer(supervisor, kafka, database, fleet)]
    try:
        async with peers(kafka) as around:
            await around.send_evidence()
            known = await around.policy(lambda one: one.row("qa").get("p/L1", 0.0) > 0)
        result = await asyncio.to_thread(
            CliRunner().invoke,
            app,
            ["policy", "export-prior", str(prior), "--bootstrap", kafka.bootstrap_servers],
            env={"SPROUT_KAFKA_TOPIC_PREFIX": kafka.topic_prefix, "SPROUT_FLEET_FILE": str(fleet)},
        )
        assert result.exit_code == 0, result.output

        prefix = f"{kafka.topic_prefix}other."
        other = kafka.model_copy(update={"topic_prefix": prefix, "group_prefix": prefix})
        await create_topics(other)
        settings = {"SPROUT_OPTIMIZER_PRIOR_FILE": str(prior)}
        names.append(start_optimizer(supervisor, other, other_database, fleet, **settings))
        async with peers(other) as around:
            await around.send(CARBON_INTENSITY, "GB", intensity(292.0))
            await around.send(FOOTPRINTS, "f", *(footprint(n, "L0") for n in range(40)))
            first = await around.policy(lambda one: one.row("qa").get("p/L1", 0.0) > 0)
            # 50 verdicts of the earlier fleet instead of its 100: the same means, a wider margin.
            assert first.inputs.estimates["qa"]["p/L1"].trials == pytest.approx(50.0)
            assert 0.05 < first.row("qa")["p/L1"] < known.row("qa")["p/L1"]
            saved = [1.0 - one.expected_g_per_request / one.reference_g_per_request for one in (first, known)]
            assert 0.0 < saved[0] < saved[1]
    finally:
        for name in names:
            supervisor.stop(name)
