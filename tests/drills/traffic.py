"""The traffic of a scenario: sends requests, reads answers and dead letters."""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import KafkaError

from shared.kafka.records import RecordId
from shared.messages import DeadLetter, GenerationRequest
from shared.runtime.settings import KafkaSettings
from shared.topics import DEAD_LETTERS, REQUESTS, RESPONSES, TopicSpec
from tests.drills.accounting import Letter, Messages
from tests.drills.malformed import Malformed
from tests.support.traffic import Producer

POLL_S = 0.05
END_TIMEOUT_S = 60.0


class Traffic:
    """Sends messages and records what was sent and answered.

    Attributes:
        total: number of messages to send.
        waited_s: wall time from Kafka's acknowledgement of a request to its first answer, by id.
    """

    def __init__(self, kafka: KafkaSettings) -> None:
        self.messages = Messages()
        self.total = 0
        self.waited_s: dict[str, float] = {}
        self._kafka = kafka
        self._producer: Producer | None = None
        self._acknowledged_at: dict[str, float] = {}
        self._began = 0.0
        self._duration_s: float | None = None
        self._sending: list[asyncio.Task[None]] = []
        self._reading: asyncio.Task[None] | None = None
        self._last_answer = time.monotonic()
        self._consumer: AIOKafkaConsumer | None = None

    async def open(self, producer: Producer) -> None:
        """Start to read answers; requests are sent with this producer, which the caller closes."""
        self._producer = producer
        self._consumer = self._reader(RESPONSES)
        await self._consumer.start()
        self._reading = asyncio.create_task(self._read(self._consumer))

    def send(self, messages: Sequence[GenerationRequest | Malformed], *, rate: float | None = None) -> None:
        """Start to send; call it again to send more.

        Args:
            rate: messages per second, evenly spaced; None: all at once.
        """
        self.total += len(messages)
        self._began = self._last_answer = time.monotonic()
        self._duration_s = None if rate is None else len(messages) / rate
        self._sending.append(asyncio.create_task(self._send(messages, rate, self._began)))

    async def until(self, share: float) -> None:
        """Wait for a share of the last messages: of their time if they are evenly spaced, else of the answers."""
        if self._duration_s is not None:
            await asyncio.sleep(max(0.0, self._began + share * self._duration_s - time.monotonic()))
        while self._duration_s is None and self.messages.answered < share * self.total:
            if time.monotonic() - self._last_answer > END_TIMEOUT_S:
                return
            await asyncio.sleep(POLL_S)

    async def sent(self) -> None:
        """Wait until Kafka has acknowledged every message."""
        await asyncio.gather(*self._sending)

    async def longest_wait_s(self, requests: Sequence[GenerationRequest]) -> float:
        """Wait until these requests are answered; returns the longest wall time from acknowledgement to answer.

        Raises:
            TimeoutError: no answer at all has arrived for `END_TIMEOUT_S`.
        """
        await self.sent()
        while missing := [one.id for one in requests if one.id not in self.waited_s]:
            if time.monotonic() - self._last_answer > END_TIMEOUT_S:
                raise TimeoutError(f"{len(missing)} requests are not answered")
            await asyncio.sleep(POLL_S)
        return max(self.waited_s[one.id or ""] for one in requests)

    async def answered(self, *, stall_s: float) -> None:
        """Wait until every request was sent and answered, or no answer has arrived for `stall_s`.

        Raises:
            ValueError: a record is not an answer.
        """
        await asyncio.gather(*self._sending)
        self._last_answer = time.monotonic()
        while self.messages.answered < len(self.messages.sent):
            if self._reading is not None and self._reading.done():
                self._reading.result()
            if time.monotonic() - self._last_answer > stall_s:
                return
            await asyncio.sleep(POLL_S)

    async def read_to_end(self) -> None:
        """Read all answers and dead letters; call it when every router has stopped."""
        if self._consumer is not None:
            await self._to_end(self._consumer, asyncio.sleep)
            await asyncio.sleep(POLL_S)  # for the records that the reader has fetched
        for record in await self.records(DEAD_LETTERS):
            letter = DeadLetter.model_validate_json(record.value)
            self.messages.letters.append(
                Letter((letter.partition, letter.offset), letter.original_value(), letter.reason)
            )

    async def records(self, spec: TopicSpec) -> list[Any]:
        """All records of a topic, up to its present end."""
        found: list[Any] = []
        reader = self._reader(spec)

        async def read(_: float) -> None:
            for batch in (await reader.getmany(timeout_ms=100)).values():
                found.extend(batch)

        await reader.start()
        try:
            await self._to_end(reader, read)
        finally:
            await reader.stop()
        return found

    async def close(self) -> None:
        """Stop sending and reading."""
        tasks = [*self._sending, *([self._reading] if self._reading is not None else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._consumer is not None:
            await self._consumer.stop()

    def _reader(self, spec: TopicSpec) -> AIOKafkaConsumer:
        return AIOKafkaConsumer(
            self._kafka.topic(spec), **self._kafka.client_options(), group_id=None, auto_offset_reset="earliest"
        )

    async def _send(self, messages: Sequence[GenerationRequest | Malformed], rate: float | None, began: float) -> None:
        if self._producer is None:
            raise RuntimeError("call Traffic.open(producer) before Traffic.send")
        send, topic = self._producer.producer.send, self._kafka.topic(REQUESTS)
        acknowledgements = []
        for number, message in enumerate(messages):
            if rate is not None:
                await asyncio.sleep(max(0.0, began + number / rate - time.monotonic()))
            # Given here: the metadata of later records of a batch has the timestamp of the first (aiokafka 0.14).
            at_ms = int(time.time() * 1_000)
            if isinstance(message, Malformed):
                # Keys distribute the records over all partitions.
                future = await send(topic, message.value, key=f"malformed-{number}".encode(), timestamp_ms=at_ms)
            else:
                value = message.model_dump_json(exclude_none=True).encode()
                future = await send(topic, value, key=(message.id or "").encode(), timestamp_ms=at_ms)
            acknowledgements.append(asyncio.create_task(self._acknowledged(message, future, at_ms)))
        await asyncio.gather(*acknowledgements)

    async def _acknowledged(
        self, message: GenerationRequest | Malformed, future: "asyncio.Future[Any]", at_ms: int
    ) -> None:
        try:
            metadata = await future
        except KafkaError:
            self.messages.unsent.add(getattr(message, "id", None) or "malformed")
            return
        if isinstance(message, Malformed):
            self.messages.malformed[metadata.partition, metadata.offset] = (message.value or b"", message.reason)
        elif message.id is not None:
            self._acknowledged_at[message.id] = time.monotonic()
            self.messages.sent.add(message.id)
            self.messages.records[message.id] = str(RecordId(REQUESTS.name, metadata.partition, metadata.offset, at_ms))

    async def _read(self, consumer: AIOKafkaConsumer) -> None:
        while True:
            try:
                batches = await consumer.getmany(timeout_ms=100)
            except KafkaError:  # while Kafka is unavailable; the client reconnects
                await asyncio.sleep(POLL_S)
                continue
            for batch in batches.values():
                for record in batch:
                    self._record_answer(record)

    def _record_answer(self, record: Any) -> None:
        answer = json.loads(record.value)
        name = str(answer["request_id"])
        self._last_answer = time.monotonic()
        if name not in self.messages.answers and name in self._acknowledged_at:
            self.waited_s[name] = self._last_answer - self._acknowledged_at[name]
        self.messages.answers[name] += 1
        self.messages.answered_records.setdefault(name, set()).add(str(answer["record"]))
        if answer["status"] != "ok":
            self.messages.errors[name] = str((answer.get("error") or {}).get("code"))

    @staticmethod
    async def _to_end(consumer: AIOKafkaConsumer, step: Callable[[float], Awaitable[None]]) -> None:
        """Call `step` until a consumer has passed the current end of its topic."""
        partitions = sorted(consumer.assignment())
        ends: dict[TopicPartition, int] = await consumer.end_offsets(partitions)
        async with asyncio.timeout(END_TIMEOUT_S):
            while any([await consumer.position(one) < ends[one] for one in partitions]):
                await step(POLL_S)
