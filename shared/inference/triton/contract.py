"""The tensors of a model on Triton: two known contracts, and which of their tensors a model has.

`ENSEMBLE` is the contract of TensorRT-LLM's models `ensemble` and `tensorrt_llm_bls`
(`triton_backend/all_models/inflight_batcher_llm/*/config.pbtxt` in NVIDIA/TensorRT-LLM); releases differ in which
tensors exist, in integer types, and in names. `LLM_API` is the contract of the model `tensorrt_llm` that wraps the LLM
API (`triton_backend/all_models/llmapi/tensorrt_llm`). `docs/decisions/0011-model-server-contracts.md` compares them.

A model's own configuration determines its contract, so there is no setting for it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final, Self

from tritonclient.grpc.model_config_pb2 import DataType, ModelConfig

from shared.inference.base import SAMPLING_FIELDS, Capabilities


class ContractError(ValueError):
    """A model has neither contract; the message says which tensors are missing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorContract:
    """Tensor names by meaning. Where releases differ, the first name that a model has is used.

    Attributes:
        name: for logs and documents.
        stop: input for stop sequences; empty: there is none that works, so the client cuts the text itself.
        flags: switches that request the outputs below; all that a model has are set.
        cumulative: each part of a stream carries the whole answer so far; otherwise only the new text.
        may_be_empty: inputs that some releases require and that have no effect when they are empty.
        error_status: the gRPC status of an error shows whether the request is invalid.
        invalid_request_phrases: parts of the server's error messages that show it, where the status does not.
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
    error_status: bool = True
    invalid_request_phrases: tuple[str, ...] = ()


ENSEMBLE: Final = TensorContract(
    name="ensemble",
    text_input=("text_input",),
    max_tokens=("max_tokens",),
    stop=("stop_words",),
    stream=("stream",),
    exclude_input=("exclude_input_in_output",),
    sampling=MappingProxyType(
        {name: (name,) for name in SAMPLING_FIELDS}
        | {"min_tokens": ("min_tokens", "min_length"), "seed": ("seed", "random_seed")}
    ),
    text_output=("text_output",),
    prompt_tokens=("num_input_tokens",),
    completion_tokens=("num_output_tokens",),
    flags=("return_num_input_tokens", "return_num_output_tokens"),
    # Required by the first releases; an empty word has no effect.
    may_be_empty=frozenset({"stop_words", "bad_words"}),
)

LLM_API: Final = TensorContract(
    name="llm-api",
    text_input=("text_input",),
    max_tokens=("sampling_param_max_tokens",),
    # `sampling_param_stop` exists, but the model passes its bytes to a tokenizer that accepts only str, so that every
    # request with one fails. `stop` is a flag that cancels the request of the same id.
    stop=(),
    stream=("streaming",),
    exclude_input=("sampling_param_exclude_input_from_output",),
    sampling=MappingProxyType({name: (f"sampling_param_{name}",) for name in SAMPLING_FIELDS}),
    text_output=("text_output",),
    finish_reason=("finish_reason",),
    flags=("return_finish_reason",),
    cumulative=True,
    # All its errors have the status INTERNAL.
    error_status=False,
    invalid_request_phrases=("sum of prompt length", "default_max_tokens", "text_input is missing"),
)

CONTRACTS: Final = (ENSEMBLE, LLM_API)
"""Tried in order; the input that limits the tokens distinguishes them."""


@dataclass(frozen=True, slots=True)
class Input:
    """An input tensor of a model.

    Attributes:
        datatype: as in the inference protocol: `BYTES`, `INT32`, ...
    """

    name: str
    datatype: str
    optional: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelContract:
    """The tensors of one model; None where the model does not have the tensor.

    Attributes:
        model: its name on the server.
        name: of its `TensorContract`.
        batched: tensors have a leading batch dimension (`max_batch_size` > 0).
        decoupled: it answers over a stream, in any number of responses; otherwise each request has one response.
        cumulative: each part of a stream carries the whole answer so far.
        sampling: inputs by field of `GenerationParameters`.
        flags: switches that request the outputs below.
        empty: inputs that must be sent although they are empty.
        error_status, invalid_request_phrases: see `TensorContract`.
    """

    model: str
    name: str
    batched: bool
    decoupled: bool
    cumulative: bool = False
    text_input: Input
    max_tokens: Input
    text_output: str
    stop: Input | None = None
    stream: Input | None = None
    exclude_input: Input | None = None
    sampling: Mapping[str, Input] = field(default_factory=dict)
    flags: tuple[Input, ...] = ()
    prompt_tokens: str | None = None
    completion_tokens: str | None = None
    finish_reason: str | None = None
    empty: tuple[Input, ...] = ()
    error_status: bool = True
    invalid_request_phrases: tuple[str, ...] = ()

    @property
    def outputs(self) -> tuple[str, ...]:
        """The outputs to request; a model may have large ones that are not needed."""
        used = (self.text_output, self.prompt_tokens, self.completion_tokens, self.finish_reason)
        return tuple(name for name in used if name is not None)

    @property
    def capabilities(self) -> Capabilities:
        """The features that the model supports."""
        return Capabilities(
            streaming=self.decoupled,
            counts_tokens=self.completion_tokens is not None,
            stop_sequences=self.stop is not None,
            sampling_fields=frozenset(self.sampling),
        )

    def must_stream(self, *, tokenizer: bool, stops: bool) -> bool:
        """Whether only a stream can count the tokens, or stop the server at a stop sequence that it does not support.

        Args:
            tokenizer: the client can count tokens itself.
            stops: the request has stop sequences.
        """
        return (self.completion_tokens is None and not tokenizer) or (self.stop is None and stops)

    @classmethod
    def from_config(cls, config: ModelConfig) -> Self:
        """Read a model's configuration.

        Raises:
            ContractError: it has neither contract, or requires an input that is not known.
        """
        inputs = {one.name: Input(one.name, _datatype(one.data_type), bool(one.optional)) for one in config.input}
        outputs = {one.name for one in config.output}
        for contract in CONTRACTS:
            text_input, max_tokens = _input(contract.text_input, inputs), _input(contract.max_tokens, inputs)
            text_output = _first(contract.text_output, outputs)
            if text_input is not None and max_tokens is not None and text_output is not None:
                break
        else:
            expected = " or ".join(f"{one.text_input[0]} and {one.max_tokens[0]}" for one in CONTRACTS)
            raise ContractError(
                f"model {config.name!r} has inputs {', '.join(sorted(inputs)) or 'none'} and outputs "
                f"{', '.join(sorted(outputs)) or 'none'}: a text model has the inputs {expected}, and the output "
                "text_output; check 'triton_model' in the fleet file"
            )
        used = {text_input.name, max_tokens.name}
        required = tuple(one for one in inputs.values() if not one.optional and one.name not in used)
        unknown = [one.name for one in required if one.name not in contract.may_be_empty]
        if unknown:
            raise ContractError(f"model {config.name!r} requires inputs that are not known: {', '.join(unknown)}")
        sampling = {name: _input(names, inputs) for name, names in contract.sampling.items()}
        return cls(
            model=config.name,
            name=contract.name,
            batched=config.max_batch_size > 0,
            decoupled=bool(config.model_transaction_policy.decoupled),
            cumulative=contract.cumulative,
            text_input=text_input,
            max_tokens=max_tokens,
            text_output=text_output,
            stop=_input(contract.stop, inputs),
            stream=_input(contract.stream, inputs),
            exclude_input=_input(contract.exclude_input, inputs),
            sampling=MappingProxyType({name: found for name, found in sampling.items() if found is not None}),
            flags=tuple(inputs[name] for name in contract.flags if name in inputs),
            prompt_tokens=_first(contract.prompt_tokens, outputs),
            completion_tokens=_first(contract.completion_tokens, outputs),
            finish_reason=_first(contract.finish_reason, outputs),
            empty=required,
            error_status=contract.error_status,
            invalid_request_phrases=contract.invalid_request_phrases,
        )


def _input(names: tuple[str, ...], inputs: Mapping[str, Input]) -> Input | None:
    return next((inputs[name] for name in names if name in inputs), None)


def _first(names: tuple[str, ...], among: set[str]) -> str | None:
    return next((name for name in names if name in among), None)


def _datatype(value: int) -> str:
    """The inference protocol's name of a configuration's data type."""
    name = DataType.Name(value).removeprefix("TYPE_")
    return "BYTES" if name == "STRING" else name
