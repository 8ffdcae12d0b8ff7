"""The two sets of tensors by which TensorRT-LLM's models on Triton are asked, of NVIDIA/TensorRT-LLM.

`ENSEMBLE` is that of the models `ensemble` and `tensorrt_llm_bls`
(`triton_backend/all_models/inflight_batcher_llm/*/config.pbtxt`); releases differ in which tensors exist, in integer
types, and in names. `LLM_API` is that of the one model `tensorrt_llm` around the LLM API
(`triton_backend/all_models/llmapi/tensorrt_llm`). What is peculiar to each is told in
`docs/decisions/0011-model-server-contracts.md`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialect:
    """Names of the tensors by what they mean; the first that a model has is used.

    Attributes:
        name: for logs and documents.
        stop: where the server is told of stop sequences; empty: it is not, and they are enforced here alone.
        flags: switches that ask for the outputs below; all that a model has are set.
        cumulative: a part of a stream carries the whole answer so far; otherwise what is new.
        may_be_empty: inputs that some releases require and that say nothing when they are empty.
        refusals: what the server's words about a request at fault contain, where it gives them no status of their own.
    """

    name: str
    text_input: tuple[str, ...]
    max_tokens: tuple[str, ...]
    stop: tuple[str, ...] = ()
    stream: tuple[str, ...]
    exclude_input: tuple[str, ...]
    sampling: Mapping[str, tuple[str, ...]]
    text_output: tuple[str, ...]
    prompt_tokens: tuple[str, ...] = ()
    completion_tokens: tuple[str, ...] = ()
    finish_reason: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    cumulative: bool = False
    may_be_empty: frozenset[str] = frozenset()
    refusals: tuple[str, ...] = ()


ENSEMBLE: Final = Dialect(
    name="ensemble",
    text_input=("text_input",),
    max_tokens=("max_tokens",),
    stop=("stop_words",),
    stream=("stream",),
    exclude_input=("exclude_input_in_output",),
    sampling=MappingProxyType(
        {
            "temperature": ("temperature",),
            "top_p": ("top_p",),
            "top_k": ("top_k",),
            "min_tokens": ("min_tokens", "min_length"),
            "repetition_penalty": ("repetition_penalty",),
            "presence_penalty": ("presence_penalty",),
            "frequency_penalty": ("frequency_penalty",),
            "seed": ("seed", "random_seed"),
        }
    ),
    text_output=("text_output",),
    prompt_tokens=("num_input_tokens",),
    completion_tokens=("num_output_tokens",),
    flags=("return_num_input_tokens", "return_num_output_tokens"),
    # Required by the first releases; an empty word is none.
    may_be_empty=frozenset({"stop_words", "bad_words"}),
)

LLM_API: Final = Dialect(
    name="llm-api",
    text_input=("text_input",),
    max_tokens=("sampling_param_max_tokens",),
    # `sampling_param_stop` exists, but the model hands its bytes to a tokenizer that only takes text, so that every
    # request with one fails; `stop` is a flag that cancels the request of the same id.
    stop=(),
    stream=("streaming",),
    exclude_input=("sampling_param_exclude_input_from_output",),
    sampling=MappingProxyType(
        {
            name: (f"sampling_param_{name}",)
            for name in (
                "temperature", "top_p", "top_k", "min_tokens", "repetition_penalty", "presence_penalty",
                "frequency_penalty", "seed",
            )
        }
    ),
    text_output=("text_output",),
    finish_reason=("finish_reason",),
    flags=("return_finish_reason",),
    cumulative=True,
    # Its errors all have the status INTERNAL.
    refusals=("sum of prompt length", "default_max_tokens", "text_input is missing"),
)  # fmt: skip

DIALECTS: Final = (ENSEMBLE, LLM_API)
"""Tried in order; the input that limits the tokens tells them apart."""
