"""The gateway's messages: requests and cancellations to the routers, and the routers' replies.

The gateway reads one partition of `replies`. Each gateway claims a partition by an advisory lock in PostgreSQL, and its
requests name it. A gateway that has lost its lock may share the partition with another one: each drops the replies to
requests that are not its own.
"""

import asyncio
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import asyncpg
from aiokafka.errors import KafkaError
from asyncpg.pool import PoolConnectionProxy
from faststream.kafka import KafkaBroker
from pydantic_core import PydanticSerializationError

from services.gateway.errors import ApiError
from services.gateway.metrics import GatewayMetrics
from services.gateway.settings import GatewaySettings
from shared.kafka.publish import TOO_LARGE, Publisher, check_size, declare_publisher
from shared.messages import Cancellation, Decision, GenerationRequest, GenerationResponse, Reply, ResponseChunk
from shared.runtime.clock import Clock
from shared.runtime.database import translate_errors
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
        self.lane = requests_topic(settings.batch_lane)
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


class PendingAnswer:
    """The answer to one request, as far as it has arrived.

    Attributes:
        response: None until it has arrived.
        decision: None until a part has arrived.
        restarted: the router that began the answer failed, and another one began it again.
    """

    def __init__(self) -> None:
        self.response: GenerationResponse | None = None
        self.decision: Decision | None = None
        self.restarted = False
        self._pieces: deque[str] = deque()
        self._taken = 0
        self._stream: str | None = None
        self._next = 0
        self._arrived = asyncio.Event()

    def add(self, reply: Reply) -> None:
        """Add a part of the answer."""
        if reply.chunk is not None:
            self.decision = self.decision or reply.decision
            self._add_chunk(reply.chunk)
        elif self.response is None and reply.response is not None:
            self.response = reply.response
            self.decision = reply.response.decision or self.decision
        self._arrived.set()

    def wake(self) -> None:
        """End a wait although nothing has arrived."""
        self._arrived.set()

    def take_text(self) -> str:
        """The text that has arrived and was not taken yet; with the response, all that is left of it."""
        text = "".join(self._pieces)
        self._pieces.clear()
        if self.response is not None and self.response.status == "ok":
            text = (self.response.text or "")[self._taken :]
        self._taken += len(text)
        return text

    @property
    def began(self) -> bool:
        """Whether a part of the text was taken."""
        return self._taken > 0

    async def wait(self, seconds: float) -> bool:
        """Wait for the next part, or `wake`; returns whether either came since the last call."""
        try:
            async with asyncio.timeout(seconds):
                await self._arrived.wait()
        except TimeoutError:
            return False
        self._arrived.clear()
        return True

    def _add_chunk(self, chunk: ResponseChunk) -> None:
        if chunk.stream != self._stream:
            if self.began:
                self.restarted = True
                return
            self._pieces.clear()
            self._stream, self._next = chunk.stream, 0
        if chunk.sequence >= self._next:
            self._next = chunk.sequence + 1
            if chunk.text:
                self._pieces.append(chunk.text)


class ReplyInbox:
    """The requests that wait for replies, by request id."""

    def __init__(self) -> None:
        self._pending: dict[str, PendingAnswer] = {}

    def __len__(self) -> int:
        return len(self._pending)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._pending

    @contextmanager
    def expect(self, request_id: str) -> Iterator[PendingAnswer]:
        """Receive the replies to a request as long as the context is open."""
        pending = PendingAnswer()
        self._pending[request_id] = pending
        try:
            yield pending
        finally:
            del self._pending[request_id]

    def deliver(self, replies: Iterable[Reply]) -> None:
        """Hand over replies; those to requests that do not wait here are dropped."""
        for reply in replies:
            pending = self._pending.get(reply.request_id)
            if pending is not None:
                pending.add(reply)


async def claim_partition(
    connection: "PoolConnectionProxy[asyncpg.Record]", topic: str, partitions: Iterable[int]
) -> int | None:
    """Lock one of the partitions for as long as the connection lives; None if others hold all of them.

    Raises:
        DatabaseUnavailableError: PostgreSQL does not answer.
    """
    with translate_errors():
        for number in partitions:
            if await connection.fetchval("SELECT pg_try_advisory_lock(hashtext($1), $2)", topic, number):
                return number
    return None
