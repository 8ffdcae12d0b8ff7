"""HTTP around the API: limits on what clients send, and metrics."""

import asyncio
from time import perf_counter
from typing import Final

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services.gateway.metrics import GatewayMetrics
from services.gateway.settings import GatewaySettings

UPLOADS: Final = "/v1/files"
"""The path whose bodies may be large; it limits them itself."""

ENDPOINTS: Final = ("/v1/chat/completions", "/v1/completions", "/v1/models", "/v1/files", "/v1/batches", "/v1/usage",
                    "/v1/footprints")  # fmt: skip
"""Prefixes of paths, as values of the label `endpoint`; other paths count as `other`."""


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
