"""The inference client of NVIDIA Triton with TensorRT-LLM, for both of its tensor contracts.

It uses the stubs that `tritonclient` generates from the inference protocol. `tritonclient.grpc.aio`'s `stream_infer`
does not fit: it drops the gRPC status of an error, opens a stream for many requests, and builds an array for every
tensor. Each generation has its own stream on one shared connection, because gRPC can only cancel a whole stream.
"""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from typing import Any, NamedTuple, Self

import grpc
from tritonclient.grpc.service_pb2 import (
    ModelConfigRequest,
    ModelInferRequest,
    ModelInferResponse,
    ModelReadyRequest,
    ModelStreamInferResponse,
)

from shared.inference.base import (
    Capabilities,
    Chunk,
    DeadlineExceeded,
    EndpointUnavailable,
    GenerationCancelled,
    GenerationError,
    GenerationParameters,
    InferenceClient,
    PreparedRequest,
    StreamTimeouts,
)
from shared.inference.tokens import TokenCounts, Tokenizer
from shared.inference.triton.assembly import AnswerAssembler, BrokenStreamError
from shared.inference.triton.channel import Connection, credentials_of, shorten, status_error, stream_error
from shared.inference.triton.contract import ContractError, ModelContract
from shared.inference.triton.wire import Part, decode, encode
from shared.pools import Endpoint, Pool
from shared.runtime.clock import Clock
from shared.runtime.logs import get_logger

_log = get_logger(__name__)

_Call = Any
"""`grpc.aio.UnaryStreamCall` or `UnaryUnaryCall`, which are not generic in the installed stubs."""


class _Payload(NamedTuple):
    """A prepared request, and the contract by which its responses are read."""

    contract: ModelContract
    message: ModelInferRequest


class TritonClient(InferenceClient):
    """One model on one Triton server; use it as an asynchronous context manager, or call `close`."""

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
        """Configure the client; nothing connects yet.

        Args:
            address: host:port of Triton's gRPC service.
            model: its name in Triton's model repository.
            name: of the endpoint, for messages; default: the address.
            credentials: for TLS; None for plain text.
            server_name: the name in the server's certificate; None for the host of the address.
            tokenizer: counts tokens where the server does not; None: the parts of a stream are counted.
        """
        self.address = address
        self._name = name or address
        self._model = model
        self._clock = clock
        self._tokenizer = tokenizer
        self._contract: ModelContract | None = None
        self._connection = Connection(address, credentials=credentials, server_name=server_name)
        self._running: dict[PreparedRequest, _Call] = {}
        self._cancelled: set[PreparedRequest] = set()

    @classmethod
    def of_endpoint(cls, pool: Pool, endpoint: Endpoint, *, clock: Clock, tokenizer: Tokenizer | None) -> Self:
        """The client of an endpoint of the fleet file.

        Raises:
            FleetError: a file for TLS cannot be used.
        """
        return cls(
            endpoint.grpc,
            model=pool.triton_model,
            clock=clock,
            name=endpoint.name,
            credentials=credentials_of(pool, endpoint),
            server_name=endpoint.over(pool).tls_server_name,
            tokenizer=tokenizer,
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @property
    def name(self) -> str:
        """The endpoint's name, for messages."""
        return self._name

    @property
    def contract(self) -> ModelContract | None:
        """The model's tensors; None before the first successful `probe`."""
        return self._contract

    @property
    def capabilities(self) -> Capabilities | None:
        """What the model supports; None before the first successful `probe`."""
        return None if self._contract is None else self._contract.capabilities

    async def probe(self, *, timeout_s: float) -> Capabilities:
        """See `InferenceClient.probe`: reads the model's configuration."""
        return (await self._read_contract(timeout_s)).capabilities

    async def is_ready(self, *, timeout_s: float) -> bool:
        """See `InferenceClient.is_ready`."""
        try:
            response = await self._connection.stub.ModelReady(ModelReadyRequest(name=self._model), timeout=timeout_s)
        except grpc.RpcError:
            return False
        return bool(response.ready)

    async def prepare(
        self, prompt: str, parameters: GenerationParameters, *, request_id: str, timeout_s: float, streamed: bool = True
    ) -> PreparedRequest:
        """See `InferenceClient.prepare`."""
        if timeout_s <= 0:
            raise DeadlineExceeded(f"{self.name}: the deadline passed before the request was sent")
        contract = self._contract or await self._read_contract(timeout_s)
        stream = streamed or contract.must_stream(tokenizer=self._tokenizer is not None, stops=bool(parameters.stop))
        message = encode(contract, prompt, parameters, request_id=request_id, stream=stream)
        return PreparedRequest(
            request_id=request_id, prompt=prompt, parameters=parameters, payload=_Payload(contract, message)
        )

    async def stream(
        self, request: PreparedRequest, *, timeout_s: float, stream_timeouts: StreamTimeouts | None = None
    ) -> AsyncGenerator[Chunk, None]:
        """See `InferenceClient.stream`."""
        if timeout_s <= 0:
            raise DeadlineExceeded(f"{self.name}: the deadline passed before the request was sent")
        contract: ModelContract = request.payload.contract
        assembler = AnswerAssembler(
            request.prompt,
            request.parameters,
            started_at_s=self._clock.now_s(),
            echoes=contract.exclude_input is None,
            cumulative=contract.cumulative,
        )
        parts = self._parts(request, timeout_s, stream_timeouts)
        if not contract.decoupled:
            parts = self._single_part(request, timeout_s)
        last_s: float | None = None
        cancelled = False
        try:
            async with aclosing(parts):
                async for part in parts:
                    if part.text and assembler.stopped:
                        break  # closing the stream stops the server
                    last_s = self._clock.now_s()
                    if added := self._add(assembler, part, last_s):
                        yield Chunk(added)
                    if assembler.stopped and contract.stop is None:
                        break  # the server does not know the stop sequence at which the answer ended
        except GenerationCancelled:
            if last_s is None:
                raise
            cancelled = True
        if last_s is None:
            raise EndpointUnavailable(f"{self.name}: the stream ended without an answer")
        rest = assembler.flush()
        counts = await self._counts(request.prompt, assembler)
        generation = assembler.result(now_s=last_s, counts=counts)
        yield Chunk(rest, replace(generation, finish_reason="cancelled") if cancelled else generation)

    def cancel(self, request: PreparedRequest) -> None:
        """See `InferenceClient.cancel`."""
        call = self._running.get(request)
        if call is not None:
            self._cancelled.add(request)
            call.cancel()

    async def close(self) -> None:
        """Cancel what is running and disconnect."""
        await self._connection.close()

    def _add(self, assembler: AnswerAssembler, part: Part, now_s: float) -> str:
        """Add a part to the answer; returns the new text."""
        try:
            return assembler.add(part, now_s=now_s)
        except BrokenStreamError as error:
            raise EndpointUnavailable(f"{self.name}: {error}") from error

    async def _read_contract(self, timeout_s: float) -> ModelContract:
        try:
            response = await self._connection.stub.ModelConfig(ModelConfigRequest(name=self._model), timeout=timeout_s)
            contract = ModelContract.from_config(response.config)
        except grpc.RpcError as error:
            text = f"{self.name}: {error.code().name}: {shorten(error.details() or '')}"  # it had no prompt to quote
            raise EndpointUnavailable(text) from error
        except ContractError as error:
            raise EndpointUnavailable(f"{self.name}: {error}") from error
        if contract != self._contract:
            self._log_contract(contract)
        self._contract = contract
        return contract

    def _log_contract(self, contract: ModelContract) -> None:
        capabilities = contract.capabilities
        _log.info(
            "model server",
            endpoint=self.name,
            model=contract.model,
            contract=contract.name,
            streams=capabilities.streaming,
            counts_tokens=capabilities.counts_tokens,
            stop_sequences=capabilities.stop_sequences,
            unsupported_sampling=list(capabilities.unsupported_sampling),
        )
        if not capabilities.streaming and not capabilities.stop_sequences:
            _log.warning(
                "the model does not stop at stop sequences: it has no input for them, and a single response cannot be "
                "interrupted; serve it with 'decoupled: true'",
                endpoint=self.name,
                model=contract.model,
            )

    async def _counts(self, prompt: str, assembler: AnswerAssembler) -> TokenCounts | None:
        if self._tokenizer is None or assembler.counted:
            return None
        return await self._tokenizer.count(prompt, assembler.received)

    async def _single_part(self, request: PreparedRequest, timeout_s: float) -> AsyncGenerator[Part, None]:
        payload: _Payload = request.payload
        call: _Call = self._connection.stub.ModelInfer(payload.message, timeout=timeout_s)
        self._running[request] = call
        try:
            response: ModelInferResponse = await call
        except grpc.RpcError as error:
            raise self._status_error(request, error) from error
        except asyncio.CancelledError:
            self._raise_if_cancelled(request)
            raise
        finally:
            self._forget(request)
        yield decode(payload.contract, response)

    async def _parts(
        self, request: PreparedRequest, timeout_s: float, timeouts: StreamTimeouts | None
    ) -> AsyncGenerator[Part, None]:
        contract, message = request.payload
        call: _Call = self._connection.stream(message, timeout_s=timeout_s, error_status=contract.error_status)
        self._running[request] = call
        final = False
        try:
            limit_s = None if timeouts is None else timeouts.first_s
            while not final and (response := await self._read(request, call, limit_s)) is not None:
                limit_s = None if timeouts is None else timeouts.next_s
                if response.error_message:
                    phrases = contract.invalid_request_phrases
                    raise stream_error(self.name, response.error_message, invalid_request_phrases=phrases)
                part = decode(contract, response.infer_response)
                # After the final response only the status follows, which adds nothing.
                final = part.final
                yield part
        finally:
            self._forget(request)
            if final:
                self._connection.finish(call)
            else:
                # No effect on a stream that has ended; otherwise it stops the server.
                call.cancel()

    async def _read(
        self, request: PreparedRequest, call: _Call, limit_s: float | None
    ) -> ModelStreamInferResponse | None:
        """The next response; None at the end of the stream."""
        try:
            if limit_s is None:
                response = await call.read()
            else:
                async with asyncio.timeout(limit_s):
                    response = await call.read()
        except TimeoutError as error:
            raise EndpointUnavailable(f"{self.name}: no response within {limit_s:g} s") from error
        except grpc.RpcError as error:
            raise self._status_error(request, error) from error
        except asyncio.CancelledError:
            self._raise_if_cancelled(request)
            raise
        return None if response is grpc.aio.EOF else response  # type: ignore[attr-defined]

    def _status_error(self, request: PreparedRequest, error: grpc.RpcError) -> GenerationError:
        phrases = request.payload.contract.invalid_request_phrases
        return status_error(self.name, error.code(), error.details(), invalid_request_phrases=phrases)

    def _raise_if_cancelled(self, request: PreparedRequest) -> None:
        """Tell a generation that `cancel` ended, which gRPC reports to its reader, from a task that was cancelled."""
        task = asyncio.current_task()
        if request in self._cancelled and (task is None or not task.cancelling()):
            raise GenerationCancelled(f"{self.name}: the generation was cancelled") from None

    def _forget(self, request: PreparedRequest) -> None:
        self._running.pop(request, None)
        self._cancelled.discard(request)
