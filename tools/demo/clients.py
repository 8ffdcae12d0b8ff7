"""The demo's Kafka clients: one sends the requests, one counts the messages of the services."""

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer

from shared.kafka.records import PoisonMessageError, parse
from shared.messages import (
    CarbonIntensity,
    DeadLetter,
    GenerationRequest,
    GenerationResponse,
    Policy,
    Quality,
    SamplingParameters,
)
from shared.runtime.clock import Clock
from shared.runtime.settings import KafkaSettings
from shared.topics import CARBON_INTENSITY, DEAD_LETTERS, POLICIES, QUALITY, REQUESTS, RESPONSES, TopicSpec
from tools.demo.traffic import PlannedRequest

OBSERVED: tuple[TopicSpec, ...] = (RESPONSES, CARBON_INTENSITY, POLICIES, QUALITY, DEAD_LETTERS)


class Producer:
    """Sends the requests; `sent` counts those that Kafka acknowledged."""

    def __init__(self, kafka: KafkaSettings, clock: Clock, *, model: str, max_tokens: int) -> None:
        self._kafka = kafka
        self._clock = clock
        self._model = model
        self._sampling = SamplingParameters(max_tokens=max_tokens)
        self.sent = 0

    async def send(self, plan: Sequence[PlannedRequest]) -> None:
        """Send every request at its event time; returns when Kafka has acknowledged all.

        Raises:
            KafkaError: a request could not be published.
        """
        producer = AIOKafkaProducer(**self._kafka.client_options(), acks="all", enable_idempotence=True, linger_ms=5)
        await producer.start()
        acknowledgements: set[asyncio.Future[object]] = set()
        try:
            for planned in plan:
                await self._clock.sleep_until(planned.at)
                acknowledged = await producer.send(
                    self._kafka.topic(REQUESTS), self._message(planned), key=planned.id.encode()
                )
                acknowledgements.add(acknowledged)
                acknowledged.add_done_callback(self._acknowledged)
                acknowledged.add_done_callback(acknowledgements.discard)
            await asyncio.gather(*acknowledgements)
        finally:
            await producer.stop()

    def _message(self, planned: PlannedRequest) -> bytes:
        request = GenerationRequest(
            id=planned.id,
            model=self._model,
            prompt=planned.prompt,
            # No task label: groups are learned from the prompts alone, which distinguish the workload's few prompts.
            reference=planned.reference,
            sampling=self._sampling,
            requested_at=planned.at,
        )
        return request.model_dump_json(exclude_none=True).encode()

    def _acknowledged(self, future: "asyncio.Future[object]") -> None:
        if not future.cancelled() and future.exception() is None:
            self.sent += 1


@dataclass(slots=True)
class Tally:
    """Counts of the observed messages."""

    answers: Counter[str] = field(default_factory=Counter)
    """Number of answers by request."""
    levels: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    dead_letters: int = 0
    intensities: dict[str, CarbonIntensity] = field(default_factory=dict)
    policies: dict[str, Policy] = field(default_factory=dict)
    policies_published: int = 0
    evaluations: int = 0
    last_evaluation: Quality | None = None

    @property
    def answered(self) -> int:
        """Number of requests with an answer."""
        return len(self.answers)

    @property
    def duplicates(self) -> int:
        """Number of answers beyond the first of each request."""
        return sum(self.answers.values()) - len(self.answers)

    def count(self, spec: TopicSpec, value: bytes | None) -> None:
        """Count one message of an observed topic."""
        try:
            message = parse(spec.message, value)
        except PoisonMessageError as error:
            self.errors[error.reason] += 1
            return
        match message:
            case GenerationResponse():
                self.answers[message.identity] += 1
                if message.error is not None:
                    self.errors[message.error.code] += 1
                elif message.decision is not None:
                    self.levels[message.decision.level] += 1
            case CarbonIntensity():
                self.intensities[message.zone] = message
            case Policy():
                self.policies[message.model] = message
                self.policies_published += 1
            case Quality():
                self.evaluations += 1
                self.last_evaluation = message
            case DeadLetter():
                self.dead_letters += 1
            case _:
                raise TypeError(f"topic {spec.name} is not observed")


class Observer:
    """Reads the observed topics from their start, without a consumer group."""

    def __init__(self, kafka: KafkaSettings) -> None:
        self._specs = {kafka.topic(spec): spec for spec in OBSERVED}
        self._consumer = AIOKafkaConsumer(
            *self._specs,
            **kafka.client_options(),
            group_id=None,
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            fetch_max_wait_ms=100,
        )
        self.tally = Tally()

    async def observe(self) -> None:
        """Count until cancelled."""
        await self._consumer.start()
        try:
            async for record in self._consumer:
                self.tally.count(self._specs[record.topic], record.value)
        finally:
            await self._consumer.stop()
