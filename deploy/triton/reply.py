"""Sends the answer to a request through Triton's Python backend, by either contract."""

from typing import Any, Final

import numpy as np

from deploy.triton.energy import Backend
from deploy.triton.request import GenerationRequest

PLACEHOLDER_LOG_PROB: Final = -1.0
"""For models that have no probabilities."""


class Reply:
    """The answer to one request of the `ensemble` contract, in one or more responses; not thread-safe.

    Attributes:
        input_tokens: length of the prompt; a model that learns it later may set it before the last response.
    """

    __slots__ = ("_backend", "_log_probs", "_request", "_sender", "input_tokens")

    def __init__(self, backend: Backend, sender: Any, request: GenerationRequest, *, input_tokens: int) -> None:  # noqa: ANN401
        self._backend = backend
        self._sender = sender
        self._request = request
        self.input_tokens = input_tokens
        self._log_probs: list[float] = []

    @property
    def streams(self) -> bool:
        """Whether the client wants each step's tokens as they are generated."""
        return self._request.stream

    def send(self, text: str, *, tokens: int, final: bool, log_probs: list[float] | None = None) -> None:
        """Send the next part of the answer.

        As in TensorRT-LLM, `num_output_tokens` counts the tokens of this response, and `output_log_probs` covers all
        tokens so far. An answer that is not streamed begins with the prompt unless the client excluded it, and its
        token count then includes the prompt's tokens.

        Args:
            tokens: number of tokens in `text`.
            log_probs: of these tokens; None where the model has none.
        """
        backend, request = self._backend, self._request
        if request.echoes_input:
            text, tokens = request.text + text, tokens + self.input_tokens
        tensors = [_text_tensor(backend, "text_output", text)]
        if request.return_log_probs:
            added = tokens - (self.input_tokens if request.echoes_input else 0)
            self._log_probs += log_probs if log_probs is not None else [PLACEHOLDER_LOG_PROB] * added
            tensors += [
                backend.Tensor("cum_log_probs", np.array([[sum(self._log_probs)]], dtype=np.float32)),
                backend.Tensor("output_log_probs", np.array([[self._log_probs]], dtype=np.float32)),
            ]
        if request.return_num_input_tokens:
            tensors.append(backend.Tensor("num_input_tokens", np.array([[self.input_tokens]], dtype=np.int32)))
        if request.return_num_output_tokens:
            tensors.append(backend.Tensor("num_output_tokens", np.array([[tokens]], dtype=np.int32)))
        _send(backend, self._sender, tensors, final=final)

    def fail(self, message: str, *, invalid: bool = False) -> None:
        """End the answer with an error; `invalid` if the request is invalid."""
        send_error(self._backend, self._sender, message, invalid=invalid)

    def end_cancelled(self) -> None:
        """End an answer whose client has cancelled it."""
        _send_cancelled(self._backend, self._sender, "the client cancelled the request")

    def is_cancelled(self) -> bool:
        """Whether the client has cancelled the request."""
        return bool(self._sender.is_cancelled())


class LlmApiReply:
    """The answer to one request of the `llm-api` contract, in one or more responses; not thread-safe.

    As in `triton_backend/all_models/llmapi/tensorrt_llm/1/model.py` of NVIDIA/TensorRT-LLM, each response carries the
    whole answer so far, `finish_reason` is the string `None` before the end, and nothing is counted.
    """

    __slots__ = ("_backend", "_request", "_sender", "_text", "_tokens")

    def __init__(self, backend: Backend, sender: Any, request: GenerationRequest) -> None:  # noqa: ANN401
        self._backend = backend
        self._sender = sender
        self._request = request
        self._text = request.text if request.echoes_input else ""
        self._tokens = 0

    @property
    def streams(self) -> bool:
        """Whether the client wants each step's tokens as they are generated."""
        return self._request.stream

    def send(self, text: str, *, tokens: int, final: bool) -> None:
        """Send the answer so far.

        Args:
            text: its newest part.
            tokens: number of tokens in `text`.
        """
        self._text += text
        self._tokens += tokens
        tensors = [_text_tensor(self._backend, "text_output", self._text)]
        if self._request.return_finish_reason:
            reason = "length" if self._tokens >= self._request.max_tokens else "stop"
            tensors.append(_text_tensor(self._backend, "finish_reason", str(reason if final else None)))
        _send(self._backend, self._sender, tensors, final=final)

    def fail(self, message: str) -> None:
        """End the answer with an error."""
        send_error(self._backend, self._sender, message)

    def end_cancelled(self) -> None:
        """End an answer whose client has cancelled it."""
        _send_cancelled(self._backend, self._sender, "Request cancelled by client")

    def is_cancelled(self) -> bool:
        """Whether the client has cancelled the request."""
        return bool(self._sender.is_cancelled())


def send_error(backend: Backend, sender: Any, message: str, *, invalid: bool = False) -> None:  # noqa: ANN401
    """Answer a request with an error.

    Args:
        invalid: the request itself is invalid.
    """
    code = backend.TritonError.INVALID_ARG if invalid else backend.TritonError.INTERNAL
    _send_failure(backend, sender, message, code)


def _send_cancelled(backend: Backend, sender: Any, message: str) -> None:  # noqa: ANN401
    _send_failure(backend, sender, message, backend.TritonError.CANCELLED)


def _send_failure(backend: Backend, sender: Any, message: str, code: Any) -> None:  # noqa: ANN401
    response = backend.InferenceResponse(error=backend.TritonError(message, code))
    sender.send(response, flags=backend.TRITONSERVER_RESPONSE_COMPLETE_FINAL)


def _send(backend: Backend, sender: Any, tensors: list[Any], *, final: bool) -> None:  # noqa: ANN401
    flags = int(backend.TRITONSERVER_RESPONSE_COMPLETE_FINAL) if final else 0
    sender.send(backend.InferenceResponse(output_tensors=tensors), flags=flags)


def _text_tensor(backend: Backend, name: str, text: str) -> Any:  # noqa: ANN401
    return backend.Tensor(name, np.array([text.encode("utf-8")], dtype=np.object_))
