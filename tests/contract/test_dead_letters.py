"""Poison messages, in memory: kept with their bytes and a reason, passed over, their content never logged."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from faststream.kafka import KafkaBroker, TestKafkaBroker
from prometheus_client import CollectorRegistry

from shared.broker import build_broker
from shared.clock import Clock
from shared.dead_letters import RetryLaterError, batch_decoder, message_decoder
from shared.messages import DeadLetter, GenerationRequest
from shared.settings import KafkaSettings

KAFKA = KafkaSettings()


class Desk:
    """A service with one single-message and one batch subscriber, and a reader of its dead letters."""

    def __init__(self) -> None:
        self.handled: list[GenerationRequest] = []
        self.letters: list[DeadLetter] = []
        self.broker, office = build_broker(KAFKA, service="desk", clock=Clock(), registry=CollectorRegistry())

        @self.broker.subscriber("single", decoder=message_decoder(GenerationRequest))
        async def single(request: GenerationRequest) -> None:
            if request.prompt == "explode":
                raise KeyError("a secret prompt")
            if request.prompt == "wait":
                raise RetryLaterError("database away")
            self.handled.append(request)

        @self.broker.subscriber("batch", batch=True, decoder=batch_decoder(GenerationRequest, office))
        async def batch(requests: list[GenerationRequest]) -> None:
            self.handled.extend(requests)

        @self.broker.subscriber("sprout.dead-letters")
        async def letters(letter: DeadLetter) -> None:
            self.letters.append(letter)


@contextmanager
def quiet() -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


@pytest.fixture
def desk() -> Desk:
    return Desk()


async def published(broker: KafkaBroker, *values: object, topic: str, headers: dict[str, str] | None = None) -> None:
    async with TestKafkaBroker(broker) as memory:
        if topic == "batch":
            await memory.publish_batch(*values, topic=topic, headers=headers)
        else:
            for value in values:
                await memory.publish(value, topic=topic, headers=headers)


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
    await published(desk.broker, value, b'{"prompt": "fine"}', topic="single")
    assert [request.prompt for request in desk.handled] == ["fine"]
    (letter,) = desk.letters
    assert letter.original_value() == value
    assert (letter.reason, letter.topic, letter.service) == (reason, "single", "desk")
    assert detail in letter.detail
    assert "secret" not in letter.detail


async def test_the_good_records_of_a_batch_are_handled(desk: Desk) -> None:
    await published(desk.broker, b'{"prompt": "one"}', b"{", b'{"prompt": "two"}', topic="batch")
    assert [request.prompt for request in desk.handled] == ["one", "two"]
    assert [letter.original_value() for letter in desk.letters] == [b"{"]


async def test_what_can_be_retried_is_no_poison(desk: Desk) -> None:
    with pytest.raises(RetryLaterError), quiet():
        await published(desk.broker, b'{"prompt": "wait"}', topic="single")
    assert desk.letters == []


async def test_content_never_reaches_the_logs(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    await published(desk.broker, b'{"prompt": "explode"}', b'{"prompt": 12345678}', topic="single")
    printed = capsys.readouterr()
    assert len(desk.letters) == 2
    for text in ("secret", "explode", "12345678"):
        assert text not in printed.out + printed.err
