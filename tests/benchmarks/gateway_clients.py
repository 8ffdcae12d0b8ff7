"""The two clients of `bench_gateway`: over HTTP, and a producer that speaks Kafka. Both cost as little as they can."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, cast

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer

from shared.runtime.settings import KafkaSettings
from tests.support.fleets import MODEL

PROMPTS = 100

Ask = Callable[[int, bool], Coroutine[Any, Any, float]]
"""Asks one question, as a stream or not; returns the seconds until the first text, or until the whole answer."""


def prompt(number: int) -> str:
    """A prompt with recorded answers."""
    return f"Question {number % PROMPTS}?"


class Connection(asyncio.Protocol):
    """A kept connection to the gateway, which carries one request at a time. It parses no more than it needs."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._received = bytearray()
        self._streams = False
        self._first: float | None = None
        self._answered: asyncio.Future[float] = asyncio.get_running_loop().create_future()

    @property
    def is_open(self) -> bool:
        """Whether the server has not ended it."""
        return self._transport is not None and not self._transport.is_closing()

    async def ask(self, request: bytes, *, stream: bool) -> float:
        """Send a request; returns when its first text has come, or all of an answer without a stream."""
        assert self._transport is not None
        self._received.clear()
        self._streams, self._first = stream, None
        self._answered = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return await self._answered

    def close(self) -> None:
        """End it."""
        if self._transport is not None:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio."""
        self._transport = cast("asyncio.Transport", transport)

    def connection_lost(self, error: Exception | None) -> None:
        """See asyncio."""
        self._fail(RuntimeError("the gateway has ended the connection"))

    def data_received(self, data: bytes) -> None:
        """See asyncio."""
        self._received += data
        head, found, body = self._received.partition(b"\r\n\r\n")
        if not found or self._answered.done():
            return
        if not head.startswith(b"HTTP/1.1 200"):
            self._fail(RuntimeError(head.decode(errors="replace")))
        elif self._streams:
            if self._first is None and self._has_text(body):
                self._first = time.perf_counter()
            if self._first is not None and body.endswith(b"0\r\n\r\n"):
                self._answered.set_result(self._first)
        elif len(body) == int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0]):
            json.loads(body)  # as every client does
            self._answered.set_result(time.perf_counter())

    def _fail(self, error: Exception) -> None:
        if not self._answered.done():
            self._answered.set_exception(error)

    @staticmethod
    def _has_text(body: bytearray) -> bool:
        """Whether there is more content than the empty one of the first event."""
        return body.count(b'"content":"') > body.count(b'"content":""')


class Http:
    """A client of the gateway on kept connections."""

    def __init__(self, port: int, key: str) -> None:
        self._port = port
        self._key = key
        self._idle: list[Connection] = []

    async def ask(self, number: int, stream: bool) -> float:
        """See `Ask`."""
        began = time.perf_counter()
        connection = await self._connection()
        answered = await connection.ask(self.request(prompt(number), stream=stream), stream=stream)
        self._idle.append(connection)
        return answered - began

    async def _connection(self) -> Connection:
        while self._idle:
            connection = self._idle.pop()
            if connection.is_open:  # the server ends idle connections
                return connection
        _, connection = await asyncio.get_running_loop().create_connection(Connection, "127.0.0.1", self._port)
        return connection

    def request(self, text: str, *, stream: bool) -> bytes:
        """The bytes of a request."""
        body = {"model": MODEL, "messages": [{"role": "user", "content": text}], "stream": stream, "max_tokens": 512}
        content = json.dumps(body).encode()
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nhost: gateway\r\nauthorization: Bearer {self._key}\r\n"
            f"content-type: application/json\r\ncontent-length: {len(content)}\r\n\r\n"
        )
        return head.encode() + content

    def close(self) -> None:
        """Close the connections."""
        for connection in self._idle:
            connection.close()


class Direct:
    """A producer of requests that reads responses and chunks itself."""

    def __init__(self, kafka: KafkaSettings, producer: AIOKafkaProducer, consumer: AIOKafkaConsumer) -> None:
        self._kafka = kafka
        self._producer = producer
        self._consumer = consumer
        self._waiting: dict[str, asyncio.Future[float]] = {}
        self._sent = 0

    async def ask(self, number: int, stream: bool) -> float:
        """See `Ask`."""
        began = time.perf_counter()
        self._sent += 1
        name = f"direct-{self._sent}"
        waiting: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        self._waiting[name] = waiting
        messages = [{"role": "user", "content": prompt(number)}]
        request = {"id": name, "messages": messages, "stream": stream, "sampling": {"max_tokens": 512}}
        await self._producer.send(
            f"{self._kafka.topic_prefix}requests", json.dumps(request).encode(), key=name.encode()
        )
        return await waiting - began

    async def read(self) -> None:
        """Read answers until cancelled; the first record of a request counts."""
        while True:
            batches = await self._consumer.getmany(timeout_ms=5)
            for batch in batches.values():
                for answer in batch:
                    json.loads(answer.value)  # as every client does
                    waiting = self._waiting.pop(answer.key.decode(), None)
                    if waiting is not None:
                        waiting.set_result(time.perf_counter())


@asynccontextmanager
async def direct(kafka: KafkaSettings) -> AsyncIterator[Direct]:
    """A connected client that starts at the end of the answers."""
    producer = AIOKafkaProducer(bootstrap_servers=kafka.bootstrap_servers, linger_ms=2)
    consumer = AIOKafkaConsumer(
        f"{kafka.topic_prefix}responses", f"{kafka.topic_prefix}response-chunks",
        bootstrap_servers=kafka.bootstrap_servers, auto_offset_reset="latest",
    )  # fmt: skip
    await producer.start()
    await consumer.start()
    await consumer.seek_to_end()
    client = Direct(kafka, producer, consumer)
    reading = asyncio.create_task(client.read())
    try:
        yield client
    finally:
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        await producer.stop()
        await consumer.stop()
