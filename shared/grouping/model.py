"""Assigns a prompt to its group, in microseconds.

The evaluator clusters prompts in a space that is linear in their features (docs/decisions/0008-prompt-groups.md). A
prompt belongs to the nearest cluster centre, which is the group with the highest of one linear score per group. A known
task label adds to the scores. The router has no scikit-learn, so this module uses NumPy only.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from shared.grouping.features import HASHED, WORD_BUCKETS, PromptFeatures, extract_features

Floats = NDArray[np.float32]

DEFAULT_GROUP: Final = "default"
"""The prompt group of a request without a task label, as long as no groups are learned."""

CLASSIFIER: Final = 2
"""Version of the assignment. Arrays of one version are useless for another."""

SHAPE_LIMIT: Final = 4.0
"""Standard deviations at which the shape is clipped."""


@dataclass(frozen=True, slots=True, eq=False)
class FeatureScaling:
    """Weights of the hashed features, and location and scale of the shape.

    Attributes:
        idf: (HASHED,) inverse document frequency of each bucket; 0 for buckets of a single prompt.
        shape_mean, shape_std: (SHAPE_FEATURES,).
    """

    idf: Floats
    shape_mean: Floats
    shape_std: Floats

    def transform(self, features: PromptFeatures) -> tuple[Floats, Floats]:
        """Scale the features of a prompt: words and opening to unit length each, the shape to about unit length.

        Returns:
            The values of `features.buckets`, and the shape.
        """
        hashed = features.counts * self.idf[features.buckets]
        openings = int(features.buckets.searchsorted(WORD_BUCKETS))
        for part in (slice(openings), slice(openings, None)):
            hashed[part] /= max(math.sqrt(hashed[part] @ hashed[part]), 1e-9)
        standardised = (features.shape - self.shape_mean) / self.shape_std
        clipped: Floats = np.minimum(np.maximum(standardised, -SHAPE_LIMIT), SHAPE_LIMIT)
        return hashed, clipped / np.float32(math.sqrt(len(clipped)))


@dataclass(frozen=True, slots=True, eq=False)
class PromptGroups:
    """One version of learned groups.

    Attributes:
        names: of the groups.
        weights: (FEATURE_COUNT, groups) scores of scaled features, rounded to float16 as on the wire.
        intercept: (groups,).
        task_scores: by task label, (groups,) what it adds to the scores; another label, or none, adds nothing.
    """

    version: str
    names: tuple[str, ...]
    scaling: FeatureScaling
    weights: Floats
    intercept: Floats
    task_scores: Mapping[str, Floats] = field(default_factory=dict)

    def assign(self, prompt: str, task: str | None = None) -> str:
        """Name of a prompt's group."""
        return self.assign_features(extract_features(prompt), task)

    def assign_features(self, features: PromptFeatures, task: str | None = None) -> str:
        """Name of the group of a prompt with these features."""
        return self.names[self._index(features, task)]

    def assign_all(self, prompts: Sequence[str], tasks: Sequence[str | None] | None = None) -> NDArray[np.int64]:
        """Index of every prompt's group in `names`, (prompts,)."""
        labels = [None] * len(prompts) if tasks is None else tasks
        return np.array(
            [self._index(extract_features(prompt), task) for prompt, task in zip(prompts, labels, strict=True)],
            dtype=np.int64,
        )

    def _index(self, features: PromptFeatures, task: str | None) -> int:
        hashed, shape = self.scaling.transform(features)
        # Only the rows of buckets that occur: a dense product would take as long as everything else together.
        scores = hashed @ self.weights[features.buckets] + shape @ self.weights[HASHED:] + self.intercept
        if task is not None and (of_task := self.task_scores.get(task)) is not None:
            scores = scores + of_task
        return int(scores.argmax())
