"""Keys, limits, budgets, footprints and usage through HTTP: two gateways on real Kafka, PostgreSQL and Triton."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any

import httpx
import pytest
from pydantic import SecretStr
from typer.testing import CliRunner

from deploy.local.postgres import create_database
from deploy.local.processes import Supervisor
from shared.kafka.admin import create_topics
from shared.messages import Footprint, OptionEstimate
from shared.messages.policies import OptionInputs
from shared.runtime.settings import DatabaseSettings, KafkaSettings
from shared.topics import FOOTPRINTS
from tests.support.deadlines import until
from tests.support.fleets import fleet_toml
from tests.support.gateway import GatewayProcess
from tests.support.messages import policy
from tests.support.router import ENDLESS_PROMPT, MODEL, RouterProcess, producing, question
from tools.cli.main import app

pytestmark = pytest.mark.integration

LEASE_S = "3"


@pytest.fixture(scope="module")
def gateways(
    supervisor: Supervisor, kafka_server, postgres_server: str, triton, tmp_path_factory
) -> Iterator[GatewayProcess]:
    """Two gateways and a router whose policy draws L1; its options take 2 g at L0 and 1 g at L1."""
    kafka = KafkaSettings(bootstrap_servers=kafka_server.bootstrap_servers, topic_prefix="keys.", group_prefix="keys.")
    database = DatabaseSettings(url=SecretStr(postgres_server + "gateway_keys"))
    fleet = tmp_path_factory.mktemp("gateway-keys") / "fleet.toml"
    fleet.write_text(fleet_toml([triton.address]))
    inputs = policy({"L1": 1.0}).inputs.model_copy(
        update={
            "options": {
                f"p/{level}": OptionInputs(pool="p", g_per_kwh=1_000.0, embodied_g_per_s=0.0)
                for level in ("L0", "L1", "L2")
            },
            "estimates": {
                "default": {
                    f"p/{level}": OptionEstimate(energy_kwh=energy, processing_s=1.0, quality={})
                    for level, energy in (("L0", 0.002), ("L1", 0.001), ("L2", 0.0005))
                }
            },
        }
    )

    async def prepare() -> None:
        await create_topics(kafka)
        await create_database(postgres_server + "gateway_keys")
        async with producing(kafka) as producer:
            await producer.prepare({"L1": 1.0}, inputs=inputs)

    asyncio.run(prepare())
    running = GatewayProcess(supervisor, kafka, database, fleet, [], [])
    RouterProcess(supervisor, kafka, fleet).start()
    running.start(SPROUT_GATEWAY_LEASE_S=LEASE_S)
    running.start(SPROUT_GATEWAY_LEASE_S=LEASE_S)
    yield running
    running.stop_all()


def sprout(gateways: GatewayProcess, *arguments: str, code: int = 0) -> str:
    """Run `sprout keys`; returns what it prints."""
    url = gateways.database.url.get_secret_value()
    with ThreadPoolExecutor(max_workers=1) as thread:  # it has an event loop of its own
        runner = CliRunner()
        result = thread.submit(runner.invoke, app, ["keys", *arguments, "--database", url]).result()
    assert result.exit_code == code, result.output
    return result.stdout if code == 0 else result.stderr


def new_key(gateways: GatewayProcess, *options: str) -> dict[str, str]:
    """A key that `sprout keys create` makes."""
    made: dict[str, str] = json.loads(sprout(gateways, "create", "--json", *options))
    return made


@asynccontextmanager
async def client_of(gateways: GatewayProcess, key: dict[str, str], number: int = 0) -> AsyncIterator[httpx.AsyncClient]:
    headers = {"authorization": f"Bearer {key['api_key']}"}
    async with httpx.AsyncClient(base_url=gateways.urls[number], headers=headers, timeout=60) as client:
        yield client


async def ask(client: httpx.AsyncClient, prompt: str = question(1), **changes: Any) -> httpx.Response:
    body = {"model": MODEL, "messages": [{"role": "user", "content": prompt}], "max_tokens": 100, **changes}
    return await client.post("/v1/chat/completions", json=body)


def level_of(answer: httpx.Response) -> str:
    level: str = answer.json()["usage"]["sprout"]["level"]
    return level


async def test_two_gateways_share_the_limit_of_a_key_exactly(gateways: GatewayProcess):
    key = new_key(gateways, "--requests-per-minute", "10", "--tokens-per-minute", "100000")
    if datetime.now(UTC).second > 40:
        await asyncio.sleep(60.1 - datetime.now(UTC).second)
    async with client_of(gateways, key, 0) as first, client_of(gateways, key, 1) as second:
        answers = await asyncio.gather(*(ask((first, second)[number % 2]) for number in range(100)))
    assert sorted(one.status_code for one in answers) == [200] * 10 + [429] * 90
    for answer in answers:
        assert answer.headers["x-ratelimit-limit-requests"] == "10"
        assert answer.headers["x-ratelimit-reset-tokens"].endswith("s")
    answered = {one.headers["x-ratelimit-remaining-requests"] for one in answers if one.status_code == 200}
    assert answered == {str(number) for number in range(10)}
    refused = next(one for one in answers if one.status_code == 429)
    assert refused.json()["error"]["code"] == "rate_limit_exceeded"
    assert 1 <= int(refused.headers["retry-after"]) <= 60


async def test_a_client_that_asks_one_after_the_other_needs_one_place(gateways: GatewayProcess):
    key = new_key(gateways, "--concurrent", "1")
    async with client_of(gateways, key, 0) as first, client_of(gateways, key, 1) as second:
        for number in range(6):
            answer = await ask((first, second)[number % 2], stream=number % 3 == 2)
            assert answer.status_code == 200, answer.text
        assert (await ask(first, model="unknown")).status_code == 404
        assert (await ask(first)).status_code == 200


async def test_the_place_of_a_killed_gateway_is_free_after_its_lease(gateways: GatewayProcess):
    key = new_key(gateways, "--concurrent", "1")
    # The default lease: it must not end before the other gateway has refused.
    dying = gateways.start()
    async with client_of(gateways, key, gateways.urls.index(dying)) as first, client_of(gateways, key) as living:
        body = {"model": MODEL, "messages": [{"role": "user", "content": ENDLESS_PROMPT}], "stream": True}
        async with first.stream("POST", "/v1/chat/completions", json=body) as stream:
            assert stream.status_code == 200
            await anext(stream.aiter_bytes())
            gateways.supervisor.kill(gateways.names[gateways.urls.index(dying)])
            refused = await ask(living)
            assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        answer = await until(lambda: ask(living), lambda found: found.status_code != 429)
        assert answer.status_code == 200


async def test_a_gateway_that_has_just_started_knows_the_policy(gateways: GatewayProcess):
    key, url = new_key(gateways), gateways.start()
    async with client_of(gateways, key, gateways.urls.index(url)) as client:
        assert (await ask(client)).json()["usage"]["sprout"]["estimated_grams"] == pytest.approx(1.0)
    gateways.stop(url)


async def test_a_budget_forces_levels_and_then_refuses(gateways: GatewayProcess):
    budget = ("--carbon-budget", "0.5", "--most-level", "L2")
    key = new_key(gateways, "--tenant", "frugal", *budget, "--serve-when-spent")
    async with client_of(gateways, key) as client:
        first = await ask(client)
        assert first.json()["usage"]["sprout"]["estimated_grams"] == pytest.approx(1.0)
        assert float(first.headers["x-sprout-budget-remaining-grams"]) == 0.5
        forced = await until(lambda: ask(client), lambda found: level_of(found) != "L1")
        assert (level_of(forced), forced.json()["usage"]["sprout"]["decision"]) == ("L2", "forced")
        assert forced.headers["x-sprout-budget-remaining-grams"] == "0"
        sprout(gateways, "limit", key["id"], *budget)
        refused = await ask(client)
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "insufficient_quota")
    assert int(refused.headers["retry-after"]) > 1
    sprout(gateways, "limit", key["id"])
    async with client_of(gateways, key) as client:
        assert (await ask(client)).status_code == 200


async def test_a_footprint_is_null_until_the_ledger_has_attributed_it(gateways: GatewayProcess):
    key, colleague = [new_key(gateways, "--tenant", "own", "--name", name) for name in ("one", "two")]
    stranger = new_key(gateways)
    async with client_of(gateways, key) as client:
        answer = (await ask(client)).json()
        path = f"/v1/footprints/{answer['id']}"
        before = (await client.get(path)).json()
        assert (before["object"], before["joules"], before["grams"], before["saved_grams"]) == (
            "footprint", None, None, None,
        )  # fmt: skip
        await publish_footprint(gateways.kafka, answer)
        after = (await until(lambda: client.get(path), lambda found: found.json()["saved_grams"] is not None)).json()
        assert (after["joules"], after["grams"], after["saved_grams"]) == (60.0, 0.5, pytest.approx(1.5))
        usage = (await client.get("/v1/usage", params={"group_by": ["key", "month"]})).json()
        (row,) = usage["data"]
        assert (row["key"], row["key_name"], row["requests"], row["metered_requests"]) == (key["id"], "one", 1, 1)
        assert (row["joules"], row["grams"], row["saved_grams"]) == (60.0, 0.5, pytest.approx(1.5))
        assert row["completion_tokens"] == answer["usage"]["completion_tokens"]
        assert (await client.get("/v1/footprints/unknown")).json()["error"]["code"] == "not_found"
    async with client_of(gateways, colleague) as client:
        assert (await client.get(path)).json()["grams"] == 0.5
        assert (await ask(client)).status_code == 200
        (day,) = await until(lambda: usage_of(client), lambda found: found[0]["requests"] == 2)
        assert (day["key"], day["grams"], day["outstanding_grams"]) == (None, 0.5, pytest.approx(1.0))
        assert await usage_of(client, **{"from": "2020-01-01", "to": "2020-02-01"}) == []
        assert len(await usage_of(client, group_by="key")) == 2
        for wrong in (
            {"from": "2100-01-01"},
            {"group_by": ["day", "hour"]},
            {"group_by": "colour"},
            {"to": "x"},
            {"to": "9999-12-31T23:59:59"},
            {"from": "0001-01-01T00:00:00+12:00"},
        ):
            refused = await client.get("/v1/usage", params=wrong)
            assert (refused.status_code, refused.json()["error"]["code"]) == (400, "invalid_value"), wrong
    async with client_of(gateways, stranger) as client:
        assert (await client.get(path)).status_code == 404
        assert await usage_of(client) == []


async def test_keys_are_listed_without_secrets_and_end_when_they_are_revoked(gateways: GatewayProcess):
    key = new_key(gateways, "--name", "[bold]lap\x1btop", "--requests-per-minute", "7")
    sprout(gateways, "limit", "--tenant", "all", "--concurrent", "3")
    rows = {row["id"] or row["tenant"]: row for row in json.loads(sprout(gateways, "list", "--json"))}
    assert (rows[key["id"]]["name"], rows[key["id"]]["requests_per_minute"]) == ("[bold]lap\x1btop", 7)
    assert rows["all"]["concurrent_requests"] == 3
    table = sprout(gateways, "list")
    assert "[bold]lap\N{REPLACEMENT CHARACTER}top" in table
    assert key["api_key"] not in table
    async with client_of(gateways, key) as client:
        assert (await ask(client)).status_code == 200
        sprout(gateways, "revoke", key["id"])
        refused = await ask(client)
    assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")
    assert "no valid key" in sprout(gateways, "revoke", key["id"], code=1)
    assert "no key" in sprout(gateways, "limit", "key_unknown", code=1)
    sprout(gateways, "limit", code=2)
    sprout(gateways, "create", "--most-level", "L1", code=2)
    sprout(gateways, "create", "--carbon-budget", "1", "--most-level", "1", code=2)
    sprout(gateways, "create", "--tenant", "", code=2)
    sprout(gateways, "create", "--carbon-budget", "nan", code=2)
    sprout(gateways, "create", "--concurrent", str(10**12), code=2)


async def usage_of(client: httpx.AsyncClient, **parameters: Any) -> list[dict[str, Any]]:
    answer = await client.get("/v1/usage", params=parameters)
    assert answer.status_code == 200, answer.text
    found: list[dict[str, Any]] = answer.json()["data"]
    return found


async def publish_footprint(kafka: KafkaSettings, answer: dict[str, Any]) -> None:
    now = datetime.now(UTC)
    footprint = Footprint(
        request_id=answer["id"], purpose="request", model=MODEL, group="default", tenant="own", pool="p", level="L1",
        zone="GB", endpoint="e0", started_at=now, finished_at=now, processing_s=1.0,
        completion_tokens=answer["usage"]["completion_tokens"], energy_j=60.0, intensity_g_per_kwh=300.0,
        operational_g=0.4, embodied_g=0.1, total_g=0.5,
    )  # fmt: skip
    async with producing(kafka) as producer:
        await producer.post(FOOTPRINTS, footprint, answer["id"])
