"""Publishes what the router has to say, for as long as it takes."""

from typing import Any

from faststream.kafka import KafkaBroker

from services.router.gate import Passage
from services.router.metrics import RouterMetrics
from services.router.recovery import SOURCE_HEADER
from services.router.tracing import Tracing
from shared.kafka.dead_letters import DeadLetterPublisher, PoisonMessageError
from shared.kafka.publish import TOO_LARGE, check_size, declare_publisher, publish_with_retry
from shared.messages import ErrorDetail, GenerationResponse, ResponseChunk, Sample
from shared.runtime.logs import get_logger
from shared.runtime.settings import KafkaSettings
from shared.topics import RESPONSE_CHUNKS, RESPONSES, SAMPLES, TopicSpec

_log = get_logger(__name__)


class Delivery:
    """The router's publishers. Every method returns once Kafka has the message.

    While Kafka is away they go on trying; a request whose answer cannot be published is not finished. Cancellation
    ends the attempt.
    """

    def __init__(
        self,
        broker: KafkaBroker,
        dead_letters: DeadLetterPublisher,
        *,
        kafka: KafkaSettings,
        metrics: RouterMetrics,
        tracing: Tracing | None = None,
    ) -> None:
        self._kafka = kafka
        self._publishers = {
            spec.name: declare_publisher(broker, kafka, spec) for spec in (RESPONSES, RESPONSE_CHUNKS, SAMPLES)
        }
        self._dead_letters = dead_letters
        self._metrics = metrics
        self._tracing = tracing

    async def respond(self, response: GenerationResponse, passage: Passage) -> GenerationResponse:
        """Publish an answer, which `fitting` has seen.

        Returns:
            What was published: an error in its place where the topic was made to take less than it should.
        """
        try:
            await self._send(RESPONSES, response, response.request_id, passage)
        except TOO_LARGE:
            response = _without_bulk(response)
            await self._send(RESPONSES, response, response.request_id, passage)
        if self._tracing is not None:
            self._tracing.answered(response)
        return response

    async def chunk(self, chunk: ResponseChunk, passage: Passage | None = None) -> None:
        """Publish a piece of an answer; no span, there are many.

        Args:
            passage: for the last one, which nobody else may publish too.
        """
        headers = {} if self._tracing is None else self._tracing.headers()
        await self._publish(RESPONSE_CHUNKS, chunk, chunk.request_id, headers, passage)

    async def sample(self, sample: Sample) -> None:
        """Publish a prompt for the evaluator; one that is too large is left out."""
        try:
            await self._send(SAMPLES, sample, sample.group)
        except TOO_LARGE:
            _log.warning("sample left out: too large for its topic", request_id=sample.request_id)
            return
        self._metrics.samples.labels(sample.model).inc()

    async def dead_letter(
        self,
        record: Any,  # noqa: ANN401 - FastStream's record
        error: PoisonMessageError,
        passage: Passage,
    ) -> None:
        """Publish a message that is no request, as it came."""
        if self._tracing is not None:
            self._tracing.refused(error.reason)
        headers = {SOURCE_HEADER: passage.source}
        await publish_with_retry(
            lambda: passage.through(lambda: self._dead_letters.publish(record, error, headers=headers))
        )
        self._metrics.dead_letters.labels(error.reason).inc()

    async def _send(
        self, spec: TopicSpec, message: GenerationResponse | Sample, key: str, passage: Passage | None = None
    ) -> None:
        source = {} if passage is None else {SOURCE_HEADER: passage.source}
        if self._tracing is None:
            await self._publish(spec, message, key, source, passage)
        else:
            with self._tracing.sending(self._kafka.topic(spec)) as headers:
                await self._publish(spec, message, key, headers | source, passage)

    async def _publish(
        self,
        spec: TopicSpec,
        message: GenerationResponse | ResponseChunk | Sample,
        key: str,
        headers: dict[str, str],
        passage: Passage | None,
    ) -> None:
        value, encoded = message.model_dump_json().encode(), key.encode("utf-8", errors="surrogatepass")
        check_size(spec, value, encoded, *(part.encode() for header in headers.items() for part in header))
        headers = {"content-type": "application/json", **headers}
        publisher = self._publishers[spec.name]

        async def publish() -> None:
            await publisher.publish(value, key=encoded, headers=headers)

        # Every attempt passes the gate again: much may have happened since the one before.
        await publish_with_retry(publish if passage is None else lambda: passage.through(publish))


def fitting(response: GenerationResponse) -> GenerationResponse:
    """The answer, or an error in its place where it is larger than the topic takes."""
    # What producers choose, text and metadata, makes nearly all of it: an answer is written out twice only if large.
    if len(response.text or "") + sum(map(len, response.metadata.values())) < RESPONSES.max_message_bytes / 16:
        return response
    try:
        check_size(RESPONSES, response.model_dump_json().encode(), response.request_id.encode(errors="surrogatepass"))
    except TOO_LARGE:
        return _without_bulk(response)
    return response


def _without_bulk(response: GenerationResponse) -> GenerationResponse:
    """An error in place of an answer that the topic does not take; keeps all that accounting needs."""
    return response.model_copy(
        update={
            "status": "error",
            "text": None,
            "metadata": {},
            "error": ErrorDetail(
                code="upstream_error",
                message="the answer, with the request's 'metadata', is larger than the topic allows: ask for fewer "
                "tokens ('sampling.max_tokens') or send less metadata",
            ),
        }
    )
