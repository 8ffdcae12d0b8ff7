"""One request of a client and its answer: published to Kafka, answered as a whole or as server-sent events."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Final

from fastapi import Request
from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.responses import Response

from services.gateway.accounts import Accounts
from services.gateway.admission import Admission
from services.gateway.errors import ApiError
from services.gateway.estimates import Estimates
from services.gateway.messaging import PendingAnswer, RequestPublisher
from services.gateway.settings import GatewaySettings
from services.gateway.translate import Answers, sprout_headers, sprout_usage
from shared.messages import GenerationRequest, GenerationResponse
from shared.runtime.clock import Clock

DEADLINE_GRACE_S: Final = 15.0
"""Wall seconds after a request's deadline in which the router's answer may still arrive."""

SEND_GRACE_S: Final = 10.0
"""Wall seconds after `send_timeout_s` in which the kernel ends the connection itself."""


@dataclass(slots=True, kw_only=True)
class Exchange:
    """One request and its answer.

    Attributes:
        keep: what is closed when the stream has ended.
    """

    publisher: RequestPublisher
    accounts: Accounts
    estimates: Estimates
    settings: GatewaySettings
    clock: Clock
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
        if self.pending.response is None:
            self.accounts.finish(self.admission, None)
        else:
            self.accounts.answered(self.admission, self.pending.response, self.estimates)

    async def free_place(self) -> None:
        """Finish the request before its client can know, so that its next request does not find its place taken."""
        self.finish()
        if self.admission.holds_place:
            await self.accounts.written()

    async def whole(self, request: Request) -> Response:
        """The answer as one response; ends early if the client leaves."""
        gone = asyncio.create_task(_disconnected(request))
        gone.add_done_callback(lambda _: self.pending.wake())
        try:
            response = await self._response(gone)
        except asyncio.CancelledError:
            self.publisher.cancel_soon(self.message)
            raise
        finally:
            gone.cancel()
        if response is None:
            self.publisher.cancel_soon(self.message)
            return Response(status_code=499)
        await self.free_place()
        if response.error is not None:
            raise ApiError.of_response(response.error)
        estimate = self.estimates.of(response.model, response.decision, response.usage)
        content = self.answers.whole(response, estimate)
        headers = sprout_headers(content.usage.sprout) | self.admission.headers
        return Response(content.model_dump_json(), headers=headers, media_type="application/json")

    async def stream(self, *, include_usage: bool) -> Response:
        """The answer as server-sent events."""
        settings, pending = self.settings, self.pending
        try:
            await pending.wait(settings.first_reply_wait_s)
        except BaseException:
            self.publisher.cancel_soon(self.message)
            self.keep.close()
            raise
        if pending.response is not None and pending.response.error is not None:
            self.keep.close()
            raise ApiError.of_response(pending.response.error)
        estimate = self.estimates.of(self.answers.model, pending.decision, None)
        return EventSourceResponse(
            self._events(include_usage=include_usage),
            headers=sprout_headers(sprout_usage(pending.decision, estimate)) | self.admission.headers,
            # Before the first part of the answer the events themselves contain comments.
            ping=int(max(1, settings.keep_alive_s)),
            ping_message_factory=lambda: ServerSentEvent(comment="waiting"),
            # For systems whose kernel does not end such connections, see `run_service`.
            send_timeout=settings.send_timeout_s + SEND_GRACE_S,
        )

    async def _events(self, *, include_usage: bool) -> AsyncIterator[bytes]:
        finished = False
        try:
            async for ready in self._data(include_usage=include_usage):
                yield b"".join(map(_event, ready))
            finished = True
            await self.free_place()
            yield _event("[DONE]")
        finally:
            if not finished:
                self.publisher.cancel_soon(self.message)
            self.keep.close()

    async def _data(self, *, include_usage: bool) -> AsyncIterator[list[str]]:
        """The data of all events but the last one; those that are ready at the same time are sent at once."""
        pending, answers = self.pending, self.answers
        first = answers.first()
        ready = [] if first is None else [first.to_json(include_usage=include_usage)]
        while True:
            if text := pending.take_text():
                ready.append(answers.piece(text).to_json(include_usage=include_usage))
            if (error := self._problem()) is not None:
                if pending.restarted:
                    self.publisher.cancel_soon(self.message)
                yield [*ready, json.dumps({"error": error.body.model_dump()})]
                return
            if pending.response is not None:
                break
            if ready:
                yield ready
                ready = []
            if not await pending.wait(self._patience_s()):
                self.publisher.cancel_soon(self.message)
                error = ApiError(504, "the answer did not continue in time", kind="timeout_error", code="timeout")
                yield [json.dumps({"error": error.body.model_dump()})]
                return
        ready.append(answers.last(pending.response).to_json(include_usage=include_usage))
        if include_usage:
            response = pending.response
            estimate = self.estimates.of(response.model, response.decision, response.usage)
            ready.append(answers.usage(response, estimate).to_json(include_usage=True))
        yield ready

    def _problem(self) -> ApiError | None:
        """Why the stream cannot continue."""
        if self.pending.response is not None and self.pending.response.error is not None:
            return ApiError.of_response(self.pending.response.error)
        if self.pending.restarted:
            return ApiError(502, "the router failed in the middle of the answer: ask again", kind="upstream_error")
        return None

    def _patience_s(self) -> float:
        """How long the next part may take, wall seconds."""
        left_s = self.clock.wall_seconds_until(self.message.deadline or self.clock.now())
        until_deadline_s = max(0.0, left_s) + DEADLINE_GRACE_S
        return min(self.settings.silence_s, until_deadline_s) if self.pending.began else until_deadline_s

    async def _response(self, gone: "asyncio.Task[None]") -> GenerationResponse | None:
        """Wait for the response; None if the client leaves before it.

        Raises:
            ApiError: there is none in time.
        """
        while self.pending.response is None:
            if gone.done():
                return None
            if not await self.pending.wait(self._patience_s()):
                self.publisher.cancel_soon(self.message)
                raise ApiError(504, "there was no answer in time", kind="timeout_error", code="timeout")
        return self.pending.response


def _event(data: str) -> bytes:
    """A server-sent event of one line. The library's own encoder also splits lines, for ten times the time."""
    return b"data: " + data.encode() + b"\r\n\r\n"


async def _disconnected(request: Request) -> None:
    """Return when the client has left."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
