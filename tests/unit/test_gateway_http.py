"""The gateway's HTTP/1.1 on a real connection: what is no body is bounded, however it arrives."""

import asyncio
from collections.abc import AsyncIterator

import pytest
import uvicorn

from services.gateway.http import MAX_HEAD_BYTES, BoundedHttp

PART = b"a" * 1_000
CHUNKED = b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"


async def echo(scope, receive, send):
    """Answer with the size of the body."""
    size, more = 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        size, more = size + len(message["body"]), message["more_body"]
    answer = str(size).encode()
    await send({
        "type": "http.response.start", "status": 200,
        "headers": [(b"content-length", str(len(answer)).encode())],
    })  # fmt: skip
    await send({"type": "http.response.body", "body": answer})


@pytest.fixture
async def port() -> AsyncIterator[int]:
    """Of a server."""
    config = uvicorn.Config(echo, host="127.0.0.1", port=0, http=BoundedHttp, lifespan="off", log_config=None)
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve())
    while not server.started:  # noqa: ASYNC110 - no event
        await asyncio.sleep(0.01)
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    await serving


async def talk(port: int, *parts: bytes) -> bytes:
    """Send parts one after the other, until the server ends the connection, or answers; returns what it says."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        for part in parts:
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(0.001)
        async with asyncio.timeout(10):
            return await reader.read(1_000)
    except ConnectionError:
        return b"ended"
    finally:
        writer.close()


async def test_requests_are_answered(port: int):
    body = b"b" * 300_000
    head = b"POST /path?a=%20b HTTP/1.1\r\nhost: x\r\nx-padding: " + b"a" * (MAX_HEAD_BYTES - 200) + b"\r\n"
    assert (await talk(port, head + b"content-length: 300000\r\n\r\n" + body)).endswith(b"300000")
    chunks = [b"1\r\nb\r\n" for _ in range(5_000)]
    assert (await talk(port, CHUNKED + b"".join(chunks) + b"0\r\nx-sum: 1\r\n\r\n")).endswith(b"5000")
    pipelined = b"GET / HTTP/1.1\r\nhost: x\r\nx-padding: " + PART + b"\r\n\r\n"
    assert (await talk(port, pipelined * 100)).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize(
    ("beginning", "part"),
    [
        (b"GET /", PART),
        (b"GET / HTTP/1.1\r\nx-padding: ", PART),
        (b"GET / HTTP/1.1\r\n", b"x-padding: " + PART + b"\r\n"),
        (CHUNKED + b"1;", PART),
        (CHUNKED + b"1\r\nb\r\n0\r\nx-padding: ", PART),
        (CHUNKED + b"1\r\nb\r\n0\r\n", b"x-padding: " + PART + b"\r\n"),
        (b"", b"\r\n" * 500),
    ],
    ids=["target", "one header", "many headers", "chunk's extension", "one trailer", "many trailers", "blank lines"],
)
async def test_what_is_no_body_is_bounded(port: int, beginning: bytes, part: bytes):
    parts = [part] * (MAX_HEAD_BYTES // 1_000 + 5)
    slow = await talk(port, beginning, *parts)
    assert slow == b"ended" or slow.startswith(b"HTTP/1.1 400")
    fast = await talk(port, beginning + b"".join(parts), *parts)
    assert fast == b"ended" or fast.startswith(b"HTTP/1.1 400")
