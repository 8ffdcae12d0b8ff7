"""The same cases in memory and on real Kafka: a test that asks for `medium` runs once on each."""

import pytest

from shared.runtime.settings import KafkaSettings
from tests.support.contract import Medium


@pytest.fixture(params=["memory", pytest.param("kafka", marks=pytest.mark.integration)])
def medium(request: pytest.FixtureRequest) -> Medium:
    """No broker is started for the cases in memory."""
    if request.param == "memory":
        return Medium(KafkaSettings(), in_memory=True)
    return Medium(request.getfixturevalue("kafka"), in_memory=False)
