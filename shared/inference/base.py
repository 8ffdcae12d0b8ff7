"""Why a generation failed, in the three ways that a caller treats differently.

What a caller may ask of a generation.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Self

from shared.messages import SamplingParameters


class GenerationError(RuntimeError):
    """A generation failed; the text names the endpoint and never quotes the prompt.

    Attributes:
        said: the model server's own words about a prompt; they may quote it, so they are for who asked, not for a log.
    """

    def __init__(self, text: str, *, said: str = "") -> None:
        super().__init__(text)
        self.said = said

    @property
    def for_requester(self) -> str:
        """The text with the server's words."""
        return f"{self}: {self.said}" if self.said else str(self)


class EndpointUnavailable(GenerationError):  # noqa: N818 - the state, not the exception, is what callers speak of
    """The endpoint is down, refuses, or failed on its own account: another one may do better."""


class InvalidRequest(GenerationError):  # noqa: N818
    """The request itself is at fault: it would fail everywhere."""


class DeadlineExceeded(GenerationError):  # noqa: N818
    """The time that was given is over."""


SAMPLING_FIELDS: Final = (
    "temperature",
    "top_p",
    "top_k",
    "min_tokens",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
)
"""Fields of `GenerationParameters` that are sent only when they are given."""


@dataclass(frozen=True, slots=True)
class StreamTimeouts:
    """How long a streaming server may be silent before it has failed; wall seconds.

    Attributes:
        first_s: until the first part of the answer, which may wait behind other requests.
        next_s: between two parts.
    """

    first_s: float
    next_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationParameters:
    """How to generate; what is null is left to the model server.

    Attributes:
        max_tokens: most tokens to generate, >= 1.
        stop: sequences that end the answer; they are not part of it.
    """

    max_tokens: int
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_tokens: int | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()

    @classmethod
    def of(cls, sampling: SamplingParameters, *, stop: Sequence[str] = ()) -> Self:
        """A producer's sampling parameters, with the chat template's stop sequences beside the producer's own."""
        sequences = dict.fromkeys(one for one in (*sampling.stop, *stop) if one)
        return cls(
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_tokens=sampling.min_tokens,
            repetition_penalty=sampling.repetition_penalty,
            presence_penalty=sampling.presence_penalty,
            frequency_penalty=sampling.frequency_penalty,
            seed=sampling.seed,
            stop=tuple(sequences),
        )
