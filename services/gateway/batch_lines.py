"""The lines of a batch's input file, and the lines of its output and error files, in OpenAI's format. Pure."""

import json
from codecs import BOM_UTF8
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Final, Literal, TypeVar

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import from_json

from services.gateway.errors import ApiError, of_validation
from services.gateway.schema import ChatRequest, CompletionRequest, ErrorResponse

MAX_CUSTOM_ID: Final = 512

Endpoint = Literal["/v1/chat/completions", "/v1/completions"]
Outcome = Literal["completed", "failed", "unfinished"]
Model = TypeVar("Model", bound=BaseModel)

_BODIES: Final[dict[str, type[ChatRequest | CompletionRequest]]] = {
    "/v1/chat/completions": ChatRequest,
    "/v1/completions": CompletionRequest,
}


@dataclass(frozen=True, slots=True)
class InputLine:
    """A line of an input file that is not blank.

    Attributes:
        number: from 1; blank lines count.
        content: None: the line is too long.
    """

    number: int
    content: bytes | None


class LineSplitter:
    """Splits a file that arrives in parts into its lines, and keeps at most one line of it."""

    def __init__(self, *, max_bytes: int) -> None:
        """Give lines of more than `max_bytes` without their content."""
        self._max_bytes = max_bytes
        self._number = 0
        self._rest = bytearray()
        self._too_long = False

    def feed(self, data: bytes) -> Iterator[InputLine]:
        """The lines that end in the next part of the file."""
        start = 0
        while (end := data.find(b"\n", start)) >= 0:
            self._add(data[start:end])
            start = end + 1
            yield from self._end_line()
        self._add(data[start:])

    def finish(self) -> Iterator[InputLine]:
        """The last line, if no newline ends it."""
        if self._rest or self._too_long:
            yield from self._end_line()

    def _add(self, data: bytes) -> None:
        if len(self._rest) + len(data) > self._max_bytes:
            self._too_long = True
            self._rest.clear()
        elif not self._too_long:
            self._rest += data

    def _end_line(self) -> Iterator[InputLine]:
        content, too_long = bytes(self._rest).strip(), self._too_long
        self._rest.clear()
        self._too_long = False
        self._number += 1
        if self._number == 1:
            content = content.removeprefix(BOM_UTF8)
        if content or too_long:
            yield InputLine(self._number, None if too_long else content)


class _Line(BaseModel):
    """What a line contains."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    custom_id: str = Field(min_length=1, max_length=MAX_CUSTOM_ID)
    method: Literal["POST"] = "POST"
    url: Endpoint
    body: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Task:
    """A valid line: what is to be answered."""

    number: int
    custom_id: str
    body: ChatRequest | CompletionRequest


@dataclass(frozen=True, slots=True)
class Result:
    """The result of a line: a line of the output file if it is completed, else of the error file.

    Attributes:
        document: JSON.
    """

    number: int
    outcome: Outcome
    document: str


class LineReader:
    """Checks the lines of a batch, in the order of the file."""

    def __init__(self, batch_id: str, endpoint: str) -> None:
        """Read the lines of a batch of this endpoint."""
        self._batch_id = batch_id
        self._endpoint = endpoint
        self._seen: set[bytes] = set()

    def read(self, line: InputLine) -> Task | Result:
        """What is to be answered, or the error in its place."""
        number = line.number
        try:
            content = _parse(line.content)
        except ApiError as error:
            return self._malformed(number, None, error)
        given = content.get("custom_id")
        custom_id = given[:MAX_CUSTOM_ID] if isinstance(given, str) else None
        try:
            parsed = _validated(_Line, content)
            self._check(parsed)
        except ApiError as error:
            return self._malformed(number, custom_id, error)
        try:
            return Task(number, parsed.custom_id, _body(parsed))
        except ApiError as error:
            return self.refused(number, parsed.custom_id, error)

    def request_id(self, number: int) -> str:
        """The request id of a line: the same whenever and by whichever gateway it is published."""
        return f"{self._batch_id}-{number}"

    def answered(self, task: Task, body: dict[str, Any]) -> Result:
        """The result of a line that was answered.

        Args:
            body: the answer, as the endpoint gives it.
        """
        return self._result(task.number, task.custom_id, "completed", response=self._response(task.number, 200, body))

    def refused(self, number: int, custom_id: str, error: ApiError) -> Result:
        """The result of a line that got an error as its answer."""
        body = ErrorResponse(error=error.body).model_dump()
        return self._result(number, custom_id, "failed", response=self._response(number, error.status, body))

    def unprocessed(
        self, number: int, custom_id: str | None, code: str, message: str, *, outcome: Outcome = "unfinished"
    ) -> Result:
        """The result of a line that was not answered at all."""
        error = {"code": code, "message": message, "line": number}
        return self._result(number, custom_id, outcome, error=error)

    def _check(self, line: _Line) -> None:
        if line.url != self._endpoint:
            raise ApiError(
                400, f"the batch is for {self._endpoint}, the line for {line.url}", code="mismatched_endpoint"
            )
        digest = blake2b(line.custom_id.encode("utf-8", errors="surrogatepass"), digest_size=16).digest()
        if digest in self._seen:
            raise ApiError(400, "its custom_id is that of an earlier line", code="duplicate_custom_id")
        self._seen.add(digest)

    def _malformed(self, number: int, custom_id: str | None, error: ApiError) -> Result:
        code, message = error.body.code or "invalid_request", f"line {number}: {error.body.message}"
        return self.unprocessed(number, custom_id, code, message, outcome="failed")

    def _response(self, number: int, status: int, body: dict[str, Any]) -> dict[str, Any]:
        return {"status_code": status, "request_id": self.request_id(number), "body": body}

    def _result(
        self,
        number: int,
        custom_id: str | None,
        outcome: Outcome,
        *,
        response: dict[str, Any] | None = None,
        error: dict[str, Any] | None = None,
    ) -> Result:
        name = f"batch_req_{self._batch_id.removeprefix('batch_')}_{number}"
        document = {"id": name, "custom_id": custom_id, "response": response, "error": error}
        return Result(number, outcome, json.dumps(document, separators=(",", ":")))


def _parse(content: bytes | None) -> dict[str, Any]:
    if content is None:
        raise ApiError(400, "it is too long", code="line_too_long")
    try:
        parsed = from_json(content, allow_inf_nan=False)
    except ValueError:
        raise ApiError(400, "it is not valid JSON", code="invalid_json_line") from None
    if not isinstance(parsed, dict):
        raise ApiError(400, "it is not a JSON object", code="invalid_json_line")
    return parsed


def _body(line: _Line) -> ChatRequest | CompletionRequest:
    body = _validated(_BODIES[line.url], line.body)
    if body.stream:
        raise ApiError(400, "a batch has no streams: leave out 'stream'", param="stream", code="unsupported_parameter")
    return body


def _validated(model: type[Model], content: dict[str, Any]) -> Model:
    try:
        return model.model_validate(content)
    except ValidationError as error:
        problems = error.errors(include_url=False, include_input=False)
        raise of_validation(
            RequestValidationError([{**one, "loc": ("body", *one["loc"])} for one in problems])
        ) from None
