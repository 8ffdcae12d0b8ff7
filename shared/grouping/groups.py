"""Learned prompt groups: from a prompt to the name of its group, in microseconds.

A group is a place in a space of few dimensions: what a prompt is about, and how it is predicted to react to directives
(docs/decisions/0008-prompt-groups.md). Both are linear in a prompt's features, and a prompt belongs to the nearest
place; what is left of that is one linear score for every group, of which the highest one wins.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shared.grouping.features import HASHED, WORD_BUCKETS, Looks, features, look

Floats = NDArray[np.float32]

CLASSIFIER = 2
"""Version of how a prompt's group is found: the arrays of one are of no use to another."""

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
        found[:, HASHED:] = self._scaled_shape(found[:, HASHED:])
        return found

    def scaled_looks(self, looks: Looks) -> tuple[Floats, Floats]:
        """The same of one prompt: the buckets that it hits, and its shape."""
        hashed = looks.counts * self.telling[looks.buckets]
        opening = int(looks.buckets.searchsorted(WORD_BUCKETS))
        for part in (slice(opening), slice(opening, None)):
            hashed[part] /= max(math.sqrt(hashed[part] @ hashed[part]), 1e-9)
        return hashed, self._scaled_shape(looks.shape)

    def _scaled_shape(self, shape: Floats) -> Floats:
        found: Floats = np.minimum(np.maximum((shape - self.mean) / self.spread, -CLIPPED), CLIPPED)
        return found / np.float32(math.sqrt(shape.shape[-1]))


@dataclass(frozen=True, slots=True, eq=False)
class PromptGroups:
    """A version of learned groups.

    Attributes:
        names: of the groups.
        weights: (features, groups), rounded to float16, as they travel.
        intercept: (groups).
    """

    version: str
    names: tuple[str, ...]
    scaling: Scaling
    weights: Floats
    intercept: Floats

    def places(self, prompts: Sequence[str]) -> NDArray[np.int64]:
        """Place of every prompt's group in `names`."""
        found = np.empty(len(prompts), dtype=np.int64)
        for begin in range(0, len(prompts), CHUNK):
            some = prompts[begin : begin + CHUNK]
            rows = self.scaling.scaled(np.stack([features(prompt) for prompt in some]))
            found[begin : begin + len(some)] = (rows @ self.weights + self.intercept).argmax(axis=1)
        return found

    def assign(self, prompt: str) -> str:
        """Name of a prompt's group.

        By the buckets alone that the prompt hits: a whole row of features would take as long as all the rest.
        """
        looks = look(prompt)
        hashed, shape = self.scaling.scaled_looks(looks)
        scores = hashed @ self.weights[looks.buckets] + shape @ self.weights[HASHED:] + self.intercept
        return self.names[int(scores.argmax())]
