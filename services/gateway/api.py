"""The endpoints of the HTTP API: chat completions, completions and models, in OpenAI's format.

`Gateway` is what the endpoints share: who asks, and how a request becomes an answer.
"""

from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Annotated, Any, Final

from fastapi import APIRouter, Depends, FastAPI, Request, Security
from fastapi.security import HTTPBearer
from starlette.responses import Response

from services.gateway.accounts import Accounts
from services.gateway.batch_runner import BatchRunner
from services.gateway.batch_store import BatchStore
from services.gateway.batches import batches_router
from services.gateway.errors import ApiError, add_handlers
from services.gateway.estimates import Estimates
from services.gateway.exchange import Exchange
from services.gateway.file_store import FileStore
from services.gateway.files import files_router
from services.gateway.keys import ApiKey, KeyStore
from services.gateway.messaging import ReplyInbox, RequestPublisher
from services.gateway.metrics import GatewayMetrics
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
from services.gateway.translate import Answers, to_request, wants_usage
from services.gateway.usage import usage_router
from shared.fleet import Fleet
from shared.runtime.clock import Clock
from shared.runtime.database import DatabaseUnavailableError

BEARER: Final = HTTPBearer(auto_error=False, scheme_name="api_key", description="An API key: sk-sprout-...")
"""Describes what `Gateway.authenticate` checks."""

_RETRY: Final = {
    "retry-after": {"description": "Seconds until it is worth trying again", "schema": {"type": "integer"}}
}

_LIMITS: Final = {
    f"x-ratelimit-{name}-{unit}": {"description": description.format(unit), "schema": {"type": kind}}
    for unit in ("requests", "tokens")
    for name, kind, description in (
        ("limit", "integer", "{} per minute that are allowed, if they are limited"),
        ("remaining", "integer", "{} that are left in this minute"),
        ("reset", "string", "Time until the next minute begins for {}: 12.345s"),
    )
} | {
    "x-sprout-budget-remaining-grams": {
        "description": "Grams of CO2 equivalent that are left of the month's budget, if there is one",
        "schema": {"type": "number"},
    }
}

_HEADERS: Final[dict[int, dict[str, Any]]] = {429: {**_RETRY, **_LIMITS}, 502: _RETRY, 503: _RETRY}

_ERRORS: Final[dict[int | str, dict[str, Any]]] = {
    status: {"model": ErrorResponse, "headers": _HEADERS.get(status, {})}
    for status in (400, 401, 404, 413, 429, 502, 503, 504)
}


@dataclass(kw_only=True, slots=True)
class Gateway:
    """What the endpoints need; the parts that are None exist while the service runs.

    Attributes:
        publisher: of requests and cancellations.
        reply_partition: the partition of `replies` that this gateway reads.
    """

    fleet: Fleet
    settings: GatewaySettings
    clock: Clock
    inbox: ReplyInbox
    estimates: Estimates
    metrics: GatewayMetrics
    publisher: RequestPublisher
    keys: KeyStore | None = None
    accounts: Accounts | None = None
    files: FileStore | None = None
    batches: BatchStore | None = None
    batch_runner: BatchRunner | None = None
    reply_partition: int | None = None

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
        if len(self.inbox) >= self.settings.max_open_requests:
            raise ApiError(
                429, "too many open requests", kind="rate_limit_error", code="rate_limit_exceeded",
                headers={"retry-after": "1"},
            )  # fmt: skip
        now = self.clock.now()
        message = to_request(
            body,
            headers=request.headers,
            fleet=self.fleet,
            tenant=key.tenant,
            reply_partition=self.reply_partition,
            now=now,
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
                exchange = Exchange(
                    publisher=self.publisher,
                    accounts=self.accounts,
                    estimates=self.estimates,
                    settings=self.settings,
                    clock=self.clock,
                    admission=admission,
                    pending=pending,
                    answers=answers,
                )
                stack.callback(exchange.finish)
                await self.publisher.publish(exchange.message)
                if not body.stream:
                    return await exchange.whole(request)
                # From here on the stream closes the exchange.
                exchange.keep = stack.pop_all()
            return await exchange.stream(include_usage=wants_usage(body))
        except ApiError as error:
            error.headers = admission.headers | error.headers
            raise


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
    secured = APIRouter(dependencies=[Security(BEARER)])
    Key = Annotated[ApiKey, Depends(gateway.authenticate)]  # noqa: N806 - a type

    @secured.post("/v1/chat/completions", response_model=ChatCompletion, tags=["answers"])
    async def chat_completions(body: ChatRequest, request: Request, key: Key) -> Response:
        """Answer a conversation."""
        return await gateway.answer(body, request, key)

    @secured.post("/v1/completions", response_model=Completion, tags=["answers"])
    async def completions(body: CompletionRequest, request: Request, key: Key) -> Response:
        """Answer a prompt."""
        return await gateway.answer(body, request, key)

    @secured.get("/v1/models", tags=["models"])
    async def models(key: Key) -> ModelList:  # noqa: ARG001
        """The models of the fleet."""
        return ModelList(data=tuple(_card(model.name, started_at) for model in gateway.fleet.models))

    @secured.get("/v1/models/{model}", tags=["models"])
    async def model(model: str, key: Key) -> ModelCard:  # noqa: ARG001
        """A model of the fleet."""
        if not gateway.fleet.pools_of(model):
            raise ApiError(404, f"the model {model!r} does not exist", param="model", code="model_not_found")
        return _card(model, started_at)

    secured.include_router(usage_router(gateway.authenticate, gateway.ready_accounts, gateway.clock))
    secured.include_router(files_router(gateway.authenticate, gateway.opened_files, gateway.settings))
    secured.include_router(batches_router(gateway.authenticate, gateway.opened_batches, gateway.batch_created))
    api.include_router(secured)
    return api


def _card(model: str, created: datetime) -> ModelCard:
    return ModelCard(id=model, created=int(created.timestamp()))
