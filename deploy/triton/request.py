"""One generation request: read from its tensors and checked, before any energy is spent on it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Tensors = Mapping[str, NDArray[Any]]
"""Input tensors by name; strings are object arrays of UTF-8 bytes."""

LARGEST_MAX_TOKENS = 1_000_000
"""Far above any model's context; a larger number is a mistake of units."""


class InvalidRequestError(ValueError):
    """A tensor is missing or its value does not do; the message names it and says what to send."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """What a client asks for.

    Attributes:
        text: the prompt, with its chat template already applied.
        max_tokens: most tokens to generate.
        stop_words: generation ends after the first of these; as in TensorRT-LLM the word itself is part of the output.
        stream: one response for the tokens of each step, else a single one at the end.
        exclude_input: leave the prompt out of the output; a streamed output never has it.
        return_log_probs, return_num_input_tokens, return_num_output_tokens, return_finish_reason: outputs that the
            client wants as well.
        temperature, top_p, top_k, seed: sampling; null means the model's default.
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
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    min_tokens: int = 0

    @property
    def echoes_input(self) -> bool:
        """Whether the output begins with the prompt: TensorRT-LLM's default when it does not stream."""
        return not self.stream and not self.exclude_input


def read_request(tensors: Tensors) -> GenerationRequest:
    """Check the tensors of one request.

    Raises:
        InvalidRequestError: one is missing, of the wrong shape, or out of range.
    """
    text = _text(tensors)
    max_tokens = _integer(tensors, "max_tokens")
    if max_tokens is None:
        raise InvalidRequestError("'max_tokens' is missing: send the most tokens to generate, as INT32 of shape [1, 1]")
    if not 1 <= max_tokens <= LARGEST_MAX_TOKENS:
        raise InvalidRequestError(f"'max_tokens' must lie between 1 and {LARGEST_MAX_TOKENS}, got {max_tokens}")
    _refuse_unsupported(tensors)
    top_k = _integer(tensors, "top_k")
    if top_k is not None and top_k < 0:
        raise InvalidRequestError(f"'top_k' must not be negative, got {top_k}")
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
        temperature=_number(tensors, "temperature", least=0.0),
        top_p=_number(tensors, "top_p", least=0.0, most=1.0),
        top_k=top_k,
        repetition_penalty=_number(tensors, "repetition_penalty", least=0.0),
        presence_penalty=_number(tensors, "presence_penalty"),
        frequency_penalty=_number(tensors, "frequency_penalty"),
        seed=_integer(tensors, "seed"),
        min_tokens=max(0, _integer(tensors, "min_tokens") or 0),
    )


def _text(tensors: Tensors) -> str:
    value = _single(tensors, "text_input")
    if value is None:
        raise InvalidRequestError("'text_input' is missing: send the prompt, as BYTES of shape [1, 1]")
    text = _decoded("text_input", value)
    if not text.strip():
        raise InvalidRequestError("'text_input' is empty: send the prompt")
    return text


def _refuse_unsupported(tensors: Tensors) -> None:
    for name in ("beam_width", "num_return_sequences"):
        count = _integer(tensors, name)
        if count is not None and count != 1:
            raise InvalidRequestError(f"'{name}' must be 1 here, got {count}: send one request for each answer")
    for name in ("return_context_logits", "return_generation_logits"):
        if _flag(tensors, name):
            raise InvalidRequestError(f"'{name}' cannot be served here: leave it out or send false")


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


def _number(tensors: Tensors, name: str, *, least: float = -np.inf, most: float = np.inf) -> float | None:
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
