"""Errors in OpenAI's format, and the status of each."""

from collections.abc import Mapping
from typing import Final

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from services.gateway.schema import ErrorBody, ErrorResponse
from shared.messages import ErrorDetail
from shared.runtime.database import DatabaseUnavailableError

RETRY_AFTER_S: Final = 2
"""What `retry-after` advises where nothing better is known."""

MAX_TEXT: Final = 1_000
"""Characters of a message or a parameter's name."""

_OF_RESPONSE: Final[Mapping[str, tuple[int, str, str | None]]] = {
    "deadline_exceeded": (504, "timeout_error", None),
    "unknown_model": (404, "invalid_request_error", "model"),
    "unknown_level": (400, "invalid_request_error", "directive"),
    "prompt_too_large": (413, "invalid_request_error", "messages"),
    "no_endpoint": (503, "service_unavailable_error", None),
    "upstream_error": (502, "upstream_error", None),
    "invalid_request": (400, "invalid_request_error", None),
    "cancelled": (499, "cancelled", None),
}
"""Status, type and parameter by the code of a response's error."""

_OF_STATUS: Final[Mapping[int, tuple[str, str | None]]] = {
    401: ("authentication_error", None),
    403: ("permission_error", None),
    404: ("invalid_request_error", "not_found"),
    405: ("invalid_request_error", "method_not_allowed"),
    408: ("timeout_error", "timeout"),
    413: ("invalid_request_error", "request_too_large"),
}
"""Type and code of what is refused before an endpoint has it."""

_CODES: Final = {"unknown_model": "model_not_found", "prompt_too_large": "context_length_exceeded"}


class ApiError(Exception):
    """A request that gets an error response.

    Attributes:
        status: HTTP status.
        headers: of the response, for example `retry-after`.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = dict(headers or {})
        self.body = ErrorBody(message=_text(message), type=kind, param=param and _text(param), code=code)

    @classmethod
    def of_response(cls, error: ErrorDetail) -> "ApiError":
        """The error of a response of the router."""
        status, kind, param = _OF_RESPONSE.get(error.code, (502, "upstream_error", None))
        headers = {"retry-after": str(RETRY_AFTER_S)} if status in {502, 503} else {}
        code = _CODES.get(error.code, error.code)
        return cls(status, error.message, kind=kind, param=param, code=code, headers=headers)

    @classmethod
    def unavailable(cls, message: str) -> "ApiError":
        """Something that the gateway needs is unavailable."""
        headers = {"retry-after": str(RETRY_AFTER_S)}
        return cls(503, message, kind="service_unavailable_error", code="service_unavailable", headers=headers)

    def response(self) -> JSONResponse:
        """The HTTP response."""
        return JSONResponse(ErrorResponse(error=self.body).model_dump(), self.status, self.headers)


def add_handlers(api: FastAPI) -> None:
    """Answer every error in OpenAI's format."""

    @api.exception_handler(ApiError)
    async def on_api_error(request: Request, error: ApiError) -> JSONResponse:  # noqa: ARG001
        return error.response()

    @api.exception_handler(DatabaseUnavailableError)
    async def on_database(request: Request, error: DatabaseUnavailableError) -> JSONResponse:  # noqa: ARG001
        return ApiError.unavailable("PostgreSQL does not answer at the moment").response()

    @api.exception_handler(RequestValidationError)
    async def on_invalid(request: Request, error: RequestValidationError) -> JSONResponse:  # noqa: ARG001
        return of_validation(error).response()

    @api.exception_handler(HTTPException)
    async def on_http_error(request: Request, error: HTTPException) -> JSONResponse:  # noqa: ARG001
        kind, code = _OF_STATUS.get(error.status_code, ("invalid_request_error", None))
        return ApiError(error.status_code, str(error.detail), kind=kind, code=code, headers=error.headers).response()

    @api.exception_handler(Exception)
    async def on_defect(request: Request, error: Exception) -> JSONResponse:  # noqa: ARG001
        # The server logs it.
        return ApiError(
            500, "the gateway failed on this request", kind="server_error", code="internal_error"
        ).response()


def of_validation(error: RequestValidationError) -> ApiError:
    """The first problem of an invalid body, with its field; quotes nothing of the content."""
    problem = error.errors()[0]
    kind, message = str(problem["type"]), str(problem["msg"]).removeprefix("Value error, ")
    if kind == "json_invalid":
        return ApiError(400, "the body is not valid JSON", code="invalid_json")
    param = ".".join(str(part) for part in problem["loc"][1:] if not _is_variant(part)) or None
    name = f"'{param}'" if param else "the request"
    if kind == "extra_forbidden":
        return ApiError(400, f"unknown parameter {name}", param=param, code="unknown_parameter")
    if kind == "missing":
        return ApiError(400, f"missing parameter {name}", param=param, code="missing_required_parameter")
    if message == "is not supported":
        return ApiError(400, f"parameter {name} is not supported", param=param, code="unsupported_parameter")
    return ApiError(400, f"parameter {name}: {message}", param=param, code="invalid_value")


def _text(text: str) -> str:
    """A text that names what the client sent: not too long, and valid Unicode."""
    return text[:MAX_TEXT].encode("utf-8", "replace").decode()


def _is_variant(part: object) -> bool:
    """Whether a part of a location names a variant of a union, which is no field."""
    return isinstance(part, str) and (part in {"str", "body"} or "[" in part)
