"""An asynchronous client of one model on one Triton server.

It speaks the inference protocol through the stubs that `tritonclient` generates from it. `tritonclient.grpc.aio`'s own
`stream_infer` is not enough: it cannot ask for the empty final response by which a decoupled model that sends no last
word is heard to end, drops the gRPC status of an error, and builds every tensor as an array. Every generation has a
stream of its own on one shared connection, because a stream is what gRPC can cancel.

What a model server's error means for the caller: its gRPC status, or its words where the status does not tell.
"""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Final, Self

import grpc
from tritonclient.grpc.service_pb2 import (
    ModelConfigRequest,
    ModelInferRequest,
    ModelInferResponse,
    ModelReadyRequest,
    ModelStreamInferResponse,
)

from shared.inference.base import (
    DeadlineExceeded,
    EndpointUnavailable,
    GenerationError,
    GenerationParameters,
    InvalidRequest,
    StreamTimeouts,
)
from shared.inference.tokens import TokenCounts, Tokenizer
from shared.inference.triton.channel import Connection
from shared.inference.triton.contract import Contract, ContractError
from shared.inference.triton.generation import Assembly, BrokenStreamError, Generation
from shared.inference.triton.wire import Part, decode, encode
from shared.runtime.clock import Clock
from shared.runtime.logs import get_logger

_log = get_logger(__name__)

_Call = Any
"""`grpc.aio.UnaryStreamCall`, which is not generic in the installed stubs."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of an answer as it came.

    Attributes:
        text: new text; may be empty in the last chunk.
        generation: the whole, in the last chunk alone.
    """

    text: str
    generation: Generation | None = None


class TritonClient:
    """Asks one model on one server; use as an asynchronous context manager, or call `close`.

    Nothing is sent before the first call. Errors name the endpoint and never quote a prompt.
    """

    def __init__(
        self,
        address: str,
        *,
        model: str,
        clock: Clock,
        name: str = "",
        credentials: grpc.ChannelCredentials | None = None,
        server_name: str | None = None,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        """Set up.

        Args:
            address: host:port of Triton's gRPC service.
            model: name in Triton's repository.
            name: of the endpoint, for messages; default: the address.
            credentials: for TLS; null: plain text.
            server_name: that the server's certificate has; null: the host of the address.
            tokenizer: counts tokens where the server does not; null: the parts of a stream are counted.
        """
        self.address = address
        self.name = name or address
        self._model = model
        self._clock = clock
        self._tokenizer = tokenizer
        self._contract: Contract | None = None
        self._connection = Connection(address, credentials=credentials, server_name=server_name)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Cancel what runs and close the connection."""
        await self._connection.close()

    @property
    def contract(self) -> Contract | None:
        """What the model offers, once it has been asked."""
        return self._contract

    async def is_ready(self, *, timeout_s: float) -> bool:
        """Whether the server answers within `timeout_s` (wall) and has the model loaded."""
        try:
            answer = await self._connection.stub.ModelReady(ModelReadyRequest(name=self._model), timeout=timeout_s)
        except grpc.RpcError:
            return False
        return bool(answer.ready)

    async def probe(self, *, timeout_s: float) -> Contract:
        """Read the model's configuration, again if it was read before: a restarted server may have another model.

        Raises:
            EndpointUnavailable: no answer within `timeout_s` (wall), or no such model.
            ContractError: it is not a text model.
        """
        try:
            answer = await self._connection.stub.ModelConfig(ModelConfigRequest(name=self._model), timeout=timeout_s)
        except grpc.RpcError as error:
            raise EndpointUnavailable(self._describe(error)) from error
        contract = Contract.from_config(answer.config)
        if contract != self._contract:
            self._tell(contract)
        self._contract = contract
        return contract

    async def generate(
        self,
        prompt: str,
        parameters: GenerationParameters,
        *,
        request_id: str,
        timeout_s: float,
        stream_timeouts: StreamTimeouts | None = None,
        streamed: bool = True,
    ) -> Generation:
        """Generate, and return the whole answer; see `stream`."""
        chunks = self.stream(
            prompt,
            parameters,
            request_id=request_id,
            timeout_s=timeout_s,
            stream_timeouts=stream_timeouts,
            streamed=streamed,
        )
        async with aclosing(chunks):
            async for chunk in chunks:
                if chunk.generation is not None:
                    return chunk.generation
        raise EndpointUnavailable(f"{self.name}: the stream ended without an answer")

    async def stream(
        self,
        prompt: str,
        parameters: GenerationParameters,
        *,
        request_id: str,
        timeout_s: float,
        stream_timeouts: StreamTimeouts | None = None,
        streamed: bool = True,
    ) -> AsyncGenerator[Chunk, None]:
        """Generate; yields the answer's text as it comes, and last a chunk with the `Generation`.

        Close the generator to give up: the server then stops.

        Args:
            prompt: with its chat template already applied.
            timeout_s: wall seconds for everything.
            stream_timeouts: with a server that is silent; null: until `timeout_s`.
            streamed: False asks for a single response, which costs less but tells no time of the first token. It is
                streamed all the same where that is the only way to count tokens, or to stop the server at a sequence
                that it is not told of.

        Raises:
            EndpointUnavailable: another endpoint may do better.
            InvalidRequest: the request would fail everywhere.
            DeadlineExceeded: `timeout_s` is over.
        """
        if timeout_s <= 0:
            raise DeadlineExceeded(f"{self.name}: no time was left to begin")
        contract = self._contract
        if contract is None:
            contract = await self._first_probe(timeout_s)
        streamed = streamed or contract.must_stream(tokenizer=self._tokenizer is not None, stops=bool(parameters.stop))
        request = encode(contract, prompt, parameters, request_id=request_id, stream=streamed)
        assembly = Assembly(
            prompt,
            parameters,
            started_at_s=self._clock.now_s(),
            echoes=contract.exclude_input is None,
            cumulative=contract.cumulative,
        )
        parts = self._streamed(request, contract, timeout_s, stream_timeouts)
        if not contract.decoupled:
            parts = self._single(request, contract, timeout_s)
        last_s = self._clock.now_s()
        heard = False
        async with aclosing(parts):
            async for part in parts:
                if part.text and assembly.overrun:
                    break  # closing the stream stops the server
                heard = True
                last_s = self._clock.now_s()
                try:
                    fresh = assembly.take(part, now_s=last_s)
                except BrokenStreamError as error:
                    raise EndpointUnavailable(f"{self.name}: {error}") from error
                if fresh:
                    yield Chunk(fresh)
                if assembly.overrun and contract.stop is None:
                    break  # nobody told the server of the sequence at which the answer ended
        if not heard:
            raise EndpointUnavailable(f"{self.name}: the stream ended without an answer")
        rest = assembly.rest()
        counts = await self._counts(prompt, assembly)
        yield Chunk(rest, assembly.result(now_s=last_s, counts=counts))

    def _tell(self, contract: Contract) -> None:
        """Say once what the model cannot do, before somebody wonders."""
        _log.info(
            "model server",
            endpoint=self.name,
            model=contract.model,
            contract=contract.dialect,
            streams=contract.decoupled,
            counts_tokens=contract.completion_tokens is not None,
            told_of_stop_sequences=contract.stop is not None,
            refused_sampling=list(contract.unserved),
        )
        if not contract.decoupled and contract.stop is None:
            _log.warning(
                "the model goes on after a stop sequence: it is not told of any, and an answer in one piece cannot be "
                "cut short; serve it with 'decoupled: true'",
                endpoint=self.name,
                model=contract.model,
            )

    async def _counts(self, prompt: str, assembly: Assembly) -> TokenCounts | None:
        if self._tokenizer is None or assembly.counted:
            return None
        return await self._tokenizer.count(prompt, assembly.received)

    async def _first_probe(self, timeout_s: float) -> Contract:
        try:
            return await self.probe(timeout_s=timeout_s)
        except ContractError as error:
            raise EndpointUnavailable(f"{self.name}: {error}") from error

    async def _single(
        self, request: ModelInferRequest, contract: Contract, timeout_s: float
    ) -> AsyncGenerator[Part, None]:
        try:
            response: ModelInferResponse = await self._connection.stub.ModelInfer(request, timeout=timeout_s)
        except grpc.RpcError as error:
            raise self._typed(error) from error
        yield decode(contract, response)

    async def _streamed(
        self, request: ModelInferRequest, contract: Contract, timeout_s: float, stream_timeouts: StreamTimeouts | None
    ) -> AsyncGenerator[Part, None]:
        call: _Call = self._connection.stream(request, timeout_s=timeout_s)
        final = False
        try:
            limit_s = None if stream_timeouts is None else stream_timeouts.first_s
            try:
                while not final and (response := await self._read(call, limit_s)) is not None:
                    limit_s = None if stream_timeouts is None else stream_timeouts.next_s
                    if response.error_message:
                        raise failure_in_stream(self.name, response.error_message, refusals=self._refusals)
                    part = decode(contract, response.infer_response)
                    # The answer is whole: its status, which is still to come, has nothing to add.
                    final = part.final
                    yield part
            except grpc.RpcError as error:
                raise self._typed(error) from error
        finally:
            if final:
                self._connection.leave(call)
            else:
                # Without effect on a stream that ended; a stream that is given up stops the server's work.
                call.cancel()

    async def _read(self, call: _Call, limit_s: float | None) -> ModelStreamInferResponse | None:
        """The next response; null at the stream's end."""
        try:
            if limit_s is None:
                response = await call.read()
            else:
                async with asyncio.timeout(limit_s):
                    response = await call.read()
        except TimeoutError as error:
            raise EndpointUnavailable(f"{self.name}: nothing was heard within {limit_s:g} s") from error
        return None if response is grpc.aio.EOF else response  # type: ignore[attr-defined]

    def _typed(self, error: grpc.RpcError) -> GenerationError:
        return failure(self.name, error.code(), error.details(), refusals=self._refusals)

    @property
    def _refusals(self) -> tuple[str, ...]:
        return () if self._contract is None else self._contract.refusals

    def _describe(self, error: grpc.RpcError) -> str:
        """An error of a call that carried no prompt."""
        return f"{self.name}: {error.code().name}: {shortened(error.details() or '')}"


_INVALID: Final = frozenset(
    {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.OUT_OF_RANGE, grpc.StatusCode.ALREADY_EXISTS}
)


def failure(
    endpoint: str, code: grpc.StatusCode, details: str | None, *, refusals: Sequence[str] = ()
) -> GenerationError:
    """The error of a call that ended with a status.

    Args:
        refusals: words by which the server blames the request, see `Dialect`.
    """
    text, said = f"{endpoint}: {code.name}", shortened(details or "")
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return DeadlineExceeded(text, said=said)
    if code in _INVALID or _blamed(said, refusals):
        return InvalidRequest(text, said=said)
    return EndpointUnavailable(text, said=said)


def failure_in_stream(endpoint: str, message: str, *, refusals: Sequence[str] = ()) -> GenerationError:
    """The error that a stream carries as a bare text."""
    said = shortened(message)
    kind = InvalidRequest if _blamed(said, refusals) else EndpointUnavailable
    return kind(f"{endpoint}: the model failed", said=said)


def shortened(text: str) -> str:
    """A server's words, on one line and of bounded length."""
    line = " ".join(text.split())
    return line if len(line) <= 300 else f"{line[:297]}..."


def _blamed(said: str, refusals: Sequence[str]) -> bool:
    return any(words in said for words in refusals)
