"""The tensors of TensorRT-LLM's `ensemble` model, as its clients see them.

Names, types and shapes follow `triton_backend/all_models/inflight_batcher_llm/ensemble/config.pbtxt` of
NVIDIA/TensorRT-LLM (INT32 counts; `max_tokens` is required). Models here leave out the tensors that only make sense
on a GPU (prompt tables, LoRA weights, logits, KV-cache statistics): a request that carries one is answered by
Triton's own error, which names it.
"""

from dataclasses import dataclass
from typing import Final

MAX_BATCH_SIZE: Final = 64
"""First dimension that Triton allows; clients send `[1, 1]` tensors because it is not 0."""


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
