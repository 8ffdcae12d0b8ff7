"""Dead letters: invalid messages are kept with their bytes and a reason, skipped, and never logged."""

import asyncio
import dataclasses
import logging

import pytest
from prometheus_client import CollectorRegistry

from shared.kafka.broker import build_broker
from shared.kafka.dead_letters import FUSE_RECORDS, FUSE_SHARE, MAX_OVERSIZE_BYTES
from shared.kafka.handling import RetryLaterError
from shared.kafka.subscribe import subscribe_batches, subscribe_messages
from shared.messages import DeadLetter, GenerationRequest
from shared.runtime.clock import Clock
from shared.topics import DEAD_LETTERS, REQUESTS, SAMPLES
from tests.support.contract import Medium
from tests.support.deadlines import DEADLINE_S, until

BATCHES = dataclasses.replace(SAMPLES, message=GenerationRequest)
"""A topic of requests that is read in batches."""


class Fixture:
    """A service with one single-message and one batch subscriber, and a reader of its dead letters."""

    def __init__(self, medium: Medium) -> None:
        self.medium = medium
        self.handled: list[GenerationRequest] = []
        self.letters: list[DeadLetter] = []
        self.topics = {"single": medium.kafka.topic(REQUESTS), "batch": medium.kafka.topic(SAMPLES)}
        self.registry = CollectorRegistry()
        self.broker, self.dead_letters = build_broker(
            medium.kafka, service="test", clock=Clock(), registry=self.registry
        )

        @subscribe_messages(self.broker, medium.kafka, REQUESTS, group="single")
        async def single(request: GenerationRequest) -> None:
            if request.prompt == "explode":
                raise KeyError("a secret prompt")
            if request.prompt == "wait":
                raise RetryLaterError("database unavailable")
            self.handled.append(request)

        @subscribe_batches(self.broker, medium.kafka, self.dead_letters, BATCHES, group="batch", max_records=100)
        async def batch(requests: list[GenerationRequest]) -> None:
            if any(request.prompt == "explode" for request in requests):
                raise OverflowError("a secret prompt")
            self.handled.extend(requests)

        @self.broker.subscriber(medium.kafka.topic(DEAD_LETTERS), auto_offset_reset="earliest")
        async def letters(letter: DeadLetter) -> None:
            self.letters.append(letter)

    def letters_of(self, through: str) -> int:
        return sum(letter.topic == self.topics[through] for letter in self.letters)

    async def read(self, *values: bytes, through: str = "single") -> None:
        """Publish the values, and wait until each is either handled or a dead letter."""
        async with self.medium.running(self.broker):
            if through == "batch":
                await self.broker.publish_batch(*values, topic=self.topics[through], partition=0)
            else:
                for value in values:
                    await self.broker.publish(value, topic=self.topics[through])
            await self.medium.until(lambda: len(self.handled) + len(self.letters) >= len(values))


@pytest.fixture
def service(medium: Medium) -> Fixture:
    return Fixture(medium)


@pytest.mark.parametrize(
    ("value", "reason", "detail"),
    [
        (b"{not json", "invalid_json", "Invalid JSON"),
        (b'{"prompt": 3}', "invalid_message", "prompt: Input should be a valid string"),
        (b"{}", "invalid_message", "found neither"),
        (b"\xff\xfe", "invalid_json", "Invalid JSON"),
        (b'{"prompt": "explode"}', "handler_error", "KeyError"),
    ],
)
async def test_an_invalid_message_keeps_its_bytes_and_gets_a_reason(
    service: Fixture, value: bytes, reason: str, detail: str
) -> None:
    await service.read(value, b'{"prompt": "fine"}')
    assert [request.prompt for request in service.handled] == ["fine"]
    (letter,) = service.letters
    assert letter.original_value() == value
    assert (letter.reason, letter.topic, letter.service) == (reason, service.topics["single"], "test")
    assert detail in letter.detail
    assert "secret" not in letter.detail


async def test_the_valid_records_of_a_batch_are_handled(service: Fixture) -> None:
    await service.read(b'{"prompt": "one"}', b"{", b'{"prompt": "two"}', through="batch")
    assert sorted(request.prompt for request in service.handled) == ["one", "two"]
    assert [letter.original_value() for letter in service.letters] == [b"{"]


@pytest.mark.parametrize(
    ("bad", "reason", "detail"),
    [
        (b'{"prompt": "a", "requested_at": "0001-01-01T00:00:00+14:00"}', "invalid_message", "outside the years"),
        (b'{"prompt": "explode"}', "handler_error", "OverflowError"),
        (b'{"prompt": "%s"}' % (b"x" * 2**20), "too_large", "the limit is 1048576"),
        (b"[" * 100_000, "invalid_json", "recursion limit"),
    ],
)
async def test_one_bad_record_costs_only_itself(service: Fixture, bad: bytes, reason: str, detail: str) -> None:
    if reason == "too_large" and not service.medium.in_memory:
        pytest.skip("Kafka accepts such a value only compressed: see tests/integration/test_hostile_requests.py")
    good = [f"number {number}" for number in range(50)]
    values = [b'{"prompt": "%s"}' % prompt.encode() for prompt in good]
    await service.read(*values[:25], bad, *values[25:], through="batch")
    assert sorted(request.prompt or "" for request in service.handled) == sorted(good)
    (letter,) = service.letters
    assert letter.reason == reason
    assert detail in letter.detail
    assert bad.startswith(letter.original_value())
    assert len(letter.original_value()) <= MAX_OVERSIZE_BYTES or letter.truncated_bytes == 0
    counted = service.registry.get_sample_value(
        "sprout_dead_letters_total", {"topic": service.topics["batch"], "reason": reason}
    )
    assert counted == 1


@pytest.mark.parametrize("medium", ["memory"], indirect=True)
async def test_a_message_that_can_be_retried_is_no_dead_letter(service: Fixture) -> None:
    logging.disable(logging.CRITICAL)
    try:
        with pytest.raises(RetryLaterError):
            await service.read(b'{"prompt": "wait"}')
    finally:
        logging.disable(logging.NOTSET)
    assert service.letters == []


async def test_content_is_never_logged(service: Fixture, capsys: pytest.CaptureFixture[str]) -> None:
    await service.read(b'{"prompt": "explode"}', b'{"prompt": 12345678}')
    printed = capsys.readouterr()
    assert len(service.letters) == 2
    for text in ("secret", "explode", "12345678"):
        assert text not in printed.out + printed.err


@pytest.mark.parametrize("medium", ["kafka"], indirect=True)
@pytest.mark.integration
async def test_a_topic_is_not_consumed_any_more_when_nearly_all_records_become_dead_letters(service: Fixture) -> None:
    assert service.dead_letters.problem() is None
    async with asyncio.timeout(DEADLINE_S), service.medium.running(service.broker):
        for _ in range(FUSE_RECORDS // 50 + 2):
            await service.broker.publish_batch(*[b"{broken"] * 50, topic=service.topics["batch"], partition=0)
        await service.medium.until(lambda: service.dead_letters.problem() is not None)
        assert service.topics["batch"] in (service.dead_letters.problem() or "")
        # Other topics are consumed, and a client's invalid requests stop nothing.
        malformed = [b"{broken"] * (FUSE_RECORDS + 1)
        await service.broker.publish_batch(*malformed, topic=service.topics["single"], partition=0)
        await service.broker.publish(b'{"prompt": "fine"}', topic=service.topics["single"])
        await service.medium.until(lambda: bool(service.handled))
        # These letters come after those of the stopped topic.
        await until(lambda: service.letters_of("single") == FUSE_RECORDS + 1)
        assert FUSE_RECORDS * FUSE_SHARE <= service.letters_of("batch") <= FUSE_RECORDS
