"""Publishes responses, chunks, samples and dead letters with FastStream's publishers.

Every method returns once Kafka has the message and retries while Kafka is unreachable: a request whose response cannot
be published is not finished. Cancellation ends the retries.
"""

from typing import Any

from faststream.kafka import KafkaBroker

from services.router.fencing import RecordFence
from services.router.metrics import RouterMetrics
from services.router.tracing import Tracing
from shared.kafka.dead_letters import DeadLetterPublisher
from shared.kafka.publish import TOO_LARGE, Publisher, check_size, declare_publisher, publish_with_retry
from shared.kafka.records import PoisonMessageError
from shared.messages import ErrorDetail, GenerationResponse, Reply, ResponseChunk, Sample
from shared.runtime.logs import get_logger
from shared.runtime.settings import KafkaSettings
from shared.topics import REPLIES, RESPONSE_CHUNKS, RESPONSES, SAMPLES, SOURCE_HEADER, TopicSpec

_log = get_logger(__name__)


class RouterPublisher:
    """The router's publishers."""

    def __init__(
        self,
        broker: KafkaBroker,
        dead_letters: DeadLetterPublisher,
        *,
        kafka: KafkaSettings,
        metrics: RouterMetrics,
        tracing: Tracing,
    ) -> None:
        self._publishers: dict[str, Publisher] = {
            spec.name: declare_publisher(broker, kafka, spec) for spec in (RESPONSES, RESPONSE_CHUNKS, REPLIES, SAMPLES)
        }
        self._kafka = kafka
        self._dead_letters = dead_letters
        self._metrics = metrics
        self._tracing = tracing

    async def publish_response(self, response: GenerationResponse, fence: RecordFence) -> GenerationResponse:
        """Publish a response, whose size `limit_size` has checked.

        Returns:
            The published response: an error if the topic's limit is lower than its specification.
        """
        try:
            await self._publish_traced(RESPONSES, response, response.request_id, fence)
        except TOO_LARGE:
            response = _too_large(response)
            await self._publish_traced(RESPONSES, response, response.request_id, fence)
        self._tracing.answered(response)
        self._dead_letters.note_processed(fence.partition.topic)
        return response

    async def publish_chunk(self, chunk: ResponseChunk, fence: RecordFence | None = None) -> None:
        """Publish a chunk, without a span: there are many.

        Args:
            fence: for the final chunk, which no other router may publish as well.
        """
        await self._publish(RESPONSE_CHUNKS, chunk, chunk.request_id, self._tracing.headers(), fence)

    async def publish_reply(self, reply: Reply, partition: int) -> None:
        """Publish a part of an answer to the partition that its request names; without a span, as a chunk.

        No fence: whoever reads it drops a second answer.
        """
        try:
            await self._publish(REPLIES, reply, reply.request_id, self._tracing.headers(), None, partition=partition)
        except (*TOO_LARGE, AssertionError) as error:  # aiokafka asserts that the partition exists
            _log.warning("reply dropped", partition=partition, error=type(error).__name__)

    async def publish_sample(self, sample: Sample) -> None:
        """Publish a sample for the evaluator; one that is too large without the served answer is dropped."""
        try:
            await self._publish_traced(SAMPLES, sample, sample.group)
        except TOO_LARGE:
            if sample.served is not None:
                await self.publish_sample(sample.model_copy(update={"served": None}))
                return
            _log.warning("sample dropped: too large for its topic", request_id=sample.request_id)
            return
        self._metrics.samples.labels(sample.model).inc()

    async def publish_dead_letter(
        self,
        record: Any,  # noqa: ANN401 - aiokafka has no types
        error: PoisonMessageError,
        fence: RecordFence,
    ) -> None:
        """Publish a record that is not a valid request, unchanged, as a dead letter."""
        self._tracing.dead_lettered(error.reason)
        headers = {SOURCE_HEADER: fence.source.header}
        await publish_with_retry(
            lambda: fence.publish(lambda _: self._dead_letters.publish(record, error, headers=headers))
        )
        self._metrics.dead_letters.labels(error.reason).inc()

    async def _publish_traced(
        self, spec: TopicSpec, message: GenerationResponse | Sample, key: str, fence: RecordFence | None = None
    ) -> None:
        with self._tracing.sending(self._kafka.topic(spec)):
            headers = self._tracing.headers()
            if fence is not None:
                headers[SOURCE_HEADER] = fence.source.header
            await self._publish(spec, message, key, headers, fence)

    async def _publish(
        self,
        spec: TopicSpec,
        message: GenerationResponse | ResponseChunk | Reply | Sample,
        key: str,
        headers: dict[str, str],
        fence: RecordFence | None,
        *,
        partition: int | None = None,
    ) -> None:
        value, encoded_key = message.model_dump_json().encode(), key.encode("utf-8", errors="surrogatepass")
        correlation_id = message.request_id.encode("utf-8", errors="surrogatepass")
        check_size(
            spec, value, encoded_key, correlation_id, *(part.encode() for header in headers.items() for part in header)
        )
        headers = {"content-type": "application/json", **headers}

        async def send(at_ms: int | None = None) -> None:
            await self._publishers[spec.name].publish(
                value,
                key=encoded_key,
                headers=headers,
                correlation_id=message.request_id,
                timestamp_ms=at_ms,
                partition=partition,
            )

        # Every retry passes the fence again: the partition may have been lost since the last attempt.
        await publish_with_retry(send if fence is None else lambda: fence.publish(send))


def limit_size(response: GenerationResponse) -> GenerationResponse:
    """The response, or an error in its place if it is larger than the topic allows."""
    # Text and metadata make up nearly all of it: only a large response is serialized here once more.
    if len(response.text or "") + sum(map(len, response.metadata.values())) < RESPONSES.max_message_bytes / 16:
        return response
    try:
        check_size(RESPONSES, response.model_dump_json().encode(), response.request_id.encode(errors="surrogatepass"))
    except TOO_LARGE:
        return _too_large(response)
    return response


def _too_large(response: GenerationResponse) -> GenerationResponse:
    """An error in place of a response that is too large; keeps what the ledger needs."""
    return response.model_copy(
        update={
            "status": "error",
            "text": None,
            "metadata": {},
            "error": ErrorDetail(
                code="upstream_error",
                message="the response, including the request's 'metadata', is larger than the topic allows: request "
                "fewer tokens ('sampling.max_tokens') or send less metadata",
            ),
        }
    )
