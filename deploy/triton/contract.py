"""The tensors of TensorRT-LLM's models on Triton, as clients see them; standard library only.

Names, types and shapes follow NVIDIA/TensorRT-LLM: contract `ensemble` is
`triton_backend/all_models/inflight_batcher_llm/ensemble/config.pbtxt` (INT32 counts; `max_tokens` is required),
contract `llm-api` is `triton_backend/all_models/llmapi/tensorrt_llm/config.pbtxt`. The models here omit the tensors
that need a GPU or concern more than one text (prompt tables, LoRA weights, images, logits, KV-cache statistics): Triton
itself rejects a request that carries one, and names it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Literal, get_args

ContractName = Literal["ensemble", "llm-api"]
CONTRACT_NAMES: Final[tuple[ContractName, ...]] = get_args(ContractName)


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One input or output.

    Attributes:
        data_type: as in a model configuration, without `TYPE_`.
        dims: shape without the batch dimension; -1 is any size.
    """

    name: str
    data_type: str
    dims: tuple[int, ...] = (1,)
    optional: bool = True


SAMPLING: Final = (
    TensorSpec("top_k", "INT32"),
    TensorSpec("top_p", "FP32"),
    TensorSpec("temperature", "FP32"),
    TensorSpec("repetition_penalty", "FP32"),
    TensorSpec("min_tokens", "INT32"),
    TensorSpec("presence_penalty", "FP32"),
    TensorSpec("frequency_penalty", "FP32"),
    TensorSpec("seed", "UINT64"),
)
"""Sampling parameters by the names of `shared.messages.SamplingParameters`, which the model servers cannot import."""

INPUTS: Final = (
    TensorSpec("text_input", "STRING", optional=False),
    TensorSpec("decoder_text_input", "STRING"),
    TensorSpec("max_tokens", "INT32", optional=False),
    TensorSpec("num_return_sequences", "INT32"),
    TensorSpec("bad_words", "STRING", (-1,)),
    TensorSpec("stop_words", "STRING", (-1,)),
    TensorSpec("exclude_input_in_output", "BOOL"),
    TensorSpec("end_id", "INT32"),
    TensorSpec("pad_id", "INT32"),
    *SAMPLING,
    TensorSpec("length_penalty", "FP32"),
    TensorSpec("return_log_probs", "BOOL"),
    TensorSpec("return_context_logits", "BOOL"),
    TensorSpec("return_generation_logits", "BOOL"),
    TensorSpec("return_perf_metrics", "BOOL"),
    TensorSpec("return_num_input_tokens", "BOOL"),
    TensorSpec("return_num_output_tokens", "BOOL"),
    TensorSpec("beam_width", "INT32"),
    TensorSpec("stream", "BOOL"),
)

OUTPUTS: Final = (
    TensorSpec("text_output", "STRING", (-1,)),
    TensorSpec("cum_log_probs", "FP32", (-1,)),
    TensorSpec("output_log_probs", "FP32", (-1, -1)),
    TensorSpec("num_input_tokens", "INT32"),
    TensorSpec("num_output_tokens", "INT32"),
)

LLM_API_PREFIX: Final = "sampling_param_"

_NOT_IN_LLM_API: Final = frozenset({"min_tokens", "repetition_penalty"})

_LLM_API_INPUTS: Final = (
    TensorSpec("text_input", "STRING", (-1,), optional=False),
    TensorSpec("streaming", "BOOL"),
    TensorSpec("sampling_param_best_of", "INT32"),
    *(TensorSpec(LLM_API_PREFIX + one.name, one.data_type) for one in SAMPLING if one.name not in _NOT_IN_LLM_API),
    TensorSpec("sampling_param_max_tokens", "INT32"),
    TensorSpec("sampling_param_stop", "STRING", (-1,)),
    TensorSpec("sampling_param_exclude_input_from_output", "BOOL"),
    TensorSpec("return_finish_reason", "BOOL"),
)

_LLM_API_OUTPUTS: Final = (TensorSpec("text_output", "STRING", (-1,)), TensorSpec("finish_reason", "STRING", (-1,)))


@dataclass(frozen=True, slots=True)
class ContractSpec:
    """The tensors of one contract.

    Attributes:
        max_batch_size: largest first dimension that Triton accepts; 0: tensors have no batch dimension.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    max_batch_size: int


CONTRACTS: Final[Mapping[ContractName, ContractSpec]] = MappingProxyType(
    {
        "ensemble": ContractSpec(INPUTS, OUTPUTS, 64),
        # "The current implementation does not support batching", says its model.yaml.
        "llm-api": ContractSpec(_LLM_API_INPUTS, _LLM_API_OUTPUTS, 0),
    }
)
