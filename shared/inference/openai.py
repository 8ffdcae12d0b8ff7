"""The inference client of servers with an OpenAI-compatible API: vLLM, NIM, trtllm-serve, SGLang, llama.cpp.

By default it asks `/v1/completions` with the prompt that Sprout's chat template rendered. With the chat template
`server` it asks `/v1/chat/completions` with the conversation, and the server applies its own template.
"""

import asyncio
import json
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import replace
from typing import Any, Final, Self

import anyio
import httpx

from shared.fleet import FleetError, tls_context
from shared.inference.base import (
    SAMPLING_FIELDS,
    Capabilities,
    Chunk,
    DeadlineExceeded,
    EndpointUnavailable,
    Generation,
    GenerationCancelled,
    GenerationParameters,
    InferenceClient,
    InvalidRequest,
    PreparedRequest,
    StreamTimeouts,
)
from shared.inference.chat import SERVER_TEMPLATE
from shared.inference.tokens import Tokenizer
from shared.messages import FinishReason, TokenCountSource
from shared.pools import Endpoint, Pool
from shared.runtime.clock import Clock

STANDARD_FIELDS: Final = frozenset({"temperature", "top_p", "presence_penalty", "frequency_penalty", "seed"})
"""Sampling parameters of OpenAI's API; others are sent to pools whose `sampling_extensions` names them."""

REJECTED: Final = frozenset({400, 413, 415, 422})
"""Statuses that say that every server would reject the request."""

LONGEST_ERROR: Final = 300
_DONE: Final = "[DONE]"
_FINISH_REASONS: Final[Mapping[str, FinishReason]] = {"length": "length"}


class OpenAIClient(InferenceClient):
    """One model on one server; call `close` at the end."""

    def __init__(
        self,
        url: str,
        *,
        model: str,
        clock: Clock,
        name: str = "",
        chat: bool = False,
        extensions: frozenset[str] = frozenset(),
        api_key: str | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        """Configure the client; nothing connects yet.

        Args:
            url: base URL of the server, without `/v1`.
            model: its name on the server.
            name: of the endpoint, for messages; default: the URL's host.
            chat: ask the chat endpoint: prompts are conversations as JSON.
            extensions: sampling parameters beyond OpenAI's that the server honours.
            api_key: sent as bearer token.
            transport: of the connections; default: plain or TLS with the system's authorities.
        """
        headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        self._client = httpx.AsyncClient(
            base_url=url.rstrip("/"),
            headers=headers,
            transport=transport,
            timeout=None,
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=100),
        )
        self._name = name or self._client.base_url.host
        self._model = model
        self._clock = clock
        self._chat = chat
        self._capabilities: Capabilities | None = None
        self._fields = STANDARD_FIELDS | extensions
        self._running: dict[PreparedRequest, anyio.CancelScope] = {}
        self._cancelled: set[PreparedRequest] = set()

    @classmethod
    def of_endpoint(cls, pool: Pool, endpoint: Endpoint, *, clock: Clock, tokenizer: Tokenizer | None) -> Self:  # noqa: ARG003 - the servers count
        """The client of an endpoint of the fleet file.

        Raises:
            FleetError: a file for TLS, or the file with the API key, cannot be used.
        """
        url = str(endpoint.url)
        transport = None
        if url.startswith("https:"):
            transport = httpx.AsyncHTTPTransport(verify=tls_context(endpoint.over(pool), endpoint=endpoint.name))
        api_key = None
        if pool.api_key_file is not None:
            try:
                api_key = pool.api_key_file.read_text(encoding="utf-8").strip()
            except (OSError, UnicodeDecodeError) as error:
                raise FleetError(f"pool {pool.name!r}: api_key_file cannot be read: {error}") from error
        return cls(
            url,
            model=pool.served_model,
            clock=clock,
            name=endpoint.name,
            chat=pool.chat_template == SERVER_TEMPLATE,
            extensions=frozenset(pool.sampling_extensions),
            api_key=api_key,
            transport=transport,
        )

    @property
    def name(self) -> str:
        """The endpoint's name, for messages."""
        return self._name

    @property
    def capabilities(self) -> Capabilities | None:
        """What the model supports; None before the first successful `probe`."""
        return self._capabilities

    async def probe(self, *, timeout_s: float) -> Capabilities:
        """See `InferenceClient.probe`: looks for the model in the server's list."""
        try:
            async with asyncio.timeout(timeout_s):
                response = await self._client.get("/v1/models")
            response.raise_for_status()
            served = [str(one["id"]) for one in response.json()["data"]]
        except TimeoutError:
            raise EndpointUnavailable(f"{self.name}: no answer within {timeout_s:g} s") from None
        except httpx.HTTPStatusError as error:
            raise EndpointUnavailable(f"{self.name}: status {error.response.status_code}") from None
        except httpx.HTTPError as error:
            raise EndpointUnavailable(f"{self.name}: {type(error).__name__}") from None
        except (ValueError, LookupError, TypeError):
            raise EndpointUnavailable(f"{self.name}: /v1/models is not in OpenAI's format") from None
        if self._model not in served:
            names = ", ".join(served[:5]) or "none"
            raise EndpointUnavailable(f"{self.name}: serves no model {self._model!r}; it serves: {names}")
        self._capabilities = Capabilities(
            streaming=True,
            counts_tokens=True,
            stop_sequences=True,
            sampling_fields=frozenset(SAMPLING_FIELDS) & self._fields,
        )
        return self._capabilities

    async def is_ready(self, *, timeout_s: float) -> bool:
        """See `InferenceClient.is_ready`."""
        try:
            await self.probe(timeout_s=timeout_s)
        except EndpointUnavailable:
            return False
        return True

    async def prepare(
        self, prompt: str, parameters: GenerationParameters, *, request_id: str, timeout_s: float, streamed: bool = True
    ) -> PreparedRequest:
        """See `InferenceClient.prepare`. It always streams: only a stream can be cancelled and timed."""
        del streamed
        if timeout_s <= 0:
            raise DeadlineExceeded(f"{self.name}: the deadline passed before the request was sent")
        sampling = {name: getattr(parameters, name) for name in SAMPLING_FIELDS}
        given = {name: value for name, value in sampling.items() if value is not None}
        if unsupported := sorted(given.keys() - self._fields):
            raise InvalidRequest(f"{self.name}: 'sampling.{unsupported[0]}' is not supported by this model server")
        payload: dict[str, Any] = {
            "model": self._model,
            **({"messages": json.loads(prompt)} if self._chat else {"prompt": prompt}),
            "max_tokens": parameters.max_tokens,
            **given,
            **({"stop": list(parameters.stop)} if parameters.stop else {}),
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        return PreparedRequest(request_id=request_id, prompt=prompt, parameters=parameters, payload=payload)

    async def stream(
        self, request: PreparedRequest, *, timeout_s: float, stream_timeouts: StreamTimeouts | None = None
    ) -> AsyncGenerator[Chunk, None]:
        """See `InferenceClient.stream`."""
        answer = _Answer(started_s=self._clock.now_s())
        cancelled = False
        events = self._events(request, timeout_s, stream_timeouts)
        try:
            async with aclosing(events):
                async for event in events:
                    if text := answer.add(event, now_s=self._clock.now_s()):
                        yield Chunk(text)
        except GenerationCancelled:
            if not answer.pieces:
                raise
            cancelled = True
        except (LookupError, TypeError, AttributeError):
            raise EndpointUnavailable(f"{self.name}: the stream is not in OpenAI's format") from None
        if not answer.responded:
            raise EndpointUnavailable(f"{self.name}: the stream ended without an answer")
        generation = answer.result()
        yield Chunk("", replace(generation, finish_reason="cancelled") if cancelled else generation)

    def cancel(self, request: PreparedRequest) -> None:
        """See `InferenceClient.cancel`: closes the connection, at which the server stops."""
        scope = self._running.get(request)
        if scope is not None:
            self._cancelled.add(request)
            scope.cancel()

    async def close(self) -> None:
        """Disconnect."""
        await self._client.aclose()

    async def _events(
        self, request: PreparedRequest, timeout_s: float, timeouts: StreamTimeouts | None
    ) -> AsyncGenerator[Any, None]:
        """The JSON documents of a stream."""
        path = "/v1/chat/completions" if self._chat else "/v1/completions"
        deadline_s = asyncio.get_running_loop().time() + timeout_s
        try:
            http = self._client.build_request("POST", path, json=request.payload)
            limit_s = timeout_s if timeouts is None else min(timeouts.first_s, timeout_s)
            response = await self._limited(request, limit_s, deadline_s, self._client.send(http, stream=True))
            try:
                if response.status_code != httpx.codes.OK:
                    await self._raise_status(request, deadline_s, response)
                lines = response.aiter_lines()
                while (line := await self._limited(request, limit_s, deadline_s, anext(lines, None))) is not None:
                    if not line.startswith("data:"):
                        continue  # a comment, or the blank line after an event
                    data = line.removeprefix("data:").strip()
                    if data == _DONE:
                        return
                    limit_s = timeout_s if timeouts is None else timeouts.next_s
                    yield self._parsed(data)
            finally:
                await response.aclose()
        except httpx.HTTPError as error:
            raise EndpointUnavailable(f"{self.name}: {type(error).__name__}") from None
        finally:
            self._running.pop(request, None)
            self._cancelled.discard(request)

    async def _limited(self, request: PreparedRequest, limit_s: float, deadline_s: float, step: Any) -> Any:  # noqa: ANN401
        """Await a step of a stream within its time limits, and until it is cancelled."""
        left_s = deadline_s - asyncio.get_running_loop().time()
        with anyio.CancelScope() as scope:
            self._running[request] = scope
            if request in self._cancelled:
                scope.cancel()
            try:
                async with asyncio.timeout(max(0.0, min(limit_s, left_s))):
                    return await step
            except TimeoutError:
                if left_s <= limit_s:
                    raise DeadlineExceeded(f"{self.name}: the deadline has passed") from None
                raise EndpointUnavailable(f"{self.name}: no response within {limit_s:g} s") from None
        raise GenerationCancelled(f"{self.name}: the generation was cancelled")

    async def _raise_status(self, request: PreparedRequest, deadline_s: float, response: httpx.Response) -> None:
        status = response.status_code
        body: bytes = await self._limited(request, 5.0, deadline_s, response.aread())
        message = _message_of(body)
        if status in REJECTED:
            raise InvalidRequest(f"{self.name}: status {status}", server_message=message)
        raise EndpointUnavailable(f"{self.name}: status {status}", server_message=message)

    def _parsed(self, data: str) -> Any:  # noqa: ANN401 - JSON
        try:
            event = json.loads(data)
        except ValueError:
            raise EndpointUnavailable(f"{self.name}: the stream is not in OpenAI's format") from None
        if isinstance(event, dict) and "error" in event:
            raise EndpointUnavailable(f"{self.name}: an error in the stream", server_message=_message_of(data.encode()))
        return event


class _Answer:
    """Puts an answer together from the events of a stream."""

    def __init__(self, *, started_s: float) -> None:
        self.pieces: list[str] = []
        self.responded = False
        self._started_s = started_s
        self._first_s: float | None = None
        self._last_s = started_s
        self._reason: FinishReason = "stop"
        self._usage: Mapping[str, Any] = {}

    def add(self, event: Any, *, now_s: float) -> str:  # noqa: ANN401 - JSON
        """Add an event; returns the new text."""
        self.responded = True
        self._last_s = now_s
        self._usage = event.get("usage") or self._usage
        text = ""
        for choice in event.get("choices") or ():
            text += (choice.get("delta") or {}).get("content") or choice.get("text") or ""
            if choice.get("finish_reason"):
                self._reason = _FINISH_REASONS.get(choice["finish_reason"], "stop")
        if text:
            self.pieces.append(text)
            self._first_s = self._first_s or now_s
        return text

    def result(self) -> Generation:
        """The whole answer; where the server counts no tokens, the parts are counted."""
        counted = self._usage.get("completion_tokens")
        prompt = self._usage.get("prompt_tokens")
        source: TokenCountSource = "stream" if counted is None else "server"
        return Generation(
            text="".join(self.pieces),
            finish_reason=self._reason,
            completion_tokens=len(self.pieces) if counted is None else int(counted),
            prompt_tokens=None if prompt is None else int(prompt),
            token_count_source=source,
            started_at_s=self._started_s,
            first_token_at_s=self._first_s,
            finished_at_s=self._last_s,
        )


def _message_of(body: bytes) -> str:
    """The message of an error in OpenAI's format, else the beginning of the body."""
    try:
        document = json.loads(body)
        error = document["error"] if isinstance(document.get("error"), dict) else document
        text = str(error["message"])
    except (ValueError, LookupError, AttributeError, TypeError):
        text = body.decode("utf-8", errors="replace")
    return text[:LONGEST_ERROR]
