"""What a model on Triton takes and gives, read from its own configuration.

Which of the known dialects a model speaks, and which of its tensors there are, follows from that configuration alone:
nothing has to be configured here.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Self

from tritonclient.grpc.model_config_pb2 import DataType, ModelConfig

from shared.inference.base import SAMPLING_FIELDS
from shared.inference.triton.dialects import DIALECTS, Dialect


class ContractError(ValueError):
    """A model is not one that can be asked for text; the message says what it lacks."""


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
        dialect: name of the set of tensors that it has.
        batched: tensors carry a batch dimension in front (`max_batch_size` > 0).
        decoupled: it answers over a stream, in any number of responses; otherwise each request has one response.
        cumulative: a part of a stream carries the whole answer so far.
        sampling: inputs by field of `GenerationParameters`.
        flags: inputs that ask for the outputs below.
        empty: inputs that must be sent although there is nothing to say.
        refusals: words of the server by which a request at fault is known, where its status does not tell.
    """

    model: str
    dialect: str
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
    refusals: tuple[str, ...] = ()

    @property
    def outputs(self) -> tuple[str, ...]:
        """The outputs to ask for; a model may have large ones that nobody needs."""
        wanted = (self.text_output, self.prompt_tokens, self.completion_tokens, self.finish_reason)
        return tuple(name for name in wanted if name is not None)

    @property
    def unserved(self) -> tuple[str, ...]:
        """Sampling parameters that the model has no input for; a request that sets one is refused."""
        return tuple(name for name in SAMPLING_FIELDS if name not in self.sampling)

    def must_stream(self, *, tokenizer: bool, stops: bool) -> bool:
        """Whether a stream is the only way to count tokens, or to stop the server at a sequence it is not told of.

        Args:
            tokenizer: tokens can be counted here.
            stops: the answer may end at a stop sequence.
        """
        return (self.completion_tokens is None and not tokenizer) or (self.stop is None and stops)

    @classmethod
    def from_config(cls, config: ModelConfig) -> Self:
        """Read a model's configuration.

        Raises:
            ContractError: it has no known text input, or requires an input that nobody knows.
        """
        inputs = {one.name: Input(one.name, _datatype(one.data_type), bool(one.optional)) for one in config.input}
        outputs = {one.name for one in config.output}
        for dialect in DIALECTS:
            if (
                _first(dialect.text_input, inputs)
                and _first(dialect.max_tokens, inputs)
                and _first(dialect.text_output, outputs)
            ):
                return cls._speaking(dialect, config, inputs, outputs)
        wanted = " or ".join(f"{one.text_input[0]} and {one.max_tokens[0]}" for one in DIALECTS)
        raise ContractError(
            f"model {config.name!r} has inputs {', '.join(sorted(inputs)) or 'none'} and outputs "
            f"{', '.join(sorted(outputs)) or 'none'}: a text model has the inputs {wanted}, and the output "
            "text_output; check 'triton_model' in the fleet file"
        )

    @classmethod
    def _speaking(cls, dialect: Dialect, config: ModelConfig, inputs: dict[str, Input], outputs: set[str]) -> Self:
        def named(names: tuple[str, ...]) -> Input | None:
            name = _first(names, inputs)
            return inputs[name] if name is not None else None

        text_input, max_tokens = named(dialect.text_input), named(dialect.max_tokens)
        text_output = _first(dialect.text_output, outputs)
        if text_input is None or max_tokens is None or text_output is None:
            raise ContractError(f"model {config.name!r} does not have the tensors of dialect {dialect.name}")
        sampling = {name: found for name, names in dialect.sampling.items() if (found := named(names)) is not None}
        known = {text_input.name, max_tokens.name}
        required = [one for one in inputs.values() if not one.optional and one.name not in known]
        strange = [one.name for one in required if one.name not in dialect.may_be_empty]
        if strange:
            raise ContractError(f"model {config.name!r} requires inputs that are not known: {', '.join(strange)}")
        return cls(
            model=config.name,
            dialect=dialect.name,
            batched=config.max_batch_size > 0,
            decoupled=bool(config.model_transaction_policy.decoupled),
            cumulative=dialect.cumulative,
            text_input=text_input,
            max_tokens=max_tokens,
            text_output=text_output,
            stop=named(dialect.stop),
            stream=named(dialect.stream),
            exclude_input=named(dialect.exclude_input),
            sampling=MappingProxyType(sampling),
            flags=tuple(inputs[name] for name in dialect.flags if name in inputs),
            prompt_tokens=_first(dialect.prompt_tokens, outputs),
            completion_tokens=_first(dialect.completion_tokens, outputs),
            finish_reason=_first(dialect.finish_reason, outputs),
            empty=tuple(required),
            refusals=dialect.refusals,
        )


def _first(names: tuple[str, ...], among: Mapping[str, object] | set[str]) -> str | None:
    return next((name for name in names if name in among), None)


def _datatype(value: int) -> str:
    """The inference protocol's name of a configuration's data type."""
    name = DataType.Name(value).removeprefix("TYPE_")
    return "BYTES" if name == "STRING" else name
