"""Publishes requests and cancellations to Kafka."""

import asyncio

from aiokafka.errors import KafkaError
from faststream.kafka import KafkaBroker
from pydantic_core import PydanticSerializationError

from services.gateway.errors import ApiError
from services.gateway.metrics import GatewayMetrics
from services.gateway.settings import GatewaySettings
from shared.kafka.publish import TOO_LARGE, Publisher, check_size, declare_publisher
from shared.lanes import LaneSettings
from shared.messages import Cancellation, GenerationRequest
from shared.runtime.clock import Clock
from shared.runtime.logs import get_logger
from shared.runtime.settings import KafkaSettings
from shared.topics import CANCELLATIONS, REQUESTS, requests_topic

_log = get_logger(__name__)


class RequestPublisher:
    """The gateway's publishers.

    Attributes:
        lane: topic of the requests of batches.
    """

    def __init__(
        self,
        broker: KafkaBroker,
        kafka: KafkaSettings,
        *,
        settings: GatewaySettings,
        clock: Clock,
        metrics: GatewayMetrics,
    ) -> None:
        self.lane = requests_topic(settings.batch_lane or LaneSettings().of_batches)
        self._requests = declare_publisher(broker, kafka, REQUESTS)
        self._lane = self._requests if self.lane is REQUESTS else declare_publisher(broker, kafka, self.lane)
        self._cancellations = declare_publisher(broker, kafka, CANCELLATIONS)
        self._timeout_s = settings.publish_timeout_s
        self._clock = clock
        self._metrics = metrics
        self._cancelling: set[asyncio.Task[None]] = set()

    async def publish(self, request: GenerationRequest) -> None:
        """Publish a request that a client waits for.

        Raises:
            ApiError: Kafka does not take it.
        """
        try:
            async with asyncio.timeout(self._timeout_s):
                await _send(self._requests, request)
        except PydanticSerializationError:
            raise ApiError(400, "a text is not valid Unicode: it has lone surrogates", code="invalid_value") from None
        except TOO_LARGE:
            raise ApiError(
                413, "the request is too large: shorten the prompt", param="messages", code="context_length_exceeded"
            ) from None
        except (KafkaError, TimeoutError):
            self.cancel_soon(request)  # Kafka may have it nevertheless
            raise ApiError.unavailable("Kafka does not take requests at the moment") from None

    async def publish_to_lane(self, request: GenerationRequest) -> None:
        """Publish a request of a batch.

        Raises:
            KafkaError, PydanticSerializationError: it could not be published.
        """
        await _send(self._lane, request)

    async def cancel(self, message: Cancellation) -> None:
        """Publish a cancellation.

        Raises:
            KafkaError: it could not be published.
        """
        await self._cancellations.publish(message, key=message.request_id.encode())

    def cancel_soon(self, request: GenerationRequest) -> None:
        """Cancel a request that nobody waits for any more, in the background."""
        task = asyncio.create_task(self._cancel(str(request.id)))
        self._cancelling.add(task)
        task.add_done_callback(self._cancelling.discard)
        self._metrics.cancelled.inc()

    async def _cancel(self, request_id: str) -> None:
        try:
            async with asyncio.timeout(self._timeout_s):
                await self.cancel(Cancellation(request_id=request_id, cancelled_at=self._clock.now()))
        except (KafkaError, TimeoutError) as error:
            _log.warning("a request could not be cancelled", error=type(error).__name__)


async def _send(publisher: Publisher, request: GenerationRequest) -> None:
    value, key = request.model_dump_json(exclude_defaults=True).encode(), str(request.id).encode()
    check_size(REQUESTS, value, key)
    await publisher.publish(value, key=key, headers={"content-type": "application/json"}, correlation_id=request.id)
