"""Fixtures of the tests of a router's request consumer: one that works on stand-ins for Kafka."""

import pytest

from services.router.consumer import RequestConsumer
from tests.support.consumer import GroupProgressStandIn, Handled, KafkaConsumerStandIn, request_consumer


@pytest.fixture
def handled() -> Handled:
    return Handled()


@pytest.fixture
def progress() -> GroupProgressStandIn:
    return GroupProgressStandIn()


@pytest.fixture
def consumer() -> KafkaConsumerStandIn:
    return KafkaConsumerStandIn()


@pytest.fixture
def requests(handled: Handled, progress: GroupProgressStandIn, consumer: KafkaConsumerStandIn) -> RequestConsumer:
    return request_consumer(handled, progress, consumer)
