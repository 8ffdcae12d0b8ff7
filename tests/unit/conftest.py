"""Fixtures of the unit tests: a router's request consumer on stand-ins for Kafka, and attempts that follow at once."""

import pytest
import stamina

from services.router.consumer import RequestConsumer
from tests.support.consumer import GroupProgressStandIn, Handled, KafkaConsumerStandIn, request_consumer


@pytest.fixture(autouse=True, scope="session")
def _attempts_follow_at_once():
    """Without waits between attempts; their number stays."""
    with stamina.set_testing(True, attempts=1_000_000, cap=True):
        yield


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
