"""Encodes a request and decodes its responses in the inference protocol's messages (KServe v2), without numpy.

`tritonclient`'s own `InferInput` and `as_numpy` build an array for every tensor, which is most of the cost of a request
where all tensors hold one value and a router sends hundreds of requests a second. So values are packed directly.
"""

import struct
from dataclasses import dataclass
from typing import Any, Final

from tritonclient.grpc.service_pb2 import ModelInferRequest, ModelInferResponse

from shared.inference.base import SAMPLING_FIELDS, GenerationParameters, InvalidRequest
from shared.inference.triton.contract import Input, ModelContract
from shared.messages.responses import FinishReason

EMPTY_FINAL_RESPONSE: Final = "triton_enable_empty_final_response"
"""Request parameter: Triton then marks the end of an answer even where the model sends no final response of its own."""

FINAL_RESPONSE: Final = "triton_final_response"
"""Response parameter: this is the last response."""

_FORMATS: Final = {
    "BOOL": "<?",
    "INT8": "<b",
    "INT16": "<h",
    "INT32": "<i",
    "INT64": "<q",
    "UINT8": "<B",
    "UINT16": "<H",
    "UINT32": "<I",
    "UINT64": "<Q",
    "FP16": "<e",
    "FP32": "<f",
    "FP64": "<d",
}

_FINISH_REASONS: Final[dict[str, FinishReason]] = {
    "stop": "stop",
    "length": "length",
    "timeout": "deadline",
    "cancelled": "cancelled",
}
"""Finish reasons of the LLM API, and those of Sprout's responses."""


@dataclass(frozen=True, slots=True)
class Part:
    """One response of a model.

    Attributes:
        text: what it adds to the answer; all of the answer so far where the contract is `cumulative`.
        tokens: number of tokens in this response, by the server's count; None where it does not count.
        prompt_tokens: number of tokens in the prompt; None where the server does not count.
        final: this is the last response.
        finish_reason: why the answer ended; None before the end, and where the server does not report it.
    """

    text: str
    tokens: int | None
    prompt_tokens: int | None
    final: bool
    finish_reason: FinishReason | None = None


def encode(
    contract: ModelContract, prompt: str, parameters: GenerationParameters, *, request_id: str, stream: bool
) -> ModelInferRequest:
    """Encode the request for one generation.

    Args:
        stream: request one response for each step's tokens rather than a single one, where the model supports it.

    Raises:
        InvalidRequest: the model has no input for a parameter, or its type cannot hold a value.
    """
    writer = _Writer(contract, request_id)
    writer.texts(contract.text_input, prompt)
    writer.value(contract.max_tokens, parameters.max_tokens)
    writer.value(contract.stream, stream and contract.decoupled)
    for flag in (contract.exclude_input, *contract.flags):
        writer.value(flag, True)
    if parameters.stop:
        writer.texts(contract.stop, *parameters.stop)
    for name in SAMPLING_FIELDS:
        content = getattr(parameters, name)
        if content is None:
            continue
        if name not in contract.sampling:
            raise InvalidRequest(f"sampling.{name} cannot be served: model {contract.model!r} has no such input")
        writer.value(contract.sampling[name], content)
    for tensor in contract.empty:
        if tensor is not contract.stop or not parameters.stop:
            writer.texts(tensor, "")
    return writer.request


def decode(contract: ModelContract, response: ModelInferResponse) -> Part:
    """Decode one response; an empty final response has no outputs."""
    text, tokens, prompt_tokens, reason = "", None, None, None
    for output, content in zip(response.outputs, response.raw_output_contents, strict=False):
        if output.name == contract.text_output:
            text = _first_text(content)
        elif output.name == contract.completion_tokens:
            tokens = _integer(output.datatype, content)
        elif output.name == contract.prompt_tokens:
            prompt_tokens = _integer(output.datatype, content)
        elif output.name == contract.finish_reason:
            # Before the end, the LLM API's model sends the string "None".
            reason = _FINISH_REASONS.get(_first_text(content))
    final = FINAL_RESPONSE in response.parameters and response.parameters[FINAL_RESPONSE].bool_param
    return Part(text, tokens, prompt_tokens, final, reason)


class _Writer:
    """Adds tensors to a request; skips inputs that the model does not have."""

    __slots__ = ("_batched", "_shape", "request")

    def __init__(self, contract: ModelContract, request_id: str) -> None:
        self.request = ModelInferRequest(model_name=contract.model, id=request_id)
        self.request.parameters[EMPTY_FINAL_RESPONSE].bool_param = True
        for name in contract.outputs:
            self.request.outputs.add(name=name)
        self._batched = contract.batched
        self._shape = (1, 1) if contract.batched else (1,)

    def texts(self, tensor: Input | None, *words: str) -> None:
        if tensor is not None:
            shape = (1, len(words)) if self._batched else (len(words),)
            self._add(tensor, shape, _pack_texts(words))

    def value(self, tensor: Input | None, content: bool | float) -> None:
        if tensor is not None:
            self._add(tensor, self._shape, _pack(tensor, content))

    def _add(self, tensor: Input, shape: tuple[int, ...], content: bytes) -> None:
        self.request.inputs.add(name=tensor.name, datatype=tensor.datatype, shape=shape)
        self.request.raw_input_contents.append(content)


def _pack(tensor: Input, value: bool | float) -> bytes:
    try:
        return struct.pack(_FORMATS[tensor.datatype], value)
    except (struct.error, OverflowError) as error:
        raise InvalidRequest(f"sampling.{tensor.name}: {value} does not fit the model's {tensor.datatype}") from error


def _pack_texts(words: tuple[str, ...]) -> bytes:
    """Strings in Triton's layout: for each, its length in four bytes, then its UTF-8."""
    packed = bytearray()
    for word in words:
        try:
            content = word.encode()
        except UnicodeEncodeError as error:
            raise InvalidRequest("the text is not valid Unicode: it contains lone surrogates") from error
        packed += struct.pack("<I", len(content)) + content
    return bytes(packed)


def _first_text(content: bytes) -> str:
    """The first string of a tensor: of several sequences or beams, the first is the answer."""
    if len(content) < 4:
        return ""
    (size,) = struct.unpack_from("<I", content)
    # A part of a stream may end inside a character.
    return content[4 : 4 + size].decode("utf-8", errors="replace")


def _integer(datatype: str, content: bytes) -> int | None:
    layout = _FORMATS.get(datatype)
    if layout is None or len(content) < struct.calcsize(layout):
        return None
    value: Any = struct.unpack_from(layout, content)[0]
    return int(value)
