"""Poison messages: kept with their bytes and a reason, passed over, their content never logged."""

import logging

import pytest
from prometheus_client import CollectorRegistry

from shared.kafka.broker import build_broker
from shared.kafka.dead_letters import RetryLaterError, batch_decoder, message_decoder
from shared.messages import DeadLetter, GenerationRequest
from shared.runtime.clock import Clock
from shared.topics import DEAD_LETTERS, REQUESTS, SAMPLES
from tests.support.contract import Medium


class Desk:
    """A service with one single-message and one batch subscriber, and a reader of its dead letters."""

    def __init__(self, medium: Medium) -> None:
        self.medium = medium
        self.handled: list[GenerationRequest] = []
        self.letters: list[DeadLetter] = []
        self.topics = {"single": medium.kafka.topic(REQUESTS), "batch": medium.kafka.topic(SAMPLES)}
        self.broker, dead_letters = build_broker(
            medium.kafka, service="desk", clock=Clock(), registry=CollectorRegistry()
        )

        @self.broker.subscriber(
            self.topics["single"],
            group_id=medium.kafka.group("single"),
            auto_offset_reset="earliest",
            decoder=message_decoder(GenerationRequest),
        )
        async def single(request: GenerationRequest) -> None:
            if request.prompt == "explode":
                raise KeyError("a secret prompt")
            if request.prompt == "wait":
                raise RetryLaterError("database away")
            self.handled.append(request)

        @self.broker.subscriber(
            self.topics["batch"],
            batch=True,
            group_id=medium.kafka.group("batch"),
            auto_offset_reset="earliest",
            decoder=batch_decoder(GenerationRequest, dead_letters),
        )
        async def batch(requests: list[GenerationRequest]) -> None:
            self.handled.extend(requests)

        @self.broker.subscriber(medium.kafka.topic(DEAD_LETTERS), auto_offset_reset="earliest")
        async def letters(letter: DeadLetter) -> None:
            self.letters.append(letter)

    async def read(self, *values: bytes, through: str = "single") -> None:
        """Publish the values, and wait until each is either handled or a dead letter."""
        async with self.medium.running(self.broker):
            if through == "batch":
                await self.broker.publish_batch(*values, topic=self.topics[through])
            else:
                for value in values:
                    await self.broker.publish(value, topic=self.topics[through])
            await self.medium.until(lambda: len(self.handled) + len(self.letters) >= len(values))


@pytest.fixture
def desk(medium: Medium) -> Desk:
    return Desk(medium)


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
async def test_a_poison_message_keeps_its_bytes_and_gets_a_reason(
    desk: Desk, value: bytes, reason: str, detail: str
) -> None:
    await desk.read(value, b'{"prompt": "fine"}')
    assert [request.prompt for request in desk.handled] == ["fine"]
    (letter,) = desk.letters
    assert letter.original_value() == value
    assert (letter.reason, letter.topic, letter.service) == (reason, desk.topics["single"], "desk")
    assert detail in letter.detail
    assert "secret" not in letter.detail


async def test_the_good_records_of_a_batch_are_handled(desk: Desk) -> None:
    await desk.read(b'{"prompt": "one"}', b"{", b'{"prompt": "two"}', through="batch")
    assert sorted(request.prompt for request in desk.handled) == ["one", "two"]
    assert [letter.original_value() for letter in desk.letters] == [b"{"]


@pytest.mark.parametrize("medium", ["memory"], indirect=True)
async def test_what_can_be_retried_is_no_poison(desk: Desk) -> None:
    logging.disable(logging.CRITICAL)
    try:
        with pytest.raises(RetryLaterError):
            await desk.read(b'{"prompt": "wait"}')
    finally:
        logging.disable(logging.NOTSET)
    assert desk.letters == []


async def test_content_never_reaches_the_logs(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    await desk.read(b'{"prompt": "explode"}', b'{"prompt": 12345678}')
    printed = capsys.readouterr()
    assert len(desk.letters) == 2
    for text in ("secret", "explode", "12345678"):
        assert text not in printed.out + printed.err
