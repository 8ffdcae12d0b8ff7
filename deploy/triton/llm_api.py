"""The contract of TensorRT-LLM's LLM-API model: how its requests are read and its answers sent.

It behaves as `triton_backend/all_models/llmapi/tensorrt_llm/1/model.py` of NVIDIA/TensorRT-LLM does, where clients can
tell: every part of a stream carries the whole answer so far, `finish_reason` is the word `None` until the end, nothing
is counted, and a request with stop sequences fails, because they reach the tokenizer as bytes.
"""

from typing import Any, Final

import numpy as np

from deploy.triton.backend import Backend, send_error
from deploy.triton.contract import LLM_API_PREFIX
from deploy.triton.request import GenerationRequest, InvalidRequestError, Tensors, read_request

DEFAULT_MAX_TOKENS: Final = 32
"""Of the LLM API's `SamplingParams`."""

_RENAMED: Final = {"exclude_input_from_output": "exclude_input_in_output"}


def read_llm_api_request(tensors: Tensors, *, decoupled: bool) -> GenerationRequest:
    """Check the tensors of one request.

    Args:
        decoupled: the model may stream.

    Raises:
        InvalidRequestError: one is missing, of the wrong shape, or out of range, or cannot be served.
    """
    said = "Error generating request: "
    if "sampling_param_stop" in tensors:
        raise InvalidRequestError(said + "TextInputSequence must be str")
    translated = {name: array for name, array in tensors.items() if not name.startswith(LLM_API_PREFIX)}
    for name, array in tensors.items():
        if name.startswith(LLM_API_PREFIX):
            bare = name.removeprefix(LLM_API_PREFIX)
            translated[_RENAMED.get(bare, bare)] = array
    if "streaming" in translated:
        translated["stream"] = translated.pop("streaming")
    translated.setdefault("max_tokens", np.array([DEFAULT_MAX_TOKENS], dtype=np.int32))
    if translated["text_input"].ndim != 1:
        raise InvalidRequestError(said + "The current implementation only supports text_input being a 1D tensor.")
    try:
        request = read_request(translated)
    except InvalidRequestError as error:
        raise InvalidRequestError(f"{said}{error}") from error
    if request.stream and not decoupled:
        raise InvalidRequestError(said + "Streaming is only supported in decoupled mode.")
    return request


class LlmApiReply:
    """The answer to one request, sent in one or several responses; not for use by two threads at once."""

    __slots__ = ("_backend", "_request", "_sender", "_text", "_tokens")

    def __init__(self, backend: Backend, sender: Any, request: GenerationRequest) -> None:  # noqa: ANN401
        self._backend = backend
        self._sender = sender
        self._request = request
        self._text = request.text if request.echoes_input else ""
        self._tokens = 0

    @property
    def streams(self) -> bool:
        """Whether the client wants every step's tokens as they come."""
        return self._request.stream

    def send(self, text: str, *, tokens: int, final: bool) -> None:
        """Send the answer so far.

        Args:
            text: its newest part.
            tokens: how many tokens `text` is.
        """
        backend = self._backend
        self._text += text
        self._tokens += tokens
        tensors = [backend.Tensor("text_output", np.array([self._text.encode("utf-8")], dtype=np.object_))]
        if self._request.return_finish_reason:
            reason = "length" if self._tokens >= self._request.max_tokens else "stop"
            word = str(reason if final else None)
            tensors.append(backend.Tensor("finish_reason", np.array([word], dtype=np.object_)))
        self._sender.send(backend.InferenceResponse(output_tensors=tensors), flags=self._flags(final=final))

    def fail(self, message: str) -> None:
        """End the answer with an error."""
        send_error(self._backend, self._sender, message)

    def end_cancelled(self) -> None:
        """End an answer that its client no longer waits for."""
        error = self._backend.TritonError("Request cancelled by client", self._backend.TritonError.CANCELLED)
        self._sender.send(self._backend.InferenceResponse(error=error), flags=self._flags(final=True))

    def is_cancelled(self) -> bool:
        """Whether the client no longer waits."""
        return bool(self._sender.is_cancelled())

    def _flags(self, *, final: bool) -> int:
        return int(self._backend.TRITONSERVER_RESPONSE_COMPLETE_FINAL) if final else 0
