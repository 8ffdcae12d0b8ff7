"""`POST /evaluations`: a person, or a job, requests an evaluation now, regardless of the grid."""

import hmac
import json
from collections.abc import Awaitable, Callable, Iterable
from typing import Final
from urllib.parse import parse_qs

from faststream.asgi import AsgiResponse, HttpHandler, post
from faststream.asgi.types import Scope
from pydantic import SecretStr

from services.evaluator.scheduler import Scheduler
from shared.kafka.handling import RetryLaterError

OFF: Final = "requests for evaluations are off: set SPROUT_EVALUATOR_HTTP_TOKEN or SPROUT_EVALUATOR_HTTP_TOKEN_FILE"


def evaluation_endpoint(
    scheduler: Scheduler, *, token: SecretStr | None, obstacle: Callable[[str], Awaitable[str | None]]
) -> HttpHandler:
    """The handler of `POST /evaluations?model=NAME` with the header `Authorization: Bearer TOKEN`.

    It answers 202 only if this process will evaluate the model, as soon as there are samples and the model servers can
    be reached; 409 while there is an obstacle; 404 for an unknown model; 401 without the right token; 403 if none is
    configured; 503 without PostgreSQL. The request's body is not read.

    Args:
        token: None: requests are off.
        obstacle: why this process cannot evaluate a model now; None: it can. May raise `RetryLaterError`.
    """

    @post(description="Evaluate a model now; needs a bearer token")
    async def request_evaluation(scope: Scope) -> AsgiResponse:
        if token is None:
            return _error(403, OFF)
        if not is_authorised(scope["headers"], token):
            return _error(401, "send the header 'Authorization: Bearer TOKEN'", {"WWW-Authenticate": "Bearer"})
        (model, *_) = parse_qs(scope["query_string"].decode(errors="replace")).get("model", [""])
        if model not in scheduler.states:
            return _error(404, "set ?model= to the name of a model of the fleet file")
        try:
            problem = await obstacle(model)
        except RetryLaterError as error:
            return _error(503, f"{error}; try again")
        if problem is not None:
            return _error(409, problem)
        return _json(202, {"status": scheduler.request(model)})

    return request_evaluation


def is_authorised(headers: Iterable[tuple[bytes, bytes]], token: SecretStr) -> bool:
    """Whether the headers of a request have the token; compared in constant time."""
    value = next((value for name, value in headers if name.lower() == b"authorization"), b"")
    scheme, _, given = value.partition(b" ")
    return hmac.compare_digest(given.strip(), token.get_secret_value().encode()) and scheme.lower() == b"bearer"


def _error(status: int, message: str, headers: dict[str, str] | None = None) -> AsgiResponse:
    return _json(status, {"error": message}, headers)


def _json(status: int, body: dict[str, str], headers: dict[str, str] | None = None) -> AsgiResponse:
    return AsgiResponse(json.dumps(body).encode(), status, {"Content-Type": "application/json", **(headers or {})})
