"""Files and batches of the gateway with OpenAI's client, on real Kafka, PostgreSQL, routers and a Triton server."""

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from typing import Any

import httpx
import openai
import pytest
from openai.types import Batch
from pydantic import SecretStr

from deploy.local.postgres import create_database
from deploy.local.processes import Supervisor
from services.gateway.keys import Limits, set_limits
from shared.kafka.admin import create_topics
from shared.runtime.database import open_pool
from shared.runtime.settings import DatabaseSettings, KafkaSettings
from shared.topics import REQUESTS, REQUESTS_BATCH, TopicSpec
from tests.support.deadlines import DEADLINE_S, REPLY_S
from tests.support.deadlines import until as until_true
from tests.support.gateway import GatewayProcess, prepare_gateways
from tests.support.router import (
    ENDLESS_PROMPT,
    LEVELS,
    MODEL,
    RouterProcess,
    committed,
    fleet_toml,
    producing,
    question,
    reading,
)

pytestmark = pytest.mark.integration

CHAT = "/v1/chat/completions"
SETTINGS = {
    "SPROUT_GATEWAY_BATCH_LEASE_S": "3",
    "SPROUT_GATEWAY_BATCH_DEFER_S": "1",
    "SPROUT_GATEWAY_MAX_FILE_BYTES": "2000000",
}
ENDED = {"completed", "failed", "expired", "cancelled"}


@pytest.fixture(scope="module")
def gateways(
    supervisor: Supervisor, kafka_server, postgres_server: str, triton, tmp_path_factory
) -> Iterator[GatewayProcess]:
    """A gateway with the default lane of batches."""
    folder = tmp_path_factory.mktemp("batches")
    kafka = KafkaSettings(
        bootstrap_servers=kafka_server.bootstrap_servers, topic_prefix="batches.", group_prefix="batches."
    )
    database = DatabaseSettings(url=SecretStr(postgres_server + "batches"))
    fleet = folder / "fleet.toml"
    fleet.write_text(fleet_toml([triton.address]))

    async def prepare() -> None:
        await create_topics(kafka)
        await create_database(postgres_server + "batches")
        async with producing(kafka) as producer:
            await producer.prepare({"L1": 1.0})

    asyncio.run(prepare())
    running = GatewayProcess(supervisor, kafka, database, fleet, [], [])
    running.start(**SETTINGS)
    yield running
    running.stop_all()


@pytest.fixture(scope="module")
def routers(gateways: GatewayProcess) -> RouterProcess:
    running = RouterProcess(gateways.supervisor, gateways.kafka, gateways.fleet)
    running.start()
    return running


@pytest.fixture
async def client(gateways: GatewayProcess, routers: RouterProcess) -> AsyncIterator[openai.AsyncOpenAI]:
    """OpenAI's client, with a key of its own."""
    key = await gateways.create_key()
    async with openai.AsyncOpenAI(base_url=f"{gateways.urls[-1]}/v1", api_key=key, max_retries=3) as made:
        yield made


def line(name: str, prompt: str, **changes: Any) -> str:
    body = {"model": MODEL, "messages": [{"role": "user", "content": prompt}]} | changes
    return json.dumps({"custom_id": name, "method": "POST", "url": CHAT, "body": body})


async def start(client: openai.AsyncOpenAI, lines: Iterable[str], window: str = "24h", **options: Any) -> Batch:
    file = await client.files.create(file=("input.jsonl", "\n".join(lines).encode()), purpose="batch")
    return await client.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window=window, **options)


async def until(client: openai.AsyncOpenAI, batch: Batch, condition: Callable[[Batch], object]) -> Batch:
    """Wait until a batch meets a condition; returns it."""
    async with asyncio.timeout(DEADLINE_S):
        while not condition(batch := await client.batches.retrieve(batch.id)):  # noqa: ASYNC110 - no event
            await asyncio.sleep(0.1)
    return batch


async def until_ended(client: openai.AsyncOpenAI, batch: Batch) -> Batch:
    return await until(client, batch, lambda one: one.status in ENDED)


async def content(client: openai.AsyncOpenAI, file_id: str | None) -> list[dict[str, Any]]:
    if file_id is None:
        return []
    text = (await client.files.content(file_id)).text
    assert text.endswith("\n")
    return [json.loads(one) for one in text.splitlines()]


async def usage(client: openai.AsyncOpenAI) -> list[dict[str, Any]]:
    return (await client.get("/usage", cast_to=httpx.Response)).json()["data"]


async def test_every_line_is_once_in_the_output_or_the_error_file(gateways: GatewayProcess, client: openai.AsyncOpenAI):
    lines = [line(f"q{number}", question(number % 40)) for number in range(100)]
    lines[10:10] = [
        "no json",
        "",
        line("q3", question(3)),
        line("unknown", question(1), model="unknown"),
        line("stream", question(1), stream=True),
        line("n", question(1), n=2),
        line("level", question(1), metadata={"sprout_directive": "L9"}),
    ]
    batch = await start(client, lines, metadata={"purpose": "a test", "nul": "\x00"})
    assert batch.status == "validating"
    batch = await until_ended(client, batch)
    assert (batch.status, batch.errors, batch.metadata) == ("completed", None, {"purpose": "a test", "nul": "\x00"})
    assert batch.request_counts.model_dump() == {"total": 106, "completed": 100, "failed": 6}
    times = (batch.created_at, batch.in_progress_at, batch.finalizing_at, batch.completed_at)
    assert list(times) == sorted(times)

    answers = await content(client, batch.output_file_id)
    assert [one["custom_id"] for one in answers] == [f"q{number}" for number in range(100)]
    first = answers[0]
    assert first.keys() == {"id", "custom_id", "response", "error"}
    assert first["error"] is None
    assert first["response"]["status_code"] == 200
    completion = first["response"]["body"]
    assert completion["object"] == "chat.completion"
    assert completion["choices"][0]["message"]["content"].startswith("L1 says: ")
    assert completion["usage"]["sprout"]["level"] == "L1"

    malformed, repeated, *refused = await content(client, batch.error_file_id)
    assert (malformed["custom_id"], malformed["response"]) == (None, None)
    assert (malformed["error"]["code"], malformed["error"]["line"]) == ("invalid_json_line", 11)
    assert (repeated["custom_id"], repeated["error"]["code"]) == ("q3", "duplicate_custom_id")
    assert [
        (one["custom_id"], one["response"]["status_code"], one["response"]["body"]["error"]["code"]) for one in refused
    ] == [
        ("unknown", 404, "model_not_found"),
        ("stream", 400, "unsupported_parameter"),
        ("n", 400, "invalid_value"),
        ("level", 400, "unknown_level"),
    ]
    assert [one.id async for one in client.batches.list()] == [batch.id]
    lane = [end for _, end in (await committed(gateways.kafka, topic=REQUESTS_BATCH)).values()]
    assert sum(lane) >= 100
    assert {one.purpose for one in (await client.files.list()).data} == {"batch", "batch_output"}
    async with asyncio.timeout(DEADLINE_S):
        while sum(row["requests"] for row in await usage(client)) < 100:  # noqa: ASYNC110 - no event
            await asyncio.sleep(0.1)
    (row,) = await usage(client)
    assert (row["requests"], row["completion_tokens"]) == (100, 100 * LEVELS["L1"][0])
    footprint = await client.get(f"/footprints/{first['response']['request_id']}", cast_to=httpx.Response)
    assert footprint.json()["level"] == "L1"


async def until_published(kafka: KafkaSettings, topic: TopicSpec, records: int) -> None:
    async def published() -> int:
        return sum(end for _, end in (await committed(kafka, topic=topic)).values())

    await until_true(published, lambda found: found >= records)


async def test_clients_wait_behind_few_lines_of_a_batch_also_beside_a_router_of_before_the_upgrade(
    supervisor: Supervisor, kafka_server, postgres_server: str, triton, tmp_path
):
    """Two hundred lines wait in Kafka, then twenty requests of clients, then a router with ten places starts."""
    made = await prepare_gateways(
        supervisor,
        bootstrap_servers=kafka_server.bootstrap_servers,
        database_url=postgres_server + "beside",
        triton=triton.address,
        folder=tmp_path,
        prefix="beside.",
        router={"SPROUT_ROUTER_MAX_IN_FLIGHT": "10"},
    )
    options = {"base_url": f"{made.start()}/v1", "api_key": await made.create_key(), "max_retries": 0}
    async with openai.AsyncOpenAI(**options, timeout=DEADLINE_S) as client, reading(made.kafka) as answers:
        batch = await start(client, [line(f"q{number}", question(number % 40)) for number in range(400)])
        await until_published(made.kafka, REQUESTS_BATCH, 200)  # as many as a gateway publishes at once
        asked = [
            asyncio.create_task(
                client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": question(number)}])
            )
            for number in range(20)
        ]
        await until_published(made.kafka, REQUESTS, 20)
        made.routers.start()
        clients = {answer.id for answer in await asyncio.gather(*asked)}
        # A router that does not read the lane joins the group.
        made.routers.start(SPROUT_ROUTER_LANES="requests:1")
        batch = await until_ended(client, batch)
        assert batch.request_counts.model_dump() == {"total": 400, "completed": 400, "failed": 0}
        await answers.read(until=420)
        await answers.read_to_end()
    order = [record.key.decode() for record in sorted(answers.records, key=lambda one: one.timestamp)]
    assert len(order) == len(set(order)) == 420
    last = max(order.index(request) for request in clients)
    # A tenth of the places, and what started before the others were read.
    assert last - len(clients) < 40, f"{last - len(clients)} lines were answered before the last client"
    made.stop_all()


async def test_completions_in_a_batch(client: openai.AsyncOpenAI):
    body = {"model": MODEL, "prompt": question(1)}
    text = json.dumps({"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": body})
    file = await client.files.create(file=("input.jsonl", text.encode()), purpose="batch")
    batch = await client.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")
    batch = await until_ended(client, batch)
    (answer,) = await content(client, batch.output_file_id)
    assert answer["response"]["body"]["choices"][0]["text"].startswith("L1 says: ")
    assert batch.error_file_id is None


async def test_a_cancelled_batch_and_one_that_expires_name_the_lines_without_an_answer(client: openai.AsyncOpenAI):
    slow = [line(f"slow{number}", ENDLESS_PROMPT) for number in range(20)]
    cancelled, expired = await asyncio.gather(
        start(client, [line("quick", question(1)), *slow]), start(client, slow, window="2s")
    )
    await until(client, cancelled, lambda one: one.request_counts and one.request_counts.completed == 1)
    with pytest.raises(openai.BadRequestError) as caught:
        await client.files.delete(cancelled.input_file_id)
    assert caught.value.code == "file_in_use"
    assert (await client.batches.cancel(cancelled.id)).status == "cancelling"
    cancelled, expired = await asyncio.gather(until_ended(client, cancelled), until_ended(client, expired))
    assert (cancelled.status, expired.status) == ("cancelled", "expired")
    assert [one["custom_id"] for one in await content(client, cancelled.output_file_id)] == ["quick"]
    for batch, code in ((cancelled, "batch_cancelled"), (expired, "batch_expired")):
        errors = await content(client, batch.error_file_id)
        assert [one["custom_id"] for one in errors] == [f"slow{number}" for number in range(20)]
        assert {one["error"]["code"] for one in errors} == {code}
        assert batch.request_counts.failed == 20
        with pytest.raises(openai.BadRequestError) as caught:
            await client.batches.cancel(batch.id)
        assert caught.value.code == "batch_not_cancellable"


async def test_batches_wait_for_a_carbon_budget_until_it_is_there_or_they_end(gateways: GatewayProcess, routers):
    key = await gateways.create_key(tenant="thrifty")
    async with (
        await open_pool(gateways.database, schema="gateway") as pool,
        openai.AsyncOpenAI(base_url=f"{gateways.urls[-1]}/v1", api_key=key, max_retries=0) as client,
    ):
        async with pool.acquire() as connection:
            await set_limits(connection, "tenant/thrifty", Limits(grams_per_month=0.0, defer_batches=True))
        lines = [line("malformed", "", messages=[]), line("waits", question(1))]
        waiting = [await start(client, lines, window=window) for window in ("24h", "24h", "3s")]
        deferred = "SELECT count(deferred_until_wall) FROM batches WHERE tenant = 'thrifty'"
        async with asyncio.timeout(DEADLINE_S):
            while await pool.fetchval(deferred) < 2:  # noqa: ASYNC110 - no event; the third one may expire before
                await asyncio.sleep(0.1)
        with pytest.raises(openai.RateLimitError, match="in a batch"):
            await client.chat.completions.create(**json.loads(lines[1])["body"])
        expired = await until_ended(client, waiting[2])
        assert (await client.batches.cancel(waiting[1].id)).status == "cancelling"
        cancelled = await until_ended(client, waiting[1])
        assert (await client.batches.retrieve(waiting[0].id)).status == "in_progress"
        async with pool.acquire() as connection:
            await set_limits(connection, "tenant/thrifty", Limits(grams_per_month=100.0))
        completed = await until_ended(client, waiting[0])
        assert [one.status for one in (completed, cancelled, expired)] == ["completed", "cancelled", "expired"]
        assert [one["custom_id"] for one in await content(client, completed.output_file_id)] == ["waits"]
        for batch, code in ((cancelled, "batch_cancelled"), (expired, "batch_expired")):
            assert [one["error"] and one["error"]["code"] for one in await content(client, batch.error_file_id)][
                1
            ] == code


async def test_files_are_listed_read_and_deleted(client: openai.AsyncOpenAI):
    data = bytes(range(256)) * 5_000  # more than one part
    files = [
        await client.files.create(file=(f"{number}.jsonl", data + bytes([number])), purpose="batch")
        for number in range(3)
    ]
    names = [file.id for file in files]
    assert (files[0].bytes, files[0].filename, files[0].status) == (len(data) + 1, "0.jsonl", "processed")
    assert (await client.files.retrieve(names[0])) == files[0]
    assert (await client.files.content(names[1])).content == data + b"\x01"
    assert [file.id async for file in client.files.list(limit=2, order="asc")] == names
    assert [file.id async for file in client.files.list(limit=1)] == names[::-1]
    assert (await client.files.delete(names[0])).deleted
    with pytest.raises(openai.NotFoundError):
        await client.files.retrieve(names[0])


async def test_others_do_not_see_the_files_and_batches_of_a_tenant(gateways: GatewayProcess, client):
    mine = await start(client, [line("a", question(1))])
    url = gateways.urls[-1] + "/v1"
    keys = [await gateways.create_key(tenant=tenant) for tenant in ("one", "one", "other")]
    first, second, other = (openai.AsyncOpenAI(base_url=url, api_key=key, max_retries=0) for key in keys)
    async with first, second, other:
        theirs = await start(first, [line("a", question(1))])
        assert (await second.batches.retrieve(theirs.id)).id == theirs.id
        for batch in (mine, theirs):
            for call in (
                other.batches.retrieve(batch.id),
                other.batches.cancel(batch.id),
                other.files.retrieve(batch.input_file_id),
                other.files.content(batch.input_file_id),
                other.files.delete(batch.input_file_id),
                other.batches.create(input_file_id=batch.input_file_id, endpoint=CHAT, completion_window="24h"),
            ):
                with pytest.raises(openai.NotFoundError):
                    await call
        assert not (await other.files.list()).data
        assert not (await other.batches.list()).data


@pytest.mark.parametrize(
    ("file", "purpose", "status", "param", "code"),
    [
        (b"a", "fine-tune", 400, "purpose", "invalid_value"),
        (b"a" * 2_000_001, "batch", 413, "file", "file_too_large"),
        (None, "batch", 400, "file", "missing_required_parameter"),
    ],
)
async def test_an_upload_that_cannot_be_used_leaves_nothing(client, file, purpose, status, param, code):
    files = {"other": (None, b"x")} if file is None else {"file": ("input.jsonl", file)}
    headers = {"authorization": f"Bearer {client.api_key}"}
    async with httpx.AsyncClient(timeout=REPLY_S) as bare:
        answer = await bare.post(f"{client.base_url}files", files=files, data={"purpose": purpose}, headers=headers)
        assert answer.status_code == status
        assert (answer.json()["error"]["param"], answer.json()["error"]["code"]) == (param, code)
        wrong = await bare.post(f"{client.base_url}files", json={"purpose": "batch"}, headers=headers)
        assert (wrong.status_code, wrong.json()["error"]["code"]) == (400, "invalid_content_type")
    assert not (await client.files.list()).data


@pytest.mark.parametrize(
    ("changes", "status", "param"),
    [
        ({"completion_window": "25h"}, 400, "completion_window"),
        ({"completion_window": "soon"}, 400, "completion_window"),
        ({"endpoint": "/v1/embeddings"}, 400, "endpoint"),
        ({"input_file_id": "file-unknown"}, 404, "input_file_id"),
        ({"metadata": {"a": "x" * 513}}, 400, "metadata.a"),
    ],
)
async def test_a_batch_that_cannot_be_made(client: openai.AsyncOpenAI, changes, status, param):
    file = await client.files.create(file=("input.jsonl", b"\n\n"), purpose="batch")
    usual = {"input_file_id": file.id, "endpoint": CHAT, "completion_window": "24h"}
    with pytest.raises(openai.APIStatusError) as caught:
        await client.batches.create(**(usual | changes))
    assert (caught.value.status_code, caught.value.param) == (status, param)


async def test_a_file_without_lines_fails(client: openai.AsyncOpenAI):
    batch = await until_ended(client, await start(client, ["", " "]))
    assert (batch.status, batch.errors.data[0].code, batch.output_file_id) == ("failed", "empty_file", None)


async def test_gateway_and_router_are_killed_in_the_middle_of_a_batch(
    gateways: GatewayProcess, routers: RouterProcess, client: openai.AsyncOpenAI
):
    total = 300
    lines = [line(f"q{number}", question(number % 40)) for number in range(total)]
    lines[150] = "no json"
    batch = await start(client, lines)
    await until(client, batch, lambda one: one.request_counts and one.request_counts.completed >= 20)
    gateways.supervisor.kill(gateways.names[-1])
    gateways.supervisor.kill(f"{gateways.kafka.topic_prefix}router{routers.count}")
    routers.start_unready()
    second = client.with_options(base_url=f"{gateways.start(**SETTINGS)}/v1")
    batch = await until_ended(second, batch)
    assert batch.status == "completed"
    assert batch.request_counts.model_dump() == {"total": total, "completed": total - 1, "failed": 1}
    answers = await content(second, batch.output_file_id)
    assert Counter(one["custom_id"] for one in answers) == Counter(
        f"q{number}" for number in range(total) if number != 150
    )
    (malformed,) = await content(second, batch.error_file_id)
    assert malformed["error"]["line"] == 151
