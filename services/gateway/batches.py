"""The HTTP API of batches, in OpenAI's format."""

import json
import re
from collections.abc import Awaitable, Callable
from datetime import datetime, timedelta
from typing import Annotated, Any, Final, Literal

from fastapi import APIRouter, Depends, Query, Request
from pydantic import BaseModel, Field, field_validator

from services.gateway.batch_lines import Endpoint
from services.gateway.batch_state import Status
from services.gateway.batch_store import Batch, BatchStore
from services.gateway.errors import ApiError
from services.gateway.file_store import PURPOSE, FileStore
from services.gateway.files import MAX_EXPIRY_S, MIN_EXPIRY_S, no_file, owner_of
from services.gateway.keys import ApiKey
from services.gateway.schema import OpenAIModel

MAX_WINDOW_S: Final = 86_400

_WINDOW: Final = re.compile(r"([1-9][0-9]{0,4})([smh])")
_SECONDS: Final = {"s": 1, "m": 60, "h": 3_600}


class OutputExpiry(OpenAIModel):
    """How long the output and error files are kept."""

    anchor: Literal["created_at"] = "created_at"
    seconds: int = Field(ge=MIN_EXPIRY_S, le=MAX_EXPIRY_S)


class BatchRequest(OpenAIModel):
    """Body of `POST /v1/batches`."""

    input_file_id: str = Field(min_length=1, max_length=256)
    endpoint: Endpoint
    completion_window: str = Field(
        description="Time for the batch, at most `24h`: a number with `s`, `m` or `h`", examples=["24h"]
    )
    metadata: dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]] | None = Field(
        default=None, max_length=16
    )
    output_expires_after: OutputExpiry | None = None

    @field_validator("completion_window")
    @classmethod
    def _within_a_day(cls, window: str) -> str:
        _seconds(window)
        return window

    @property
    def window(self) -> timedelta:
        """The time for the batch, event time."""
        return timedelta(seconds=_seconds(self.completion_window))


class BatchError(BaseModel):
    """Why a batch failed as a whole."""

    code: str
    message: str
    line: int | None = None
    param: str | None = None


class BatchErrors(BaseModel):
    """All of them."""

    object: Literal["list"] = "list"
    data: tuple[BatchError, ...]


class RequestCounts(BaseModel):
    """Lines of a batch; `total` is 0 until they are counted."""

    total: int
    completed: int
    failed: int


class BatchObject(BaseModel):
    """A batch."""

    id: str
    object: Literal["batch"] = "batch"
    endpoint: str
    errors: BatchErrors | None
    input_file_id: str
    completion_window: str
    status: Status
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    in_progress_at: int | None
    expires_at: int
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: RequestCounts
    metadata: dict[str, str] | None

    @classmethod
    def of(cls, batch: Batch) -> "BatchObject":
        """The object of a stored batch."""
        times: dict[str, Any] = {
            name: None if (at := getattr(batch, name)) is None else _unix(at)
            for name in cls.model_fields
            if name.endswith("_at")
        }
        return cls(
            id=batch.id,
            endpoint=batch.endpoint,
            errors=None if batch.problem is None else BatchErrors(data=(BatchError(**json.loads(batch.problem)),)),
            input_file_id=batch.input_file_id,
            completion_window=batch.completion_window,
            status=batch.status,
            output_file_id=batch.output_file_id,
            error_file_id=batch.error_file_id,
            request_counts=RequestCounts(total=batch.total, completed=batch.completed, failed=batch.failed),
            metadata=None if batch.metadata is None else json.loads(batch.metadata),
            **times,
        )


class BatchList(BaseModel):
    """Response of `GET /v1/batches`."""

    object: Literal["list"] = "list"
    data: tuple[BatchObject, ...]
    first_id: str | None
    last_id: str | None
    has_more: bool


def batches_router(
    authenticate: Callable[[Request], Awaitable[ApiKey]],
    opened: Callable[[], tuple[FileStore, BatchStore]],
    created: Callable[[], None],
) -> APIRouter:
    """The endpoints.

    Args:
        opened: returns the stores; raises `ApiError` while the gateway starts.
        created: called when there is a new batch.
    """
    router = APIRouter(prefix="/v1/batches", tags=["batches"])
    Key = Annotated[ApiKey, Depends(authenticate)]  # noqa: N806 - a type

    @router.post("")
    async def create_batch(body: BatchRequest, key: Key) -> BatchObject:
        """Answer every line of a file, at low priority."""
        files, batches = opened()
        owner = owner_of(key)
        file = await files.find(body.input_file_id, owner=owner)
        if file is None:
            raise no_file(body.input_file_id, param="input_file_id")
        if file.purpose != PURPOSE:
            raise ApiError(
                400, f"the purpose of the file is not {PURPOSE!r}", param="input_file_id", code="invalid_value"
            )
        batch = await batches.create(
            owner=owner,
            key_id=key.id,
            tenant=key.tenant,
            endpoint=body.endpoint,
            input_file_id=file.id,
            completion_window=body.completion_window,
            window=body.window,
            metadata=body.metadata,
            output_expires_s=None if body.output_expires_after is None else body.output_expires_after.seconds,
        )
        created()
        return BatchObject.of(batch)

    @router.get("")
    async def list_batches(
        key: Key, after: str | None = None, limit: Annotated[int, Query(ge=1, le=100)] = 20
    ) -> BatchList:
        """The batches of the tenant, the newest first."""
        _, batches = opened()
        owner = owner_of(key)
        last = None if after is None else await _find(batches, after, key, param="after")
        found = await batches.page(owner=owner, after=last, limit=limit + 1)
        page = tuple(BatchObject.of(one) for one in found[:limit])
        return BatchList(
            data=page,
            first_id=page[0].id if page else None,
            last_id=page[-1].id if page else None,
            has_more=len(found) > limit,
        )

    @router.get("/{batch_id}")
    async def retrieve_batch(batch_id: str, key: Key) -> BatchObject:
        """A batch."""
        _, batches = opened()
        return BatchObject.of(await _find(batches, batch_id, key))

    @router.post("/{batch_id}/cancel")
    async def cancel_batch(batch_id: str, key: Key) -> BatchObject:
        """Cancel a batch: its running requests end, and lines without an answer go to the error file."""
        _, batches = opened()
        batch = await _find(batches, batch_id, key)
        cancelled = await batches.cancel(batch)
        if cancelled is None:
            # The state may have changed since it was read.
            batch = await _find(batches, batch_id, key)
            cancelled = await batches.cancel(batch)
        if cancelled is None:
            raise ApiError(400, f"a batch that is {batch.status} cannot be cancelled", code="batch_not_cancellable")
        return BatchObject.of(cancelled)

    return router


async def _find(batches: BatchStore, batch_id: str, key: ApiKey, *, param: str = "id") -> Batch:
    batch = await batches.find(batch_id, owner=owner_of(key))
    if batch is None:
        raise ApiError(404, f"the batch {batch_id!r} does not exist", param=param, code="batch_not_found")
    return batch


def _seconds(window: str) -> int:
    match = _WINDOW.fullmatch(window)
    seconds = 0 if match is None else int(match[1]) * _SECONDS[match[2]]
    if not 0 < seconds <= MAX_WINDOW_S:
        raise ValueError("give at most 24h, as a number with s, m or h: 24h")
    return seconds


def _unix(at: datetime) -> int:
    return int(at.timestamp())
