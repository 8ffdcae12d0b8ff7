"""The HTTP API of files, in OpenAI's format."""

from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Annotated, Any, Final, Literal

import asyncpg
from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import StreamingResponse
from pydantic import BaseModel
from starlette.requests import ClientDisconnect

from services.gateway.errors import ApiError
from services.gateway.file_store import PURPOSE, UPLOAD_S, FileStore, FileWriter, StoredFile
from services.gateway.keys import ApiKey
from services.gateway.settings import GatewaySettings
from services.gateway.uploads import Upload
from shared.runtime.database import DatabaseUnavailableError

MIN_EXPIRY_S: Final = 3_600
MAX_EXPIRY_S: Final = 2_592_000
"""Limits of `expires_after`, as OpenAI's."""

_FORM: Final[dict[str, Any]] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        "purpose": {"type": "string", "enum": [PURPOSE]},
                        "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
                        "expires_after[seconds]": {"type": "integer", "minimum": MIN_EXPIRY_S, "maximum": MAX_EXPIRY_S},
                    },
                }
            }
        },
    }
}


class FileObject(BaseModel):
    """A file, without its content."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    expires_at: int
    filename: str
    purpose: str
    status: Literal["processed"] = "processed"

    @classmethod
    def of(cls, file: StoredFile) -> "FileObject":
        """The object of a stored file."""
        return cls(
            id=file.id,
            bytes=file.bytes,
            created_at=int(file.created_at.timestamp()),
            expires_at=int(file.expires_at.timestamp()),
            filename=file.filename,
            purpose=file.purpose,
        )


class FileList(BaseModel):
    """Response of `GET /v1/files`."""

    object: Literal["list"] = "list"
    data: tuple[FileObject, ...]
    first_id: str | None
    last_id: str | None
    has_more: bool


class DeletedFile(BaseModel):
    """Response of `DELETE /v1/files/{id}`."""

    id: str
    object: Literal["file"] = "file"
    deleted: Literal[True] = True


def owner_of(key: ApiKey) -> str:
    """Whom the files and batches of a key belong to: its tenant, or the key if it has none."""
    return f"key {key.id}" if key.tenant is None else f"tenant {key.tenant}"


def no_file(file_id: str, *, param: str = "id") -> ApiError:
    """The error of a file that does not exist, or belongs to others."""
    return ApiError(404, f"the file {file_id!r} does not exist", param=param, code="file_not_found")


def files_router(
    authenticate: Callable[[Request], Awaitable[ApiKey]],
    opened: Callable[[], FileStore],
    settings: GatewaySettings,
) -> APIRouter:
    """The endpoints.

    Args:
        opened: returns the store; raises `ApiError` while the gateway starts.
    """
    router = APIRouter(prefix="/v1/files", tags=["files"])
    Key = Annotated[ApiKey, Depends(authenticate)]  # noqa: N806 - a type

    @router.post("", openapi_extra=_FORM)
    async def upload_file(request: Request, key: Key) -> FileObject:
        """Upload the input of a batch: one JSON object per line."""
        return await _store(request, opened(), key, settings)

    @router.get("")
    async def list_files(
        key: Key,
        purpose: str | None = None,
        after: str | None = None,
        limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
        order: Literal["asc", "desc"] = "desc",
    ) -> FileList:
        """The files of the tenant, the newest first."""
        store, owner = opened(), owner_of(key)
        last = None
        if after is not None and (last := await store.find(after, owner=owner)) is None:
            raise no_file(after, param="after")
        found = await store.page(
            owner=owner, purpose=purpose, after=last, limit=limit + 1, newest_first=order == "desc"
        )
        page = tuple(FileObject.of(one) for one in found[:limit])
        return FileList(
            data=page,
            first_id=page[0].id if page else None,
            last_id=page[-1].id if page else None,
            has_more=len(found) > limit,
        )

    @router.get("/{file_id}")
    async def retrieve_file(file_id: str, key: Key) -> FileObject:
        """A file, without its content."""
        return FileObject.of(await _find(opened(), file_id, key))

    @router.get("/{file_id}/content", response_class=StreamingResponse)
    async def file_content(file_id: str, key: Key) -> StreamingResponse:
        """The content of a file."""
        store = opened()
        file = await _find(store, file_id, key)
        headers = {"content-length": str(file.bytes)}
        return StreamingResponse(store.content(file_id), media_type="application/octet-stream", headers=headers)

    @router.delete("/{file_id}")
    async def delete_file(file_id: str, key: Key) -> DeletedFile:
        """Remove a file that no running batch reads."""
        store = opened()
        await _find(store, file_id, key)
        if await store.is_in_use(file_id):
            raise ApiError(400, "a batch reads this file: cancel it, or wait for its end", code="file_in_use")
        await store.delete(file_id)
        return DeletedFile(id=file_id)

    return router


async def _find(store: FileStore, file_id: str, key: ApiKey) -> StoredFile:
    file = await store.find(file_id, owner=owner_of(key))
    if file is None:
        raise no_file(file_id)
    return file


async def _store(request: Request, store: FileStore, key: ApiKey, settings: GatewaySettings) -> FileObject:
    """Write an upload to the store as it arrives."""
    owner = owner_of(key)
    upload = Upload(request.headers.get("content-type", ""))
    if await store.stored_bytes(owner) >= settings.max_stored_bytes:
        raise ApiError(413, "your files take all the space that you have: delete some", code="storage_limit_exceeded")
    now, writer = store.clock.now(), FileWriter(store.pool)
    begun = False
    try:
        async for piece in request.stream():
            upload.feed(piece)
            if upload.filename is not None and not begun:
                until = now + timedelta(seconds=UPLOAD_S * store.clock.rate)
                with store.status.watch():
                    await writer.begin(
                        owner=owner,
                        tenant=key.tenant,
                        filename=upload.filename,
                        purpose=PURPOSE,
                        created_at=now,
                        until=until,
                    )
                begun = True
            with store.status.watch():
                await writer.write(upload.take())
            _check_size(writer.bytes, settings.max_file_bytes)
        lifetime_s = _check(upload, begun=begun)
        until = now + timedelta(seconds=min(lifetime_s, settings.file_retention_days * 86_400))
        with store.status.watch():
            await writer.complete(until)
    except asyncpg.ForeignKeyViolationError:
        raise ApiError(408, "the upload took too long", kind="timeout_error", code="timeout") from None
    except BaseException as error:
        if begun:
            await _discard(store, writer.id)
        if isinstance(error, ClientDisconnect):
            raise ApiError(499, "the client has left", kind="cancelled") from None
        raise
    file = StoredFile(writer.id, upload.filename or "", PURPOSE, writer.bytes, now, until)
    return FileObject.of(file)


def _check_size(size: int, limit: int) -> None:
    if size > limit:
        raise ApiError(413, f"the file is larger than {limit} bytes: split it", param="file", code="file_too_large")


def _check(upload: Upload, *, begun: bool) -> float:
    """Check the form at its end; returns how long the file is kept, event seconds.

    Raises:
        ApiError: the form is incomplete or asks for something else.
    """
    if not upload.ended:
        raise ApiError(400, "the body ends before the end of the form", code="invalid_form")
    if not begun:
        raise ApiError(400, "missing parameter 'file'", param="file", code="missing_required_parameter")
    fields = upload.fields()
    unknown = fields.keys() - {"purpose", "expires_after[anchor]", "expires_after[seconds]"}
    if unknown:
        name = min(unknown)
        raise ApiError(400, f"unknown parameter {name!r}", param=name, code="unknown_parameter")
    if fields.get("purpose") != PURPOSE:
        raise ApiError(400, f"the only purpose is {PURPOSE!r}", param="purpose", code="invalid_value")
    if fields.get("expires_after[anchor]", "created_at") != "created_at":
        raise ApiError(400, "the only anchor is 'created_at'", param="expires_after[anchor]", code="invalid_value")
    seconds = fields.get("expires_after[seconds]", str(MAX_EXPIRY_S))
    number = int(seconds) if seconds.isascii() and seconds.isdecimal() and len(seconds) < 12 else 0
    if not MIN_EXPIRY_S <= number <= MAX_EXPIRY_S:
        raise ApiError(
            400, f"between {MIN_EXPIRY_S} and {MAX_EXPIRY_S} seconds", param="expires_after[seconds]",
            code="invalid_value",
        )  # fmt: skip
    return float(number) if "expires_after[seconds]" in fields else float("inf")


async def _discard(store: FileStore, file_id: str) -> None:
    """Remove what was written of a failed upload; while PostgreSQL is unavailable, it is removed later as expired."""
    try:
        await store.delete(file_id)
    except DatabaseUnavailableError:
        return
