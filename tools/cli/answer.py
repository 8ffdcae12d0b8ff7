"""Publishes one request as any producer would, and waits for what comes back: chunks, the answer, its footprint."""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer

from shared.kafka.dead_letters import PoisonMessageError, parse
from shared.messages import Footprint, GenerationRequest, GenerationResponse, ResponseChunk
from shared.runtime.settings import KafkaSettings
from shared.topics import FOOTPRINTS, REQUESTS, RESPONSE_CHUNKS, RESPONSES, TopicSpec
from tools.cli.offsets import existing_partitions

POLL_MS = 100

LAST_CHUNK_WAIT_S = 2.0
"""For the last chunk of a stream to be read after the answer, which has a topic of its own."""

BEGINS_AGAIN = "\n[the router was replaced; the answer begins again]\n"


class MissingTopicError(RuntimeError):
    """A topic that is needed does not exist."""


class NoAnswerError(TimeoutError):
    """No answer came in time."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back for a request.

    Attributes:
        footprint: null where none came in the time that was given for it.
    """

    response: GenerationResponse
    footprint: Footprint | None


class Conversation:
    """One request and its answer. Chunks are handed over as they come, in order; then the answer, once."""

    def __init__(
        self,
        kafka: KafkaSettings,
        request: GenerationRequest,
        *,
        on_chunk: Callable[[str], None],
        on_response: Callable[[GenerationResponse], None],
    ) -> None:
        if request.id is None:
            raise ValueError("the request needs an id to find its answer by")
        self._kafka = kafka
        self._request = request
        self._id = request.id
        self._on_chunk = on_chunk
        self._on_response = on_response
        self._streaming = request.stream
        self._response: GenerationResponse | None = None
        self._footprint: Footprint | None = None
        self._stream: str | None = None

    async def run(self, *, timeout_s: float, footprint_wait_s: float) -> Answer:
        """Publish, wait for the answer, then a moment longer for its footprint.

        Raises:
            MissingTopicError: a topic was not created.
            NoAnswerError: no answer within `timeout_s`.
            KafkaError: the broker could not be reached or refused the request.
        """
        specs = {self._kafka.topic(spec): spec for spec in (RESPONSES, RESPONSE_CHUNKS, FOOTPRINTS)}
        consumer: Any = AIOKafkaConsumer(**self._kafka.client_options(), enable_auto_commit=False, fetch_max_wait_ms=50)
        await consumer.start()
        try:
            await self._from_now_on(consumer, list(specs))
            await self._publish()
            try:
                async with asyncio.timeout(timeout_s):
                    while self._response is None:
                        await self._read(consumer, specs)
            except TimeoutError:
                raise NoAnswerError(f"no answer to request {self._id} within {timeout_s:g} s") from None
            with suppress(TimeoutError):
                async with asyncio.timeout(LAST_CHUNK_WAIT_S):
                    while self._streaming:
                        await self._read(consumer, specs)
            self._on_response(self._response)
            if self._response.status == "ok":
                with suppress(TimeoutError):  # the answer stands without it
                    async with asyncio.timeout(footprint_wait_s):
                        while self._footprint is None:
                            await self._read(consumer, specs)
            return Answer(self._response, self._footprint)
        finally:
            await consumer.stop()

    async def _from_now_on(self, consumer: Any, topics: list[str]) -> None:  # noqa: ANN401 - aiokafka is untyped
        """Place the consumer at the end of every partition, before the request is published."""
        partitions = await existing_partitions(self._kafka, [*topics, self._kafka.topic(REQUESTS)])
        missing = {*topics, self._kafka.topic(REQUESTS)} - {partition.topic for partition in partitions}
        if missing:
            raise MissingTopicError(f"topics {', '.join(sorted(missing))} do not exist")
        partitions = [partition for partition in partitions if partition.topic in topics]
        ends = await consumer.end_offsets(partitions)
        consumer.assign(partitions)
        for partition, offset in ends.items():
            consumer.seek(partition, offset)

    async def _publish(self) -> None:
        producer: Any = AIOKafkaProducer(
            **self._kafka.client_options(), acks="all", max_request_size=REQUESTS.max_message_bytes
        )
        await producer.start()
        try:
            await producer.send_and_wait(
                self._kafka.topic(REQUESTS),
                self._request.model_dump_json(exclude_none=True).encode(),
                key=self._id.encode(),
            )
        finally:
            await producer.stop()

    async def _read(self, consumer: Any, specs: dict[str, TopicSpec]) -> None:  # noqa: ANN401
        batches = await consumer.getmany(timeout_ms=POLL_MS)
        for partition, records in batches.items():
            for record in records:
                if record.value is not None and self._id.encode() in record.value:
                    self._take(specs[partition.topic], record.value)

    def _take(self, spec: TopicSpec, value: bytes) -> None:
        try:
            message = parse(spec.message, value)
        except PoisonMessageError:
            return  # somebody else's broken record that happens to quote our id
        match message:
            case ResponseChunk() if message.request_id == self._id:
                if message.sequence == 0 and self._stream not in (None, message.stream):
                    self._on_chunk(BEGINS_AGAIN)
                self._stream = message.stream
                self._on_chunk(message.text)
                self._streaming = not message.final
            case GenerationResponse() if message.request_id == self._id:
                self._response = self._response or message
            case Footprint() if message.request_id == self._id and message.purpose == "request":
                self._footprint = message
            case _:
                return
