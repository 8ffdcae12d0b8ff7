"""The HTTP API: chat completions, completions and models, in OpenAI's format."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Annotated, Any, Final

from aiokafka.errors import KafkaError
from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic_core import PydanticSerializationError
from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.responses import Response

from services.gateway.accounts import Accounts, Admission
from services.gateway.batch_runner import BatchRunner
from services.gateway.batch_store import BatchStore
from services.gateway.batches import batches_router
from services.gateway.errors import ApiError, add_handlers
from services.gateway.estimates import Estimates
from services.gateway.file_store import FileStore
from services.gateway.files import files_router
from services.gateway.keys import ApiKey, KeyStore
from services.gateway.metrics import GatewayMetrics
from services.gateway.replies import PendingAnswer, ReplyInbox
from services.gateway.schema import (
    ChatCompletion,
    ChatRequest,
    Completion,
    CompletionRequest,
    ErrorResponse,
    ModelCard,
    ModelList,
)
from services.gateway.settings import GatewaySettings
from services.gateway.translate import Answers, sprout_headers, sprout_usage, to_request, usage_of, wants_usage
from services.gateway.usage import usage_router
from shared.fleet import Fleet
from shared.kafka.publish import TOO_LARGE
from shared.messages import Cancellation, GenerationRequest, GenerationResponse
from shared.runtime.clock import Clock
from shared.runtime.database import DatabaseUnavailableError
from shared.runtime.logs import get_logger

DEADLINE_GRACE_S: Final = 15.0
"""Wall seconds after a request's deadline in which the router's answer may still arrive."""

SEND_GRACE_S: Final = 10.0
"""Wall seconds after `send_timeout_s` in which the kernel ends the connection itself."""

_ERRORS: Final[dict[int | str, dict[str, Any]]] = {
    status: {"model": ErrorResponse} for status in (400, 401, 404, 413, 429, 502, 503, 504)
}

_log = get_logger(__name__)


@dataclass(kw_only=True, slots=True)
class Gateway:
    """What the endpoints need; the parts that are None exist while the service runs.

    Attributes:
        publish, cancel: publish to Kafka.
        reply_partition: the partition of `replies` that this gateway reads.
    """

    fleet: Fleet
    settings: GatewaySettings
    clock: Clock
    inbox: ReplyInbox
    estimates: Estimates
    metrics: GatewayMetrics
    publish: Callable[[GenerationRequest], Awaitable[None]]
    cancel: Callable[[Cancellation], Awaitable[None]]
    keys: KeyStore | None = None
    accounts: Accounts | None = None
    files: FileStore | None = None
    batches: BatchStore | None = None
    batch_runner: BatchRunner | None = None
    reply_partition: int | None = None
    background: set[asyncio.Task[None]] = field(default_factory=set)

    def ready_accounts(self) -> Accounts:
        """The accounts.

        Raises:
            DatabaseUnavailableError: the gateway is not connected yet.
        """
        if self.accounts is None:
            raise DatabaseUnavailableError("the gateway is starting")
        return self.accounts

    async def authenticate(self, request: Request) -> ApiKey:
        """The key of a request.

        Raises:
            ApiError: there is none, it is wrong, or it cannot be checked.
        """
        if not self.settings.require_key:
            return ApiKey("anonymous", "anonymous", None)
        kind, _, secret = request.headers.get("authorization", "").partition(" ")
        challenge = {"www-authenticate": "Bearer"}
        if kind.lower() != "bearer" or not secret.strip():
            raise ApiError(
                401, "send your API key: 'Authorization: Bearer sk-sprout-...'", kind="authentication_error",
                code="missing_api_key", headers=challenge,
            )  # fmt: skip
        if self.keys is None:
            raise ApiError.unavailable("the gateway is starting")
        try:
            key = await self.keys.find(secret.strip())
        except DatabaseUnavailableError:
            raise ApiError.unavailable("API keys cannot be checked at the moment") from None
        if key is None:
            raise ApiError(
                401, "this API key does not exist or was revoked", kind="authentication_error", code="invalid_api_key",
                headers=challenge,
            )  # fmt: skip
        return key

    def opened_files(self) -> FileStore:
        """The files.

        Raises:
            ApiError: the gateway is starting.
        """
        if self.files is None:
            raise ApiError.unavailable("the gateway is starting")
        return self.files

    def opened_batches(self) -> tuple[FileStore, BatchStore]:
        """The files and the batches.

        Raises:
            ApiError: the gateway is starting.
        """
        if self.batches is None:
            raise ApiError.unavailable("the gateway is starting")
        return self.opened_files(), self.batches

    def batch_created(self) -> None:
        """Begin with a new batch at once."""
        if self.batch_runner is not None:
            self.batch_runner.wake()

    async def answer(self, body: ChatRequest | CompletionRequest, request: Request, key: ApiKey) -> Response:
        """Publish a request, and respond with its answer, whole or as a stream."""
        if self.reply_partition is None or self.accounts is None:
            raise ApiError.unavailable("the gateway is starting")
        if not self.fleet.pools_of(body.model):
            served = ", ".join(model.name for model in self.fleet.models)
            raise ApiError(
                404, f"the model {body.model!r} does not exist; available models: {served}", param="model",
                code="model_not_found",
            )  # fmt: skip
        if len(self.inbox) >= self.settings.max_open_requests:
            raise ApiError(
                429, "too many open requests", kind="rate_limit_error", code="rate_limit_exceeded",
                headers={"retry-after": "1"},
            )  # fmt: skip
        now = self.clock.now()
        message = to_request(
            body,
            headers=request.headers,
            tenant=key.tenant,
            reply_partition=self.reply_partition,
            deadline=now + timedelta(seconds=self.settings.deadline_s * self.clock.rate),
        )
        admission = await self.accounts.admit(key, message)
        answers = Answers(
            request_id=str(message.id),
            model=body.model,
            created=int(now.timestamp()),
            chat=isinstance(body, ChatRequest),
        )
        try:
            with ExitStack() as stack:
                pending = stack.enter_context(self.inbox.expect(str(message.id)))
                exchange = _Exchange(self, self.accounts, admission, pending, answers)
                stack.callback(exchange.finish)
                await exchange.publish()
                if not body.stream:
                    return await exchange.whole(request)
                # From here on the stream closes the exchange.
                exchange.keep = stack.pop_all()
            return await exchange.stream(include_usage=wants_usage(body))
        except ApiError as error:
            error.headers = admission.headers | error.headers
            raise

    def cancel_soon(self, message: GenerationRequest) -> None:
        """Publish a cancellation in the background: the client has left."""
        cancellation = Cancellation(request_id=str(message.id), cancelled_at=self.clock.now())
        task = asyncio.create_task(self._cancel(cancellation))
        self.background.add(task)
        task.add_done_callback(self.background.discard)
        self.metrics.cancelled.inc()

    async def _cancel(self, cancellation: Cancellation) -> None:
        try:
            async with asyncio.timeout(self.settings.publish_timeout_s):
                await self.cancel(cancellation)
        except (KafkaError, TimeoutError) as error:
            _log.warning("a request could not be cancelled", error=type(error).__name__)


@dataclass(slots=True)
class _Exchange:
    """One request and its answer.

    Attributes:
        keep: what is closed when the stream has ended.
    """

    gateway: Gateway
    accounts: Accounts
    admission: Admission
    pending: PendingAnswer
    answers: Answers
    keep: ExitStack = field(default_factory=ExitStack)
    finished: bool = False

    @property
    def message(self) -> GenerationRequest:
        """The request, as it is published."""
        return self.admission.request

    def finish(self) -> None:
        """Note that the request is over."""
        if self.finished:
            return
        self.finished = True
        response = self.pending.response
        if response is None:
            self.accounts.finish(self.admission, None)
            return
        estimates = self.gateway.estimates
        self.accounts.finish(
            self.admission,
            response,
            estimates.of(response.model, response.decision, response.usage) if response.usage else None,
            reference_g=estimates.reference_grams(response.model, response.decision),
        )

    async def free_place(self) -> None:
        """Finish the request before its client can know, so that its next request does not find its place taken."""
        self.finish()
        if self.admission.holds_place:
            await self.accounts.written()

    async def publish(self) -> None:
        """Publish the request.

        Raises:
            ApiError: Kafka does not take it.
        """
        try:
            async with asyncio.timeout(self.gateway.settings.publish_timeout_s):
                await self.gateway.publish(self.message)
        except PydanticSerializationError:
            raise ApiError(400, "a text is not valid Unicode: it has lone surrogates", code="invalid_value") from None
        except TOO_LARGE:
            raise ApiError(
                413, "the request is too large: shorten the prompt", param="messages", code="context_length_exceeded"
            ) from None
        except (KafkaError, TimeoutError):
            # Kafka may have it nevertheless.
            self.gateway.cancel_soon(self.message)
            raise ApiError.unavailable("Kafka does not take requests at the moment") from None

    async def whole(self, request: Request) -> Response:
        """The answer as one response; ends early if the client leaves."""
        gone = asyncio.create_task(_disconnected(request))
        arrived = asyncio.create_task(self._response())
        try:
            await asyncio.wait((gone, arrived), return_when=asyncio.FIRST_COMPLETED)
            if not arrived.done():
                self.gateway.cancel_soon(self.message)
                return Response(status_code=499)
            response = arrived.result()
        except asyncio.CancelledError:
            self.gateway.cancel_soon(self.message)
            raise
        finally:
            gone.cancel()
            arrived.cancel()
        await self.free_place()
        if response.error is not None:
            raise ApiError.of_response(response.error)
        estimate = self.gateway.estimates.of(response.model, response.decision, response.usage)
        content = self.answers.whole(response, estimate)
        headers = sprout_headers(usage_of(response, estimate).sprout) | self.admission.headers
        return JSONResponse(content.model_dump(mode="json"), headers=headers)

    async def stream(self, *, include_usage: bool) -> Response:
        """The answer as server-sent events."""
        settings, pending = self.gateway.settings, self.pending
        try:
            await pending.wait(settings.first_reply_wait_s)
        except BaseException:
            self.gateway.cancel_soon(self.message)
            self.keep.close()
            raise
        if pending.response is not None and pending.response.error is not None:
            self.keep.close()
            raise ApiError.of_response(pending.response.error)
        estimate = self.gateway.estimates.of(self.answers.model, pending.decision, None)
        return EventSourceResponse(
            self._events(include_usage=include_usage),
            headers=sprout_headers(sprout_usage(pending.decision, estimate)) | self.admission.headers,
            # Before the first part of the answer the events themselves contain comments.
            ping=int(max(1, settings.keep_alive_s)),
            ping_message_factory=lambda: ServerSentEvent(comment="waiting"),
            # For systems whose kernel does not end such connections, see `run_service`.
            send_timeout=settings.send_timeout_s + SEND_GRACE_S,
        )

    async def _events(self, *, include_usage: bool) -> AsyncIterator[str | dict[str, str]]:
        finished = False
        try:
            async for data in self._data(include_usage=include_usage):
                yield {"data": data}
            finished = True
            await self.free_place()
            yield {"data": "[DONE]"}
        finally:
            if not finished:
                self.gateway.cancel_soon(self.message)
            self.keep.close()

    async def _data(self, *, include_usage: bool) -> AsyncIterator[str]:
        """The data of all events but the last one."""
        pending, answers = self.pending, self.answers
        first = answers.first()
        if first is not None:
            yield first.to_json(include_usage=include_usage)
        while True:
            if text := pending.take_text():
                yield answers.piece(text).to_json(include_usage=include_usage)
            if (error := self._problem()) is not None:
                yield json.dumps({"error": error.body.model_dump()})
                return
            if pending.response is not None:
                break
            if not await pending.wait(self._patience_s()):
                self.gateway.cancel_soon(self.message)
                error = ApiError(504, "the answer did not go on in time", kind="timeout_error", code="timeout")
                yield json.dumps({"error": error.body.model_dump()})
                return
        yield answers.last(pending.response).to_json(include_usage=include_usage)
        if include_usage:
            response = pending.response
            estimate = self.gateway.estimates.of(response.model, response.decision, response.usage)
            yield answers.usage(response, estimate).to_json(include_usage=True)

    def _problem(self) -> ApiError | None:
        """Why the stream cannot go on."""
        if self.pending.response is not None and self.pending.response.error is not None:
            return ApiError.of_response(self.pending.response.error)
        if self.pending.restarted:
            self.gateway.cancel_soon(self.message)
            return ApiError(502, "the router failed in the middle of the answer: ask again", kind="upstream_error")
        return None

    def _patience_s(self) -> float:
        """How long the next part may take, wall seconds."""
        left_s = self.gateway.clock.wall_seconds_until(self.message.deadline or self.gateway.clock.now())
        until_deadline_s = max(0.0, left_s) + DEADLINE_GRACE_S
        return min(self.gateway.settings.silence_s, until_deadline_s) if self.pending.began else until_deadline_s

    async def _response(self) -> GenerationResponse:
        while self.pending.response is None:
            if not await self.pending.wait(self._patience_s()):
                self.gateway.cancel_soon(self.message)
                raise ApiError(504, "there was no answer in time", kind="timeout_error", code="timeout")
        return self.pending.response


async def _disconnected(request: Request) -> None:
    """Return when the client has left."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def build_api(gateway: Gateway, *, version: str, started_at: datetime) -> FastAPI:
    """The HTTP application.

    Args:
        started_at: given as the time at which the models were created.
    """
    api = FastAPI(
        title="Sprout gateway",
        version=version,
        description="An OpenAI-compatible API whose answers say how much carbon they took.",
        docs_url=None,
        redoc_url=None,
        openapi_url="/v1/openapi.json",
        responses=_ERRORS,
    )
    add_handlers(api)
    Key = Annotated[ApiKey, Depends(gateway.authenticate)]  # noqa: N806 - a type

    @api.post("/v1/chat/completions", response_model=ChatCompletion, tags=["answers"])
    async def chat_completions(body: ChatRequest, request: Request, key: Key) -> Response:
        """Answer a conversation."""
        return await gateway.answer(body, request, key)

    @api.post("/v1/completions", response_model=Completion, tags=["answers"])
    async def completions(body: CompletionRequest, request: Request, key: Key) -> Response:
        """Answer a prompt."""
        return await gateway.answer(body, request, key)

    @api.get("/v1/models", tags=["models"])
    async def models(key: Key) -> ModelList:  # noqa: ARG001
        """The models of the fleet."""
        return ModelList(data=tuple(_card(model.name, started_at) for model in gateway.fleet.models))

    @api.get("/v1/models/{model}", tags=["models"])
    async def model(model: str, key: Key) -> ModelCard:  # noqa: ARG001
        """A model of the fleet."""
        if not gateway.fleet.pools_of(model):
            raise ApiError(404, f"the model {model!r} does not exist", param="model", code="model_not_found")
        return _card(model, started_at)

    api.include_router(usage_router(gateway.authenticate, gateway.ready_accounts, gateway.clock))
    api.include_router(files_router(gateway.authenticate, gateway.opened_files, gateway.settings))
    api.include_router(batches_router(gateway.authenticate, gateway.opened_batches, gateway.batch_created))
    return api


def _card(model: str, created: datetime) -> ModelCard:
    return ModelCard(id=model, created=int(created.timestamp()))
