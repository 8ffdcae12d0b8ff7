"""Learns prompt groups from judged prompts alone (docs/decisions/0008-prompt-groups.md); nothing is read or written.

Prompts come together that are about alike things and are predicted to react alike: k-means on the principal components
of their features, and on what kernel ridge regression, strongly regularised for single verdicts are noisy, predicts of
every level: preference, energy, and whatever else was judged. Its leave-one-out predictions come for free, and say in
which group each learned prompt would have been put by a model that had not seen its verdict: quality counted by those
groups is not flattered by what was learned by heart.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shared.grouping import PromptGroups, features
from shared.grouping.features import HASHED
from shared.grouping.groups import Scaling

Doubles = NDArray[np.float64]
Places = NDArray[np.int64]

REGULARISATION = 100.0
COMPONENTS = 30
"""Principal components that tell what a prompt is about."""

REACTION = 0.3
"""Spread of each prediction, where the spread of all that prompts are about is 1."""

TOLD = 1.0
"""The same of the prediction whether a metric can be told of a prompt, were it always right. It matters more than how
the prompt will do: where a metric cannot be told its bound costs nothing."""

MOST_GROUPS = 12
USUAL_PROMPTS = 40
"""Judged prompts for each group, where there are not enough for all groups."""

LEAST_PROMPTS = 20
"""That make a group of their own; fewer join the nearest."""

FAMILY_GROUPS = 3
"""Groups to a family, on average."""

_SEED = 1
_STARTS = 5
"""Of k-means, of which the best end is taken."""

_ROUNDS = 60
_POWERS = 8
_MORE = 10
"""Directions that are followed besides, so that the last components are found as well as the first."""


class TooFewPromptsError(ValueError):
    """There are too few judged prompts to learn from."""


@dataclass(frozen=True, slots=True, eq=False)
class Learned:
    """What was learned.

    Attributes:
        unseen: place of the group of every prompt learned from, by a model that had not seen its verdict.
        families: by group, the name of the family of groups that lie near each other.
    """

    groups: PromptGroups
    unseen: Places
    families: dict[str, str]


@dataclass(frozen=True, slots=True, eq=False)
class _Space:
    """Coordinates of prompts, linear in their features.

    Attributes:
        weights, intercept: from features to coordinates.
        learned: coordinates of the prompts learned from, as if their verdicts had not been seen.
    """

    weights: Doubles
    intercept: Doubles
    learned: Doubles


def learn_groups(
    prompts: Sequence[str], preferred: Places, energy_kwh: Doubles, judged: Sequence[Doubles] = ()
) -> Learned:
    """Learn from judged prompts.

    Args:
        preferred: place of the level that the judge preferred, by prompt.
        energy_kwh: (prompts, levels) of the answers that were judged, all greater than 0.
        judged: (prompts, levels) of every other metric; NaN where it cannot be told.

    Raises:
        TooFewPromptsError: fewer than make two groups.
    """
    return learn_from(np.stack([features(prompt) for prompt in prompts]), preferred, energy_kwh, judged)


def learn_from(
    raw: NDArray[np.float32], preferred: Places, energy_kwh: Doubles, judged: Sequence[Doubles] = ()
) -> Learned:
    """The same from the prompts' features, a row each."""
    if len(raw) < 2 * LEAST_PROMPTS:
        raise TooFewPromptsError(f"{len(raw)} judged prompts, {2 * LEAST_PROMPTS} at least are needed")
    scaling = _scaling(raw)
    rows = scaling.scaled(raw)
    kernel = (rows @ rows.T).astype(np.float64)
    # Correctness of a prompt that nobody can check counts for nothing at any level: so the program weighs it.
    reacting = [np.eye(energy_kwh.shape[1])[preferred], np.log(energy_kwh), *map(np.nan_to_num, judged)]
    checkable = [np.isfinite(one.sum(axis=1, keepdims=True)).astype(np.float64) for one in judged]
    told = np.concatenate(checkable, axis=1) if checkable else np.empty((len(raw), 0))
    topics = _topics(rows, kernel)
    reactions = _predicted(rows, kernel, np.concatenate(reacting, axis=1), told)
    learned = np.concatenate([topics.learned, reactions.learned], axis=1)
    centres = _centres(learned, min(MOST_GROUPS, max(1, len(raw) // USUAL_PROMPTS)), least=LEAST_PROMPTS)
    # |s - c|² is least where s·c - |c|²/2 is greatest, which is linear in the features too.
    weights = np.concatenate([topics.weights, reactions.weights], axis=1) @ centres.T
    intercept = np.concatenate([topics.intercept, reactions.intercept]) @ centres.T - _half_squares(centres)
    rounded = weights.astype(np.float16)
    version = hashlib.blake2b(rounded.tobytes() + intercept.tobytes(), digest_size=4).hexdigest()
    # No two versions share a name: what is counted by one is never taken for what is counted by another.
    names = tuple(f"{version}.{place:02}" for place in range(len(centres)))
    groups = PromptGroups(version, names, scaling, rounded.astype(np.float32), intercept.astype(np.float32))
    families = _centres(centres, max(1, len(centres) // FAMILY_GROUPS), least=1)
    of_groups = {name: f"family-{place}" for name, place in zip(names, _nearest(centres, families), strict=True)}
    return Learned(groups, _nearest(learned, centres), of_groups)


def _scaling(raw: NDArray[np.float32]) -> Scaling:
    seen = (raw[:, :HASHED] > 0).sum(axis=0)
    telling = np.where(seen >= 2, np.log((1.0 + len(raw)) / (1.0 + seen)), 0.0)
    shapes = raw[:, HASHED:]
    return Scaling(
        telling.astype(np.float32), shapes.mean(axis=0), np.maximum(shapes.std(axis=0), 1e-6).astype(np.float32)
    )


def _topics(rows: NDArray[np.float32], kernel: Doubles) -> _Space:
    """Principal components, over the spread of all features together.

    In the dual too: an eigenvector of the centred kernel holds the coordinates of the prompts learned from.
    """
    centred = kernel - kernel.mean(axis=0) - kernel.mean(axis=1)[:, None] + kernel.mean()
    count = min(COMPONENTS, len(rows) - 1)
    values, vectors = _leading(centred, count)
    spread = np.sqrt(max(float(np.trace(centred)) / len(rows), 1e-12))
    told = values > 1e-6 * max(float(np.trace(centred)), 1e-12)
    dual = vectors[:, told] / np.sqrt(values[told]) / spread
    weights = (rows.T @ dual.astype(np.float32)).astype(np.float64)
    return _Space(weights, -rows.mean(axis=0).astype(np.float64) @ weights, centred @ dual)


def _leading(matrix: Doubles, count: int) -> tuple[Doubles, Doubles]:
    """The greatest eigenvalues of a symmetric matrix and their vectors, by subspace iteration: a fraction of the time
    that all of them would take."""
    rng = np.random.default_rng(_SEED)
    basis = rng.normal(size=(len(matrix), min(count + _MORE, len(matrix))))
    for _ in range(_POWERS):
        basis, _ = np.linalg.qr(matrix @ basis)
    values, vectors = np.linalg.eigh(basis.T @ matrix @ basis)
    return values[::-1][:count], (basis @ vectors)[:, ::-1][:, :count]


def _predicted(rows: NDArray[np.float32], kernel: Doubles, reactions: Doubles, told: Doubles) -> _Space:
    """Predictions of reactions, and of what can be told.

    In the dual: with K = XXᵀ + 1 and A = (K + λ)⁻¹, the coefficients are A·y, and the leave-one-out residual of a row
    is its coefficient over the diagonal of A.
    """
    reactions, told = (columns[:, columns.std(axis=0) > 0.0] for columns in (reactions, told))
    wanted = np.concatenate([reactions, told], axis=1)
    mean = wanted.mean(axis=0)
    inverse = np.linalg.inv(kernel + 1.0 + REGULARISATION * np.eye(len(rows)))
    dual = inverse @ (wanted - mean)
    unseen = wanted - dual / np.diag(inverse)[:, None]
    usual = unseen.mean(axis=0)
    deviation = np.maximum(unseen.std(axis=0), 1e-12)
    # Of what is told badly the prediction is noise.
    trust = ((unseen - usual) * (wanted - mean)).mean(axis=0) / deviation / wanted.std(axis=0)
    spread = np.where(np.arange(wanted.shape[1]) < reactions.shape[1], REACTION, TOLD * np.maximum(trust, 0.0))
    scale = spread / deviation
    weights = (rows.T @ dual.astype(np.float32)).astype(np.float64) * scale
    return _Space(weights, (mean + dual.sum(axis=0) - usual) * scale, (unseen - usual) * scale)


def _centres(points: Doubles, count: int, *, least: int) -> Doubles:
    """k-means: centres that the points lie near to, each of them at least that of so many."""
    rng = np.random.default_rng(_SEED)
    found = [_descended(points, _spread_out(points, count, rng)) for _ in range(_STARTS)]
    centres = min(found, key=lambda centres: float(np.square(points - centres[_nearest(points, centres)]).sum()))
    while len(centres) > 1:
        members = np.bincount(_nearest(points, centres), minlength=len(centres))
        if members.min() >= least:
            break
        centres = np.delete(centres, members.argmin(), axis=0)
    return centres


def _spread_out(points: Doubles, count: int, rng: np.random.Generator) -> Doubles:
    """Some of the points, far from each other (k-means++)."""
    chosen = [points[rng.integers(len(points))]]
    apart = np.square(points - chosen[0]).sum(axis=1)
    while len(chosen) < count and apart.sum() > 0.0:
        chosen.append(points[rng.choice(len(points), p=apart / apart.sum())])
        apart = np.minimum(apart, np.square(points - chosen[-1]).sum(axis=1))
    return np.array(chosen)


def _descended(points: Doubles, centres: Doubles) -> Doubles:
    """Lloyd's iteration from these centres."""
    before = np.full(len(points), -1)
    for _ in range(_ROUNDS):
        places = _nearest(points, centres)
        if np.array_equal(places, before):
            break
        before = places
        member = np.eye(len(centres))[places]
        sizes = member.sum(axis=0)[:, None]
        centres = np.where(sizes > 0.0, member.T @ points / np.maximum(sizes, 1.0), centres)
    return centres


def _nearest(points: Doubles, centres: Doubles) -> Places:
    return np.asarray((points @ centres.T - _half_squares(centres)).argmax(axis=1))


def _half_squares(centres: Doubles) -> Doubles:
    return np.asarray(np.square(centres).sum(axis=1) / 2.0)
