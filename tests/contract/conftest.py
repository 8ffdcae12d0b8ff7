"""Contract tests run in memory and on real Kafka: once for each value of the fixture `medium`."""

import pytest

from shared.runtime.settings import KafkaSettings
from tests.support.contract import Medium


@pytest.fixture(params=["memory", pytest.param("kafka", marks=pytest.mark.integration)])
def medium(request: pytest.FixtureRequest) -> Medium:
    """What carries the messages; Kafka is started only if needed."""
    if request.param == "memory":
        return Medium(KafkaSettings(), in_memory=True)
    return Medium(request.getfixturevalue("kafka"), in_memory=False)
