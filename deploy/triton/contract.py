"""The tensors of TensorRT-LLM's models on Triton, as their clients see them.

Names, types and shapes follow NVIDIA/TensorRT-LLM: contract `ensemble` is
`triton_backend/all_models/inflight_batcher_llm/ensemble/config.pbtxt` (INT32 counts; `max_tokens` is required),
contract `llm-api` is `triton_backend/all_models/llmapi/tensorrt_llm/config.pbtxt`. Models here leave out the tensors
that only make sense on a GPU or concern other things than one text (prompt tables, LoRA weights, images, logits,
KV-cache statistics): a request that carries one is answered by Triton's own error, which names it.
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
        dims: shape without the batch dimension; -1 is any.
    """

    name: str
    data_type: str
    dims: tuple[int, ...] = (1,)
    optional: bool = True


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
    TensorSpec("top_k", "INT32"),
    TensorSpec("top_p", "FP32"),
    TensorSpec("temperature", "FP32"),
    TensorSpec("length_penalty", "FP32"),
    TensorSpec("repetition_penalty", "FP32"),
    TensorSpec("min_tokens", "INT32"),
    TensorSpec("presence_penalty", "FP32"),
    TensorSpec("frequency_penalty", "FP32"),
    TensorSpec("seed", "UINT64"),
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

_LLM_API_INPUTS: Final = (
    TensorSpec("text_input", "STRING", (-1,), optional=False),
    TensorSpec("streaming", "BOOL"),
    TensorSpec("sampling_param_best_of", "INT32"),
    TensorSpec("sampling_param_temperature", "FP32"),
    TensorSpec("sampling_param_top_k", "INT32"),
    TensorSpec("sampling_param_top_p", "FP32"),
    TensorSpec("sampling_param_frequency_penalty", "FP32"),
    TensorSpec("sampling_param_presence_penalty", "FP32"),
    TensorSpec("sampling_param_max_tokens", "INT32"),
    TensorSpec("sampling_param_stop", "STRING", (-1,)),
    TensorSpec("sampling_param_seed", "UINT64"),
    TensorSpec("sampling_param_exclude_input_from_output", "BOOL"),
    TensorSpec("return_finish_reason", "BOOL"),
)

_LLM_API_OUTPUTS: Final = (TensorSpec("text_output", "STRING", (-1,)), TensorSpec("finish_reason", "STRING", (-1,)))


@dataclass(frozen=True, slots=True)
class ContractSpec:
    """A set of tensors.

    Attributes:
        max_batch_size: first dimension that Triton allows; 0: tensors have no dimension for a batch.
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
