"""HTTP/1.1: uvicorn's fast parser, limits on what clients send, and metrics, around the API."""

import asyncio
from time import perf_counter
from typing import Final

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from services.gateway.metrics import GatewayMetrics
from services.gateway.settings import GatewaySettings

MAX_HEAD_BYTES: Final = 16_384
"""Of the request line and the headers together, and of anything else between bodies: as with uvicorn's other parser."""

UPLOADS: Final = "/v1/files"
"""The path whose bodies may be large; it limits them itself."""

ENDPOINTS: Final = ("/v1/chat/completions", "/v1/completions", "/v1/models", "/v1/files", "/v1/batches", "/v1/usage",
                    "/v1/footprints")  # fmt: skip
"""Prefixes of paths, as values of the label `endpoint`; other paths count as `other`."""


class HeadTooLargeError(Exception):
    """The headers of a request are larger than `MAX_HEAD_BYTES`."""


class BoundedHttp(HttpToolsProtocol):
    """Answers 400 and ends the connection when a client sends more than `MAX_HEAD_BYTES` that are no body.

    The parser has no such limit. It keeps what is incomplete and says nothing until it is complete, when it calls the
    methods `on_...` here; so the bytes that arrive without any progress are counted, and those of complete headers.
    What comes in one read with the end of something else is not: the limit is exceeded by one read at most.
    """

    _unfinished = 0
    """Bytes received since the parser last completed the headers, a part of the body, or the message."""

    _head = 0
    """Bytes of the headers of the present request, and of its trailers."""

    def data_received(self, data: bytes) -> None:
        """See asyncio."""
        self._unfinished += len(data)
        super().data_received(data)
        if self._unfinished > MAX_HEAD_BYTES and not self.transport.is_closing():
            self.send_400_response("The headers are too large.")

    def on_message_begin(self) -> None:
        """See httptools."""
        self._head = 0
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        """See httptools."""
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """See httptools."""
        self._count(len(name) + len(value))
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """See httptools."""
        self._unfinished = 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """See httptools."""
        self._unfinished = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """See httptools."""
        self._unfinished = 0
        super().on_message_complete()

    def _count(self, size: int) -> None:
        self._head += size
        if self._head > MAX_HEAD_BYTES:
            raise HeadTooLargeError  # the parser makes an error of it, as of anything malformed


class HttpLimits:
    """An ASGI application that limits the size of bodies and the time between their parts, and counts requests."""

    def __init__(self, app: ASGIApp, *, settings: GatewaySettings, metrics: GatewayMetrics) -> None:
        self._app = app
        self._settings = settings
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        path = scope["path"]
        endpoint = next((one for one in ENDPOINTS if path == one or path.startswith(one + "/")), "other")
        limit = None if path == UPLOADS else self._settings.max_body_bytes
        started_s = perf_counter()
        received, complete = 0, False

        async def limited_receive() -> Message:
            nonlocal received, complete
            if complete:  # then the next message says that the client has left
                return await receive()
            try:
                async with asyncio.timeout(self._settings.send_timeout_s):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(
                    408, "the rest of the body did not arrive in time", {"connection": "close"}
                ) from None
            received += len(message.get("body", b""))
            complete = not message.get("more_body", False)
            if limit is not None and received > limit:
                raise HTTPException(413, f"the body is larger than {limit} bytes: shorten it")
            return message

        async def counted_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._metrics.requests.labels(endpoint, str(message["status"])).inc()
                self._metrics.first_byte.labels(endpoint).observe(perf_counter() - started_s)
            if endpoint != UPLOADS:  # a stream of events limits this itself, and the kernel the rest
                await send(message)
                return
            async with asyncio.timeout(self._settings.send_timeout_s):
                await send(message)

        await self._app(scope, limited_receive, counted_send)
