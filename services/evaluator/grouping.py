"""Learns prompt groups from judged prompts alone (docs/decisions/0008-prompt-groups.md); nothing is read or written.

Kernel ridge regression, strongly regularised, predicts preference and energy of every level: single verdicts are noisy.
Its leave-one-out predictions come for free, and say in which group each learned prompt would have been put by a model
that had not seen it: quality counted by those groups is not flattered by what was learned by heart.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shared.grouping import PromptGroups, features
from shared.grouping.features import HASHED
from shared.grouping.groups import Reaction, Scaling

Doubles = NDArray[np.float64]
Places = NDArray[np.int64]

REGULARISATION = 30.0
PRICED_AT = (1.3, 1.15, 1.05, 0.97, 0.9, 0.8)
"""Bounds on preference at whose prices of quality the best levels are compared."""

LEAST_PROMPTS = 20
"""That make a group of their own."""

MOST_GROUPS = 64


class TooFewPromptsError(ValueError):
    """There are too few judged prompts to learn from."""


@dataclass(frozen=True, slots=True, eq=False)
class Learned:
    """What was learned.

    Attributes:
        unseen: place of the group of every prompt learned from, by a model that had not seen it.
    """

    groups: PromptGroups
    unseen: Places


def learn_groups(prompts: Sequence[str], preferred: Places, energy_kwh: Doubles) -> Learned:
    """Learn from judged prompts.

    Args:
        preferred: place of the level that the judge preferred, by prompt.
        energy_kwh: (prompts, levels) of the answers that were judged, all greater than 0.

    Raises:
        TooFewPromptsError: fewer than make two groups.
    """
    return learn_from(np.stack([features(prompt) for prompt in prompts]), preferred, energy_kwh)


def learn_from(raw: NDArray[np.float32], preferred: Places, energy_kwh: Doubles) -> Learned:
    """The same from the prompts' features, a row each."""
    if len(raw) < 2 * LEAST_PROMPTS:
        raise TooFewPromptsError(f"{len(raw)} judged prompts, {2 * LEAST_PROMPTS} at least are needed")
    levels = energy_kwh.shape[1]
    scaling = _scaling(raw)
    rows = scaling.scaled(raw)
    wanted = np.concatenate([np.eye(levels)[preferred], np.log(energy_kwh)], axis=1)
    weights, intercept, unseen = _ridge(rows, wanted)
    reaction = _reaction(unseen, energy_kwh)
    version = hashlib.blake2b(weights.tobytes() + intercept.tobytes(), digest_size=4).hexdigest()
    # No two versions share a name: what is counted by one is never taken for what is counted by another.
    names = tuple(f"{version}.{place:02}" for place in range(int(reaction.group_of.max()) + 1))
    groups = PromptGroups(version, names, scaling, weights, intercept, reaction)
    return Learned(groups, np.asarray(reaction.group_of[reaction.codes(unseen)]))


def _scaling(raw: NDArray[np.float32]) -> Scaling:
    seen = (raw[:, :HASHED] > 0).sum(axis=0)
    telling = np.where(seen >= 2, np.log((1.0 + len(raw)) / (1.0 + seen)), 0.0)
    shapes = raw[:, HASHED:]
    return Scaling(
        telling.astype(np.float32), shapes.mean(axis=0), np.maximum(shapes.std(axis=0), 1e-6).astype(np.float32)
    )


def _ridge(rows: NDArray[np.float32], wanted: Doubles) -> tuple[NDArray[np.float32], NDArray[np.float32], Doubles]:
    """Weights, intercept, and leave-one-out predictions.

    In the dual: with K = XXᵀ + 1 and A = (K + λ)⁻¹, the coefficients are A·y, and the leave-one-out residual of a row
    is its coefficient over the diagonal of A.
    """
    mean = wanted.mean(axis=0)
    kernel = (rows @ rows.T).astype(np.float64) + 1.0
    inverse = np.linalg.inv(kernel + REGULARISATION * np.eye(len(rows)))
    dual = inverse @ (wanted - mean)
    unseen = wanted - dual / np.diag(inverse)[:, None]
    weights = rows.T @ dual.astype(np.float32)
    return weights, (mean + dual.sum(axis=0)).astype(np.float32), unseen


def _reaction(predicted: Doubles, energy_kwh: Doubles) -> Reaction:
    """Groups of alike reaction; rare ones join the nearest."""
    levels = energy_kwh.shape[1]
    smearing = energy_kwh.mean(axis=0) / np.exp(predicted[:, levels:]).mean(axis=0)
    quality, energy = predicted[:, :levels], np.exp(predicted[:, levels:]) * smearing
    prices = np.array([_price(quality, energy, bound) for bound in PRICED_AT])
    all_codes = levels ** len(prices)
    reaction = Reaction(prices, smearing, np.zeros(all_codes, dtype=np.int64))
    seen = np.bincount(reaction.codes(predicted), minlength=all_codes)
    kept = [int(code) for code in np.argsort(-seen, kind="stable")[:MOST_GROUPS] if seen[code] >= LEAST_PROMPTS]
    kept = kept or [int(seen.argmax())]
    digits = np.array([[code // levels**place % levels for place in range(len(prices))] for code in range(all_codes)])
    apart = np.abs(digits[:, None, :] - digits[None, kept, :]).sum(axis=2)
    return Reaction(prices, smearing, apart.argmin(axis=1))


def _price(quality: Doubles, energy: Doubles, bound: float) -> float:
    """The least price of quality at which the best levels keep a bound on preference; by bisection."""
    needed = bound * float(quality[:, 0].sum())
    rows = np.arange(len(quality))
    # In units of the mean energy: from nothing to far more than any level can differ by.
    low, high = np.log(1e-6), np.log(1e6)
    scale = float(energy.mean())
    for _ in range(60):
        middle = (low + high) / 2
        best = (energy - scale * np.exp(middle) * quality).argmin(axis=1)
        low, high = (low, middle) if quality[rows, best].sum() >= needed else (middle, high)
    return float(scale * np.exp(high))
