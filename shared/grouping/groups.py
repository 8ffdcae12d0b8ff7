"""Learned prompt groups: from a prompt to the name of its group, in microseconds.

A linear model predicts, for every level, how likely the judge is to prefer it and how much energy it takes. For a given
price of quality one level is best; the levels that are best at a few prices, from lenient to strict, are the prompt's
reaction to directives, and prompts with the same reaction are one group.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shared.grouping.features import HASHED, WORD_BUCKETS, features

Floats = NDArray[np.float32]

CHUNK = 512
"""Prompts whose features are in memory at once."""

CLIPPED = 4.0
"""Standard deviations beyond which a shape says no more."""


@dataclass(frozen=True, slots=True, eq=False)
class Scaling:
    """Of features: how much a hashed one tells, and the usual shape.

    Attributes:
        telling: by hashed feature; rare ones tell more, those of a single prompt nothing.
        mean, spread: of the shapes.
    """

    telling: Floats
    mean: Floats
    spread: Floats

    def scaled(self, rows: Floats) -> Floats:
        """Features, a row a prompt; words, opening and shape each of length one or so."""
        found = rows.copy()
        found[:, :HASHED] *= self.telling
        for begin, end in ((0, WORD_BUCKETS), (WORD_BUCKETS, HASHED)):
            length = np.sqrt(np.square(found[:, begin:end]).sum(axis=1, keepdims=True))
            found[:, begin:end] /= np.maximum(length, 1e-9)
        shapes = np.clip((found[:, HASHED:] - self.mean) / self.spread, -CLIPPED, CLIPPED)
        found[:, HASHED:] = shapes / np.sqrt(shapes.shape[1])
        return found


@dataclass(frozen=True, slots=True, eq=False)
class Reaction:
    """From predictions to groups.

    Attributes:
        prices: of quality, kWh for a whole preference; one level is best at each.
        smearing: by level: mean energy over the mean of what the logarithms predict.
        group_of: by code of the best levels: place of the group, the nearest one for codes that were hardly seen.
    """

    prices: NDArray[np.float64]
    smearing: NDArray[np.float64]
    group_of: NDArray[np.int64]

    def levels(self) -> int:
        """How many levels are told apart."""
        return len(self.smearing)

    def codes(self, predicted: NDArray[np.float64]) -> NDArray[np.int64]:
        """Code of the best levels of every row.

        Args:
            predicted: (prompts, 2 · levels): preference, then the logarithm of energy, by level.
        """
        levels = self.levels()
        quality, energy = predicted[:, :levels], np.exp(predicted[:, levels:]) * self.smearing
        best = [(energy - price * quality).argmin(axis=1) for price in self.prices]
        return np.asarray(sum(levels**place * level for place, level in enumerate(best)))


@dataclass(frozen=True, slots=True, eq=False)
class PromptGroups:
    """A version of learned groups.

    Attributes:
        names: of the groups.
        weights: (features, 2 · levels); `intercept` (2 · levels).
    """

    version: str
    names: tuple[str, ...]
    scaling: Scaling
    weights: Floats
    intercept: Floats
    reaction: Reaction

    def places(self, prompts: Sequence[str]) -> NDArray[np.int64]:
        """Place of every prompt's group in `names`."""
        found = np.empty(len(prompts), dtype=np.int64)
        for begin in range(0, len(prompts), CHUNK):
            some = prompts[begin : begin + CHUNK]
            rows = self.scaling.scaled(np.stack([features(prompt) for prompt in some]))
            predicted = (rows @ self.weights + self.intercept).astype(np.float64)
            found[begin : begin + len(some)] = self.reaction.group_of[self.reaction.codes(predicted)]
        return found

    def assign(self, prompt: str) -> str:
        """Name of a prompt's group."""
        return self.names[int(self.places([prompt])[0])]
