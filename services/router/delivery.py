"""Publishes what the router has to say, for as long as it takes."""

from typing import Any

from faststream.kafka import KafkaBroker

from services.router.metrics import RouterMetrics
from shared.dead_letters import DeadLetterOffice, PoisonMessageError
from shared.logs import get_logger
from shared.messages import ErrorDetail, GenerationResponse, ResponseChunk, Sample
from shared.publishing import TOO_LARGE, insist
from shared.settings import KafkaSettings
from shared.topics import RESPONSE_CHUNKS, RESPONSES, SAMPLES

_log = get_logger(__name__)


class Delivery:
    """The router's publishers. Every method returns once Kafka has the message.

    While Kafka is away they go on trying; a request whose answer cannot be published is not finished. Cancellation
    ends the attempt.
    """

    def __init__(
        self, broker: KafkaBroker, office: DeadLetterOffice, *, kafka: KafkaSettings, metrics: RouterMetrics
    ) -> None:
        self._responses = broker.publisher(kafka.topic(RESPONSES), description="Answers", schema=GenerationResponse)
        self._chunks = broker.publisher(
            kafka.topic(RESPONSE_CHUNKS), description="Pieces of streamed answers", schema=ResponseChunk
        )
        self._samples = broker.publisher(
            kafka.topic(SAMPLES), description="Prompts kept aside for the evaluator", schema=Sample
        )
        self._office = office
        self._metrics = metrics

    async def respond(self, response: GenerationResponse) -> GenerationResponse:
        """Publish an answer; returns what was published, an error if the answer was too large for the topic."""
        try:
            await self._send(self._responses, response, response.request_id)
        except TOO_LARGE:
            response = _without_bulk(response)
            await self._send(self._responses, response, response.request_id)
        return response

    async def chunk(self, chunk: ResponseChunk) -> None:
        """Publish a piece of an answer."""
        await self._send(self._chunks, chunk, chunk.request_id)

    async def sample(self, sample: Sample) -> None:
        """Publish a prompt for the evaluator; one that is too large is left out."""
        try:
            await self._send(self._samples, sample, sample.group)
        except TOO_LARGE:
            _log.warning("sample left out: too large for its topic", request_id=sample.request_id)
            return
        self._metrics.samples.labels(sample.model).inc()

    async def dead_letter(self, record: Any, error: PoisonMessageError) -> None:  # noqa: ANN401 - FastStream's record
        """Publish a message that is no request, as it came."""
        await insist(lambda: self._office.post(record, error))
        self._metrics.dead_letters.labels(error.reason).inc()

    @staticmethod
    async def _send(publisher: Any, message: GenerationResponse | ResponseChunk | Sample, key: str) -> None:  # noqa: ANN401
        encoded = key.encode("utf-8", errors="surrogatepass")
        await insist(lambda: publisher.publish(message, key=encoded))


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
