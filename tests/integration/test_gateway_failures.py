"""The gateway when Kafka, routers or gateways fail, and two gateways that share a reply partition."""

import asyncio
import json
import signal

import httpx
import pytest

from tests.support.deadlines import DEADLINE_S, until
from tests.support.gateway import GatewayProcess, prepare_gateways
from tests.support.router import ENDLESS_PROMPT, LONG_PROMPT, MODEL, TritonServer, question

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
