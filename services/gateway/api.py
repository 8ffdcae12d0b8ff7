"""The endpoints of the HTTP API: chat completions, completions and models, in OpenAI's format."""

from collections.abc import Awaitable, Callable
from datetime import datetime
from typing import Annotated, Any, Final

from fastapi import FastAPI, Request, Security
from fastapi.openapi.models import HTTPBearer
from fastapi.security.base import SecurityBase
from starlette.responses import Response

from services.gateway.batches import batches_router
from services.gateway.errors import ApiError, add_handlers
from services.gateway.files import files_router
from services.gateway.gateway import Gateway
from services.gateway.keys import ApiKey
from services.gateway.schema import (
    ChatCompletion,
    ChatRequest,
    Completion,
    CompletionRequest,
    ErrorResponse,
    ModelCard,
    ModelList,
)
from services.gateway.usage import usage_router

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


class KeySecurity(SecurityBase):
    """The dependency that gives the key of a request, as a security scheme: the OpenAPI document describes it."""

    def __init__(self, authenticate: Callable[[Request], Awaitable[ApiKey]]) -> None:
        """Describe what `authenticate` checks."""
        self.model = HTTPBearer(description="An API key: sk-sprout-...")
        self.scheme_name = "api_key"
        self._authenticate = authenticate

    async def __call__(self, request: Request) -> ApiKey:
        """The key of a request; see `Gateway.authenticate` for the errors."""
        return await self._authenticate(request)


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
        # Where OpenTelemetry is set up, it would also record the texts of errors, which may quote what a client sent.
        telemetry={"tracing": False, "metrics": False, "logs": False},
    )
    add_handlers(api)
    authenticate = KeySecurity(gateway.authenticate)
    Key = Annotated[ApiKey, Security(authenticate)]  # noqa: N806 - a type

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

    api.include_router(usage_router(authenticate, gateway.ready_accounts, gateway.clock))
    api.include_router(files_router(authenticate, gateway.opened_files, gateway.settings))
    api.include_router(batches_router(authenticate, gateway.opened_batches, gateway.batch_created))
    return api


def _card(model: str, created: datetime) -> ModelCard:
    return ModelCard(id=model, created=int(created.timestamp()))
