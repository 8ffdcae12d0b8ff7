"""What carries the messages of a contract test: memory, or real Kafka."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from faststream.kafka import KafkaBroker, TestKafkaBroker

from shared.runtime.settings import KafkaSettings

PATIENCE_S = 15.0
PAUSE_S = 0.05


@dataclass(frozen=True, slots=True)
class Medium:
    """What carries the messages of a test."""

    kafka: KafkaSettings
    in_memory: bool

    @asynccontextmanager
    async def running(self, broker: KafkaBroker) -> AsyncIterator[None]:
        """The broker, with its subscribers at work."""
        if self.in_memory:
            async with TestKafkaBroker(broker):
                yield
            return
        await broker.start()
        try:
            yield
        finally:
            await broker.stop()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait, with a bound; in memory everything has already happened."""
        for _ in range(round(PATIENCE_S / PAUSE_S)):
            if condition():
                return
            await asyncio.sleep(PAUSE_S)
        raise AssertionError(f"it did not happen within {PATIENCE_S:g} s")
