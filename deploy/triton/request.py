"""Reads and checks a generation request, from the tensors of either contract, before it costs any energy."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from deploy.triton.contract import LLM_API_PREFIX, SAMPLING

Tensors = Mapping[str, NDArray[Any]]
"""Input tensors by name; strings are object arrays of UTF-8 bytes."""

LARGEST_MAX_TOKENS: Final = 1_000_000
"""Far above any model's context; a larger number is a mistake of units."""

LLM_API_DEFAULT_MAX_TOKENS: Final = 32
"""The default of the LLM API's `SamplingParams`."""

_LLM_API_NAMES: Final = {"exclude_input_from_output": "exclude_input_in_output"}
"""Inputs of the LLM API whose names differ in the `ensemble` contract."""

_BOUNDS: Final = {"temperature": (0.0, np.inf), "top_p": (0.0, 1.0), "repetition_penalty": (0.0, np.inf)}
"""Least and greatest value of sampling parameters that are not free."""


class InvalidRequestError(ValueError):
    """A tensor is missing or has an unusable value; the message names it and says what to send."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """A checked request.

    Attributes:
        text: the prompt, with its chat template already applied.
        max_tokens: most tokens to generate.
        stop_words: generation ends after the first of these; as in TensorRT-LLM the word itself is part of the output.
        stream: one response for the tokens of each step, otherwise a single one at the end.
        exclude_input: leave the prompt out of the output; a streamed output never has it.
        return_log_probs, return_num_input_tokens, return_num_output_tokens, return_finish_reason: further outputs that
            the client wants.
        sampling: the sampling parameters that are set, by their names in `SAMPLING`.
    """

    text: str
    max_tokens: int
    stop_words: tuple[str, ...] = ()
    stream: bool = False
    exclude_input: bool = False
    return_log_probs: bool = False
    return_num_input_tokens: bool = False
    return_num_output_tokens: bool = False
    return_finish_reason: bool = False
    sampling: Mapping[str, float] = field(default_factory=dict)

    @property
    def echoes_input(self) -> bool:
        """Whether the output begins with the prompt: TensorRT-LLM's default when it does not stream."""
        return not self.stream and not self.exclude_input


def tensors_of(request: Any) -> dict[str, NDArray[Any]]:  # noqa: ANN401 - the backend's request
    """The inputs that a request of the Python backend carries, by name."""
    return {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}


def read_request(tensors: Tensors) -> GenerationRequest:
    """Read a request of the `ensemble` contract.

    Raises:
        InvalidRequestError: a tensor is missing, has the wrong shape, or is out of range.
    """
    text = _text(tensors)
    max_tokens = _integer(tensors, "max_tokens")
    if max_tokens is None:
        raise InvalidRequestError("'max_tokens' is missing: send the most tokens to generate, as INT32 of shape [1, 1]")
    if not 1 <= max_tokens <= LARGEST_MAX_TOKENS:
        raise InvalidRequestError(f"'max_tokens' must lie between 1 and {LARGEST_MAX_TOKENS}, got {max_tokens}")
    _reject_unsupported(tensors)
    return GenerationRequest(
        text=text,
        max_tokens=max_tokens,
        stop_words=_words(tensors, "stop_words"),
        stream=_flag(tensors, "stream"),
        exclude_input=_flag(tensors, "exclude_input_in_output"),
        return_log_probs=_flag(tensors, "return_log_probs"),
        return_num_input_tokens=_flag(tensors, "return_num_input_tokens"),
        return_num_output_tokens=_flag(tensors, "return_num_output_tokens"),
        return_finish_reason=_flag(tensors, "return_finish_reason"),
        sampling=_sampling(tensors),
    )


def read_llm_api_request(tensors: Tensors, *, decoupled: bool) -> GenerationRequest:
    """Read a request of the `llm-api` contract.

    It is rejected where TensorRT-LLM's `triton_backend/all_models/llmapi/tensorrt_llm/1/model.py` rejects it: a request
    with stop sequences fails, because they reach the tokenizer as bytes.

    Args:
        decoupled: the model can stream.

    Raises:
        InvalidRequestError: a tensor is missing, has the wrong shape, is out of range, or is not supported.
    """
    prefix = "Error generating request: "
    if "sampling_param_stop" in tensors:
        raise InvalidRequestError(prefix + "TextInputSequence must be str")
    renamed: dict[str, NDArray[Any]] = {}
    for name, array in tensors.items():
        bare = name.removeprefix(LLM_API_PREFIX)
        renamed[_LLM_API_NAMES.get(bare, bare)] = array
    if "streaming" in renamed:
        renamed["stream"] = renamed.pop("streaming")
    renamed.setdefault("max_tokens", np.array([LLM_API_DEFAULT_MAX_TOKENS], dtype=np.int32))
    if renamed["text_input"].ndim != 1:
        raise InvalidRequestError(prefix + "The current implementation only supports text_input being a 1D tensor.")
    try:
        request = read_request(renamed)
    except InvalidRequestError as error:
        raise InvalidRequestError(f"{prefix}{error}") from error
    if request.stream and not decoupled:
        raise InvalidRequestError(prefix + "Streaming is only supported in decoupled mode.")
    return request


def _text(tensors: Tensors) -> str:
    value = _single(tensors, "text_input")
    if value is None:
        raise InvalidRequestError("'text_input' is missing: send the prompt, as BYTES of shape [1, 1]")
    text = _decoded("text_input", value)
    if not text.strip():
        raise InvalidRequestError("'text_input' is empty: send the prompt")
    return text


def _sampling(tensors: Tensors) -> dict[str, float]:
    given: dict[str, float] = {}
    for tensor in SAMPLING:
        least, most = _BOUNDS.get(tensor.name, (-np.inf, np.inf))
        value = (
            _number(tensors, tensor.name, least=least, most=most)
            if tensor.data_type == "FP32"
            else _integer(tensors, tensor.name)
        )
        if value is not None:
            given[tensor.name] = value
    if given.get("top_k", 0) < 0:
        raise InvalidRequestError(f"'top_k' must not be negative, got {given['top_k']}")
    return given


def _reject_unsupported(tensors: Tensors) -> None:
    for name in ("beam_width", "num_return_sequences"):
        count = _integer(tensors, name)
        if count is not None and count != 1:
            raise InvalidRequestError(f"'{name}' must be 1 here, got {count}: send one request for each answer")
    for name in ("return_context_logits", "return_generation_logits"):
        if _flag(tensors, name):
            raise InvalidRequestError(f"'{name}' is not supported here: leave it out or send false")


def _single(tensors: Tensors, name: str) -> Any | None:  # noqa: ANN401 - what a numpy array holds
    array = tensors.get(name)
    if array is None:
        return None
    if array.size != 1:
        raise InvalidRequestError(
            f"'{name}' must hold one value, got shape {list(array.shape)}: batches are not supported, "
            "send one request for each prompt"
        )
    return array.reshape(-1)[0]


def _integer(tensors: Tensors, name: str) -> int | None:
    value = _single(tensors, name)
    return None if value is None else int(value)


def _flag(tensors: Tensors, name: str) -> bool:
    value = _single(tensors, name)
    return False if value is None else bool(value)


def _number(tensors: Tensors, name: str, *, least: float, most: float) -> float | None:
    value = _single(tensors, name)
    if value is None:
        return None
    number = float(value)
    if not (np.isfinite(number) and least <= number <= most):
        raise InvalidRequestError(f"'{name}' must be a number between {least:g} and {most:g}, got {number}")
    return number


def _words(tensors: Tensors, name: str) -> tuple[str, ...]:
    array = tensors.get(name)
    if array is None:
        return ()
    words = (_decoded(name, value) for value in array.reshape(-1))
    return tuple(word for word in words if word)


def _decoded(name: str, value: object) -> str:
    if isinstance(value, str):
        return value
    if not isinstance(value, bytes):
        raise InvalidRequestError(f"'{name}' must be BYTES, got {type(value).__name__}")
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidRequestError(f"'{name}' is not UTF-8: {error}") from error
