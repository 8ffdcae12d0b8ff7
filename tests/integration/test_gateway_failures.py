"""The gateway when Kafka, routers or gateways fail, and two gateways that share a reply partition."""

import asyncio
import json
import re
import signal

import asyncpg
import httpx
import pytest

from deploy.local.postgres import postgres_spec
from shared.topics import REPLIES
from tests.support.deadlines import DEADLINE_S, until
from tests.support.gateway import GatewayProcess, prepare_gateways
from tests.support.router import ENDLESS_PROMPT, LONG_PROMPT, MODEL, TritonServer, page, question

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]


def body(prompt: str, **changes: object) -> dict[str, object]:
    return {"model": MODEL, "messages": [{"role": "user", "content": prompt}], **changes}


async def client_of(gateways: GatewayProcess, url: str | None = None) -> httpx.AsyncClient:
    key = await gateways.create_key()
    return httpx.AsyncClient(
        base_url=f"{url or gateways.urls[0]}/v1", headers={"authorization": f"Bearer {key}"}, timeout=180
    )


async def test_without_kafka_the_client_is_told_when_to_try_again(gateways: GatewayProcess, kafka_server):
    kafka = kafka_server.supervisor.process("kafka")
    url = gateways.start(SPROUT_GATEWAY_PUBLISH_TIMEOUT_S="5")
    async with await client_of(gateways, url) as client:
        assert (await client.get("/models")).status_code == 200  # the key is remembered
        kafka.signal(signal.SIGSTOP)
        try:
            answer = await client.post("/chat/completions", json=body(question(1)))
        finally:
            kafka.signal(signal.SIGCONT)
        assert answer.status_code == 503
        assert int(answer.headers["retry-after"]) >= 1
        assert answer.json()["error"]["code"] == "service_unavailable"
        await until(
            lambda: client.post("/chat/completions", json=body(question(1))), lambda found: found.status_code == 200
        )
    gateways.stop(url)


async def test_gateways_that_share_a_reply_partition_and_their_router_dies(
    supervisor, kafka_server, postgres_server, triton: TritonServer, tmp_path
):
    gateways = await prepare_gateways(
        supervisor,
        bootstrap_servers=kafka_server.bootstrap_servers,
        database_url=postgres_server + "gateways",
        triton=triton.address,
        folder=tmp_path,
        prefix="gateways.",
        reply_partitions=1,
    )
    router = gateways.routers.start_unready()
    urls = [gateways.start(), gateways.start()]
    assert "this one is shared" in gateways.log(1)
    first, second = [await client_of(gateways, url) for url in urls]
    async with first, second:
        answers = await asyncio.gather(
            *(
                client.post("/chat/completions", json=body(question(number), metadata={"n": str(number)}))
                for number in range(20)
                for client in (first, second)
            )
        )
        assert {answer.status_code for answer in answers} == {200}
        assert len({answer.json()["id"] for answer in answers}) == 40

        # The router dies in the middle of a stream, and before the whole answer of another request.
        whole = asyncio.create_task(first.post("/chat/completions", json=body(LONG_PROMPT)))
        async with first.stream("POST", "/chat/completions", json=body(ENDLESS_PROMPT, stream=True)) as stream:
            lines = stream.aiter_lines()
            async for line in lines:
                if '"content":"L1' in line:
                    break
            supervisor.kill(router)
            gateways.routers.start_unready()
            async with asyncio.timeout(DEADLINE_S):
                rest = [line.removeprefix("data: ") async for line in lines if line.startswith("data: ")]
        # The new router has begun the answer again, or is not ready yet.
        assert rest[-1] == "[DONE]"
        assert json.loads(rest[-2])["error"]["type"] in {"upstream_error", "timeout_error"}
        answer = await whole
        assert answer.status_code == 200
        assert answer.json()["choices"][0]["message"]["content"].startswith("L1 says:")

        # A gateway dies: the connections of its clients end.
        async with second.stream("POST", "/chat/completions", json=body(ENDLESS_PROMPT, stream=True)) as stream:
            lines = stream.aiter_lines()
            await anext(lines)
            supervisor.kill(gateways.names[1])
            with pytest.raises(httpx.RemoteProtocolError):
                async for _ in lines:
                    pass
        assert (await first.post("/chat/completions", json=body(question(3)))).status_code == 200
    gateways.stop_all()


async def test_a_gateway_reads_its_own_replies_only_and_keeps_its_partition_when_postgresql_restarts(
    supervisor, kafka_server, triton: TritonServer, tmp_path
):
    """Three gateways, four partitions: what each reads, then another owner of a partition, then a restart."""
    spec, url = postgres_spec(tmp_path / "postgres", name="postgres-replies")
    await asyncio.to_thread(supervisor.start, spec)
    gateways = await prepare_gateways(
        supervisor,
        bootstrap_servers=kafka_server.bootstrap_servers,
        database_url=url.rpartition("/")[0] + "/replies",
        triton=triton.address,
        folder=tmp_path,
        prefix="own.",
        reply_partitions=4,
    )
    gateways.routers.start()
    for _ in range(3):
        gateways.start()
    key = await gateways.create_key()
    headers = {"authorization": f"Bearer {key}"}
    clients = [httpx.AsyncClient(base_url=f"{one}/v1", headers=headers, timeout=180) for one in gateways.urls]
    first = clients[0]
    owners = await owners_of(gateways)
    assert len(owners) == 3

    # Answers of one gateway cost the others nothing.
    for number in range(20):
        answer = await first.post("/chat/completions", json=body(question(number), stream=True))
        assert answer.text.rstrip().endswith("[DONE]")
    counts = [replies_read(one) for one in gateways.urls]
    print(f"20 streams through one of three gateways: replies read by each {counts}")
    assert counts[0]["own"] >= 40
    assert counts[1:] == [{"own": 0.0, "other": 0.0}] * 2

    # Another process has taken the lock of the first gateway before that could claim it again.
    (taken,) = claimed(gateways, 0)
    async with first.stream("POST", "/chat/completions", json=body(ENDLESS_PROMPT, stream=True)) as stream:
        lines = stream.aiter_lines()
        await anext(lines)
        other = await asyncpg.connect(gateways.database.url.get_secret_value())
        await other.execute("SELECT pg_terminate_backend($1)", owners[taken])
        await other.execute("SELECT pg_advisory_lock(hashtext($1), $2)", gateways.kafka.topic(REPLIES), taken)
        _, free = await until(lambda: claimed(gateways, 0), lambda found: len(found) == 2)
        assert free not in owners
        answer = await first.post("/chat/completions", json=body(question(1)))
        assert answer.status_code == 200
        rest = [line async for line in lines]  # the open stream is answered on the old partition
        assert "data: [DONE]" in rest
        assert not any('"error"' in line for line in rest)
    await other.close()

    # PostgreSQL restarts: every gateway keeps its partition.
    before = [claimed(gateways, number)[-1] for number in range(3)]
    assert len(set(before)) == 3
    supervisor.stop("postgres-replies")
    await asyncio.to_thread(supervisor.start, spec)
    owners = await until(lambda: owners_of(gateways), lambda found: found.keys() == set(before))
    assert len(set(owners.values())) == 3
    assert [claimed(gateways, number)[-1] for number in range(3)] == before
    for client in clients:
        await until(
            lambda client=client: client.post("/chat/completions", json=body(question(2))),
            lambda found: found.status_code == 200,
        )
        await client.aclose()
    gateways.stop_all()
    supervisor.stop("postgres-replies")


async def owners_of(gateways: GatewayProcess) -> dict[int, int]:
    """The process of the session that has locked each reply partition."""
    try:
        connection = await asyncpg.connect(gateways.database.url.get_secret_value())
    except (OSError, asyncpg.PostgresError):
        return {}
    try:
        rows = await connection.fetch(
            "SELECT objid::int AS number, pid FROM pg_locks WHERE locktype = 'advisory' AND granted AND "
            "classid::bigint = hashtext($1)::bigint & 4294967295",
            gateways.kafka.topic(REPLIES),
        )
    finally:
        await connection.close()
    assert len({row["number"] for row in rows}) == len(rows)
    return {row["number"]: row["pid"] for row in rows}


def claimed(gateways: GatewayProcess, number: int) -> list[int]:
    """The partitions that a gateway has claimed, one after the other, without repetitions."""
    found = [
        int(re.search(r"[^_]partition\W+(\d+)", line).group(1))
        for line in gateways.log(number).splitlines()
        if "reply partition claimed" in line
    ]
    return [one for one, before in zip(found, [None, *found], strict=False) if one != before]


def replies_read(url: str) -> dict[str, float]:
    """The replies that a gateway has read: to its own requests, and to others."""
    values = re.findall(r'sprout_gateway_replies_total{of="(\w+)"} (\S+)', page(f"{url}/metrics"))
    return {"own": 0.0, "other": 0.0} | {name: float(value) for name, value in values}
