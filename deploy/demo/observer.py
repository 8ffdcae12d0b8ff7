"""What a producer sees of the system while the demo runs: answers, policies, intensity, evaluations."""

from collections import Counter
from dataclasses import dataclass, field

from aiokafka import AIOKafkaConsumer

from shared.kafka.dead_letters import PoisonMessageError, parse
from shared.messages import CarbonIntensity, DeadLetter, GenerationResponse, Policy, Quality
from shared.runtime.settings import KafkaSettings
from shared.topics import CARBON_INTENSITY, DEAD_LETTERS, POLICIES, QUALITY, RESPONSES, TopicSpec

WATCHED: tuple[TopicSpec, ...] = (RESPONSES, CARBON_INTENSITY, POLICIES, QUALITY, DEAD_LETTERS)


@dataclass(slots=True)
class Tally:
    """Counts so far."""

    answers: Counter[str] = field(default_factory=Counter)
    """How often each request id was answered."""
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
        """Requests with at least one answer."""
        return len(self.answers)

    @property
    def duplicates(self) -> int:
        """Answers beyond the first of their request."""
        return sum(self.answers.values()) - len(self.answers)

    def count(self, spec: TopicSpec, value: bytes | None) -> None:
        """Take one message of a watched topic into account."""
        try:
            message = parse(spec.message, value)
        except PoisonMessageError as error:
            self.errors[error.reason] += 1
            return
        match message:
            case GenerationResponse():
                self.answers[message.request_id] += 1
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
                raise TypeError(f"{spec.name} is not watched")


class Observer:
    """Reads the watched topics from their start, without a consumer group."""

    def __init__(self, kafka: KafkaSettings) -> None:
        self._specs = {kafka.topic(spec): spec for spec in WATCHED}
        self._consumer = AIOKafkaConsumer(
            *self._specs,
            **kafka.client_options(),
            group_id=None,
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            fetch_max_wait_ms=100,
        )
        self.tally = Tally()

    async def watch(self) -> None:
        """Count until cancelled."""
        await self._consumer.start()
        try:
            async for record in self._consumer:
                self.tally.count(self._specs[record.topic], record.value)
        finally:
            await self._consumer.stop()
