"""What is kept of a prompt that was judged: what it looks like in numbers, and how its answers did. Never its text."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from shared.grouping import feature_count, features

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class JudgedAnswer:
    """One answer to a judged prompt.

    Attributes:
        options: that the verdict holds for.
        asked: the one of them that was asked.
        seconds: event time from sent to last token.
        successes: by metric, in [0, 1].
    """

    level: str
    options: tuple[str, ...]
    asked: str
    tokens: int
    seconds: float
    successes: Mapping[str, float]

    def document(self) -> dict[str, Any]:
        """As JSON's types."""
        return asdict(self)

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> Self:
        """What `document` gave."""
        return cls(**{**document, "options": tuple(document["options"])})


@dataclass(frozen=True, slots=True, eq=False)
class Looks:
    """A prompt's features (shared/grouping/features.py), of which few differ from 0.

    Attributes:
        places: of those, ascending; uint16.
        values: float32.
    """

    places: NDArray[np.uint16]
    values: Floats

    @classmethod
    def of(cls, prompt: str) -> Self:
        """The features of a text."""
        found = features(prompt)
        places = np.flatnonzero(found)
        return cls(places.astype(np.uint16), found[places])

    @classmethod
    def from_bytes(cls, stored: bytes) -> Self:
        """What `to_bytes` gave."""
        count = len(stored) // 6
        return cls(np.frombuffer(stored, "<u2", count), np.frombuffer(stored, "<f4", count, offset=2 * count))

    def to_bytes(self) -> bytes:
        """Places, then values, little-endian."""
        return self.places.astype("<u2").tobytes() + self.values.astype("<f4").tobytes()

    def fill(self, row: Floats) -> None:
        """Write the features into a row of zeros."""
        row[self.places] = self.values


@dataclass(frozen=True, slots=True, eq=False)
class JudgedPrompt:
    """A prompt with the verdicts on its answers.

    Attributes:
        request_id: of the sample.
        stratum: under which it was sampled.
        group: that it was counted in.
        evaluated_at: event time.
        answers: of every contestant, the reference first.
    """

    request_id: str
    stratum: str
    group: str
    evaluated_at: datetime
    looks: Looks
    answers: tuple[JudgedAnswer, ...]


def stacked(prompts: list[JudgedPrompt]) -> Floats:
    """The features of prompts, a row each."""
    rows = np.zeros((len(prompts), feature_count()), dtype=np.float32)
    for row, prompt in zip(rows, prompts, strict=True):
        prompt.looks.fill(row)
    return rows
