"""The gateway with other clients than OpenAI's, and with clients that misbehave."""

import asyncio
import json
import os
import shutil
import socket
import subprocess
from contextlib import closing, suppress
from urllib.parse import urlsplit

import httpx
import hypothesis
import psutil
import pytest

from tests.support.deadlines import REPLY_S, until
from tests.support.gateway import GatewayProcess
from tests.support.router import ENDLESS_PROMPT, LARGE_PROMPT, LEVELS, MODEL, page, question, until_page

os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # otherwise it asks the network for prices

pytestmark = pytest.mark.integration

ANSWER = "L1 says: " + "word " * LEVELS["L1"][0]


def body(prompt: str, **changes: object) -> dict[str, object]:
    return {"model": MODEL, "messages": [{"role": "user", "content": prompt}], **changes}


@pytest.fixture
async def key(gateways: GatewayProcess) -> str:
    return await gateways.create_key()


@pytest.fixture
def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def connect(url: str, *, segment: int | None = None) -> socket.socket:
    """A raw connection.

    Args:
        segment: size of TCP segments, bytes, which also keeps the buffers of the operating system small.
    """
    address = urlsplit(url)
    made = socket.socket()
    # What the gateway has not taken does not disappear in this side's buffer.
    made.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16_384)
    if segment is not None:
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, segment)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2_048)
    made.settimeout(60)
    made.connect((address.hostname, address.port))
    return made


def http(key: str, content: bytes, *headers: str, length: int | None = None) -> bytes:
    """A request for a chat completion, as bytes.

    Args:
        length: what the header `content-length` says; default: the truth.
    """
    lines = [
        "POST /v1/chat/completions HTTP/1.1", "host: gateway", f"authorization: Bearer {key}",
        "content-type: application/json", f"content-length: {len(content) if length is None else length}", *headers,
    ]  # fmt: skip
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + content


def read_to_end(connection: socket.socket) -> bytes:
    found = b""
    try:
        while part := connection.recv(65_536):
            found += part
    except ConnectionResetError:
        pass
    return found


async def test_litellm_as_a_client(gateways: GatewayProcess, key: str):
    import litellm  # noqa: PLC0415 - it takes seconds

    options = {
        "model": f"openai/{MODEL}", "api_base": f"{gateways.urls[0]}/v1", "api_key": key,
        "messages": [{"role": "user", "content": question(5)}],
    }  # fmt: skip
    answer = await litellm.acompletion(**options)
    assert answer.choices[0].message.content.strip() == ANSWER.strip()
    assert answer.usage.completion_tokens == LEVELS["L1"][0]
    stream = await litellm.acompletion(**options, stream=True)
    pieces = [event.choices[0].delta.content or "" async for event in stream]
    assert "".join(pieces).strip() == ANSWER.strip()
    with pytest.raises(litellm.NotFoundError, match="does not exist"):
        await litellm.acompletion(**(options | {"model": "openai/unknown"}))


def test_the_openapi_document_is_kept(gateways: GatewayProcess, bearer: dict[str, str]):
    import schemathesis  # noqa: PLC0415 - it takes seconds
    from schemathesis.specs.openapi.checks import positive_data_acceptance  # noqa: PLC0415

    schema = schemathesis.openapi.from_url(f"{gateways.urls[0]}/v1/openapi.json")
    checked = []
    # Its check of missing keys takes out this spelling only.
    capitalised = {"Authorization": bearer["authorization"]}
    for found in schema.get_all_operations():
        operation = found.ok()

        @hypothesis.settings(
            max_examples=15, deadline=None, derandomize=True, database=None,
            suppress_health_check=list(hypothesis.HealthCheck), phases=[hypothesis.Phase.generate],
        )  # fmt: skip
        @hypothesis.given(case=operation.as_strategy())
        def check(case):
            # A schema cannot say, for example, that the last turn is the user's.
            case.call_and_validate(headers=capitalised, timeout=30, excluded_checks=[positive_data_acceptance])

        check()
        checked.append(operation.path)
    assert {"/v1/chat/completions", "/v1/sprout/status", "/v1/files", "/v1/batches/{batch_id}/cancel"} <= set(checked)


def test_curl_reads_a_stream_line_by_line(gateways: GatewayProcess, key: str):
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    command = [
        "curl", "--no-buffer", "--silent", f"{gateways.urls[0]}/v1/chat/completions",
        "--header", f"authorization: Bearer {key}", "--json",
    ]  # fmt: skip

    def read(prompt: str) -> "subprocess.Popen[str]":
        return subprocess.Popen([*command, json.dumps(body(prompt, stream=True))], stdout=subprocess.PIPE, text=True)

    with read(ENDLESS_PROMPT) as curl:
        lines = (line for line in curl.stdout if line.startswith("data: {"))
        next(lines)
        assert json.loads(next(lines).removeprefix("data: "))["choices"][0]["delta"]["content"]
        assert curl.poll() is None  # the answer is not complete yet
        curl.terminate()
    with read(question(6)) as curl:
        events = [json.loads(line.removeprefix("data: ")) for line in curl.stdout if line.startswith("data: {")]
        assert curl.wait() == 0
    assert "".join(one["choices"][0]["delta"].get("content", "") for one in events) == ANSWER


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_never_reads_is_closed(gateways: GatewayProcess, key: str, stream: bool):
    url = gateways.start(SPROUT_GATEWAY_SEND_TIMEOUT_S="1")
    try:
        with closing(connect(url, segment=536)) as lazy:
            lazy.sendall(http(key, json.dumps(body(LARGE_PROMPT, stream=stream, max_tokens=20_000)).encode()))
            # Read the beginning only, so that the answer has begun.
            begun = await asyncio.to_thread(lazy.recv, 100)
            assert begun.startswith(b"HTTP/1.1 200")
            await until_page(f"{url}/metrics", lambda text: "sprout_gateway_open_requests 0.0" in text)
            pid = gateways.supervisor.process(gateways.names[gateways.urls.index(url)]).pid
            await until_connections(pid, urlsplit(url).port, 0)
            rest = await asyncio.to_thread(read_to_end, lazy)
        assert len(rest) < 100_000
        assert b"[DONE]" not in rest
    finally:
        gateways.stop(url)


async def until_connections(pid: int, port: int, wanted: int) -> None:
    """Wait until a process has so many connections on a port, whatever their state."""

    def connections() -> int:
        found = psutil.Process(pid).net_connections("tcp")
        return len([one for one in found if one.raddr and one.laddr.port == port])

    await until(connections, lambda found: found == wanted)


async def test_slow_and_oversized_bodies(gateways: GatewayProcess, key: str, bearer: dict[str, str]):
    url = gateways.start(SPROUT_GATEWAY_SEND_TIMEOUT_S="1")
    try:
        with closing(connect(url)) as slow:
            slow.sendall(http(key, b'{"model":', length=1_000))
            answer = await asyncio.to_thread(read_to_end, slow)
        assert answer.startswith(b"HTTP/1.1 408")
        assert b'"error":{' in answer.replace(b'"error": {', b'"error":{')
    finally:
        gateways.stop(url)

    async def endless():
        for _ in range(10_000):
            yield b" " * 65_536

    # At a gateway that waits longer for a slow body than this machine may stand still.
    async with httpx.AsyncClient(timeout=REPLY_S) as client:
        refused = await client.post(f"{gateways.urls[0]}/v1/chat/completions", content=endless(), headers=bearer)
    assert refused.status_code == 413
    assert refused.json()["error"]["message"].startswith("the body is larger than")


async def test_headers_are_bounded(gateways: GatewayProcess, key: str):
    content = json.dumps(body(question(1))).encode()
    whole = http(key, content, "connection: close").replace(b"\r\n", b"\r\nx-padding: " + b"a" * 8_000 + b"\r\n", 1)
    with closing(connect(gateways.urls[0])) as large:
        large.sendall(whole)
        assert (await asyncio.to_thread(read_to_end, large)).startswith(b"HTTP/1.1 200")
    with closing(connect(gateways.urls[0])) as endless:
        endless.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nhost: gateway\r\nx-padding: ")
        with suppress(ConnectionError):  # the gateway has answered and ended the connection
            for _ in range(1_000):
                await asyncio.to_thread(endless.sendall, b"a" * 1_000)
            pytest.fail("a megabyte of headers was taken")
        assert b" 200 " not in await asyncio.to_thread(read_to_end, endless)


async def test_headers_cannot_be_injected(gateways: GatewayProcess, bearer: dict[str, str], key: str):
    task = "a\r\nset-cookie: evil=1"
    async with httpx.AsyncClient(timeout=REPLY_S) as client:
        answer = await client.post(
            f"{gateways.urls[0]}/v1/chat/completions",
            json=body(question(1), metadata={"sprout_task": task}),
            headers=bearer,
        )
    assert "set-cookie" not in answer.headers
    assert answer.status_code in {200, 400}
    with closing(connect(gateways.urls[0])) as raw:
        content = json.dumps(body(question(1))).encode()
        raw.sendall(http(key, content, "x-sprout-task: caf\xe9 \xff", "connection: close"))
        found = await asyncio.to_thread(read_to_end, raw)
    head = found.partition(b"\r\n\r\n")[0]
    assert head.startswith((b"HTTP/1.1 200", b"HTTP/1.1 400"))
    assert head.isascii()


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b'{"model": "m", "messages": "x"}', b"\xff\xfe", b"[" * 100_000,
     b'{"model": "m", "messages": [{"role": "user", "content": "\\ud800"}]}', b'{"\\ud800": 1}'],
    ids=range(9),
)  # fmt: skip
async def test_malformed_bodies_get_400(gateways: GatewayProcess, bearer: dict[str, str], content: bytes):
    async with httpx.AsyncClient(timeout=REPLY_S) as client:
        answer = await client.post(
            f"{gateways.urls[0]}/v1/chat/completions",
            content=content,
            headers={**bearer, "content-type": "application/json"},
        )
    assert answer.status_code == 400
    assert answer.json()["error"].keys() == {"message", "type", "param", "code"}


def test_no_prompt_and_no_key_is_in_the_log(gateways: GatewayProcess, key: str):
    log = gateways.log()
    assert "Question number" not in log
    assert key not in log
    assert "Traceback" not in log
    assert "sprout_gateway_requests_total" in page(f"{gateways.urls[0]}/metrics")


@pytest.mark.parametrize("complete", [True, False])
async def test_a_half_closed_connection_is_closed_and_its_request_cancelled(
    gateways: GatewayProcess, key: str, complete: bool
):
    """A client that sends nothing more has left, as uvicorn sees it: also one that would go on reading."""
    content = json.dumps(body(ENDLESS_PROMPT, stream=True)).encode()
    with closing(connect(gateways.urls[0])) as half:
        half.sendall(http(key, content) if complete else http(key, content[:20], length=len(content)))
        if complete:
            assert (await asyncio.to_thread(half.recv, 100)).startswith(b"HTTP/1.1 200")
        half.shutdown(socket.SHUT_WR)
        rest = await asyncio.to_thread(read_to_end, half)
    assert b"[DONE]" not in rest
    await until_page(f"{gateways.urls[0]}/metrics", lambda text: "sprout_gateway_open_requests 0.0" in text)
