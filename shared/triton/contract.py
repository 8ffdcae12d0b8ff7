"""What a model on Triton takes and gives, read from its own configuration.

The tensors are those of TensorRT-LLM's `ensemble` and `tensorrt_llm_bls` models
(`triton_backend/all_models/inflight_batcher_llm/*/config.pbtxt` of NVIDIA/TensorRT-LLM). Releases differ in which of
them exist, in integer types, and in names; a model with another set of names altogether is another `Dialect`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final, Self

from tritonclient.grpc.model_config_pb2 import DataType, ModelConfig


class ContractError(ValueError):
    """A model is not one that can be asked for text; the message says what it lacks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialect:
    """Names of the tensors by what they mean; the first that a model has is used."""

    text_input: tuple[str, ...]
    max_tokens: tuple[str, ...]
    stop: tuple[str, ...]
    stream: tuple[str, ...]
    exclude_input: tuple[str, ...]
    sampling: Mapping[str, tuple[str, ...]]
    text_output: tuple[str, ...]
    prompt_tokens: tuple[str, ...]
    completion_tokens: tuple[str, ...]
    wants_prompt_tokens: tuple[str, ...]
    wants_completion_tokens: tuple[str, ...]
    may_be_empty: frozenset[str] = frozenset()


ENSEMBLE: Final = Dialect(
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
    wants_prompt_tokens=("return_num_input_tokens",),
    wants_completion_tokens=("return_num_output_tokens",),
    # Required by the first releases; an empty word is none.
    may_be_empty=frozenset({"stop_words", "bad_words"}),
)

DIALECTS: Final = (ENSEMBLE,)
"""Tried in order."""


@dataclass(frozen=True, slots=True)
class Input:
    """An input tensor as the model has it.

    Attributes:
        datatype: as in the inference protocol: `BYTES`, `INT32`, ...
    """

    name: str
    datatype: str
    optional: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Contract:
    """How to ask one model; null where it has no such tensor.

    Attributes:
        model: its name on the server.
        batched: tensors carry a batch dimension in front (`max_batch_size` > 0).
        decoupled: it answers over a stream, in any number of responses; otherwise each request has one response.
        sampling: inputs by field of `GenerationParameters`.
        empty: inputs that must be sent although there is nothing to say.
    """

    model: str
    batched: bool
    decoupled: bool
    text_input: Input
    max_tokens: Input
    text_output: str
    stop: Input | None = None
    stream: Input | None = None
    exclude_input: Input | None = None
    sampling: Mapping[str, Input] = field(default_factory=dict)
    wants_prompt_tokens: Input | None = None
    wants_completion_tokens: Input | None = None
    prompt_tokens: str | None = None
    completion_tokens: str | None = None
    empty: tuple[Input, ...] = ()

    @property
    def outputs(self) -> tuple[str, ...]:
        """The outputs to ask for; a model may have large ones that nobody needs."""
        return tuple(
            name for name in (self.text_output, self.prompt_tokens, self.completion_tokens) if name is not None
        )

    @classmethod
    def from_config(cls, config: ModelConfig) -> Self:
        """Read a model's configuration.

        Raises:
            ContractError: it has no known text input, or requires an input that nobody knows.
        """
        inputs = {one.name: Input(one.name, _datatype(one.data_type), bool(one.optional)) for one in config.input}
        outputs = {one.name for one in config.output}
        for dialect in DIALECTS:
            if _first(dialect.text_input, inputs) and _first(dialect.text_output, outputs):
                return cls._speaking(dialect, config, inputs, outputs)
        wanted = " or ".join(dialect.text_input[0] for dialect in DIALECTS)
        raise ContractError(
            f"model {config.name!r} has inputs {', '.join(sorted(inputs)) or 'none'} and outputs "
            f"{', '.join(sorted(outputs)) or 'none'}: a text model has input {wanted} and output text_output; "
            "check 'triton_model' in the fleet file"
        )

    @classmethod
    def _speaking(cls, dialect: Dialect, config: ModelConfig, inputs: dict[str, Input], outputs: set[str]) -> Self:
        def named(names: tuple[str, ...]) -> Input | None:
            name = _first(names, inputs)
            return inputs[name] if name is not None else None

        text_input, max_tokens = named(dialect.text_input), named(dialect.max_tokens)
        text_output = _first(dialect.text_output, outputs)
        if text_input is None or max_tokens is None or text_output is None:
            raise ContractError(f"model {config.name!r} has no input {' or '.join(dialect.max_tokens)}")
        sampling = {name: found for name, names in dialect.sampling.items() if (found := named(names)) is not None}
        wants_completion_tokens = named(dialect.wants_completion_tokens)
        wants_prompt_tokens = named(dialect.wants_prompt_tokens)
        known = {text_input.name, max_tokens.name}
        required = [one for one in inputs.values() if not one.optional and one.name not in known]
        strange = [one.name for one in required if one.name not in dialect.may_be_empty]
        if strange:
            raise ContractError(f"model {config.name!r} requires inputs that are not known: {', '.join(strange)}")
        return cls(
            model=config.name,
            batched=config.max_batch_size > 0,
            decoupled=bool(config.model_transaction_policy.decoupled),
            text_input=text_input,
            max_tokens=max_tokens,
            text_output=text_output,
            stop=named(dialect.stop),
            stream=named(dialect.stream),
            exclude_input=named(dialect.exclude_input),
            sampling=MappingProxyType(sampling),
            wants_prompt_tokens=wants_prompt_tokens,
            wants_completion_tokens=wants_completion_tokens,
            prompt_tokens=_first(dialect.prompt_tokens, outputs),
            completion_tokens=_first(dialect.completion_tokens, outputs),
            empty=tuple(required),
        )


def _first(names: tuple[str, ...], among: Mapping[str, object] | set[str]) -> str | None:
    return next((name for name in names if name in among), None)


def _datatype(value: int) -> str:
    """The inference protocol's name of a configuration's data type."""
    name = DataType.Name(value).removeprefix("TYPE_")
    return "BYTES" if name == "STRING" else name
