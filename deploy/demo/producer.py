"""Publishes the planned requests at their event times, as any producer would."""

import asyncio
from collections.abc import Sequence

from aiokafka import AIOKafkaProducer

from deploy.demo.traffic import PlannedRequest
from shared.messages import GenerationRequest, SamplingParameters
from shared.runtime.clock import Clock
from shared.runtime.settings import KafkaSettings
from shared.topics import REQUESTS


class Producer:
    """Sends a plan; `sent` counts what Kafka has acknowledged."""

    def __init__(self, kafka: KafkaSettings, clock: Clock, *, model: str, max_tokens: int) -> None:
        self._kafka = kafka
        self._clock = clock
        self._model = model
        self._sampling = SamplingParameters(max_tokens=max_tokens)
        self.sent = 0

    async def send(self, plan: Sequence[PlannedRequest]) -> None:
        """Send every request when its time comes; returns once Kafka has acknowledged all.

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
            task=planned.task,
            sampling=self._sampling,
            requested_at=planned.at,
        )
        return request.model_dump_json(exclude_none=True).encode()

    def _acknowledged(self, future: "asyncio.Future[object]") -> None:
        if not future.cancelled() and future.exception() is None:
            self.sent += 1
