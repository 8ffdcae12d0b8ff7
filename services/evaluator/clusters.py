"""Clusters judged prompts into groups with scikit-learn (docs/decisions/0008-prompt-groups.md). Pure functions.

The coordinates of a prompt are the principal components of its features (its topic), what ridge regression predicts
from them (which level the judge prefers, the energy of each level, and every other metric), and the producer's task
label. k-means clusters the coordinates. Single verdicts are noisy, so the regression is strongly regularised. Its
leave-one-out predictions give each judged prompt the group in which a model without its verdict would put it, so that
quality counted by group is not biased by overfitting.
"""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.linear_model import RidgeCV
from sklearn.metrics import pairwise_distances_argmin
from threadpoolctl import threadpool_limits

from shared.grouping import FEATURE_COUNT, HASHED, FeatureScaling, PromptFeatures, PromptGroups, extract_features

Doubles = NDArray[np.float64]
Indices = NDArray[np.int64]

RIDGE_PENALTY: Final = 100.0
COMPONENTS: Final = 100
"""Principal components that the reactions are predicted from; with this penalty further ones add nothing."""

TOPICS: Final = 30
"""The first of them, which describe the topic."""

OUTCOME_SPREAD: Final = 0.3
"""Standard deviation of each predicted outcome, relative to that of all topic coordinates together."""

COVERAGE_SPREAD: Final = 1.0
"""The same for the prediction whether a metric is defined for a prompt, if the prediction were perfect. Coverage
matters more than outcomes: a quality bound costs nothing where its metric is not defined."""

TASK_SPREAD: Final = 2.0
"""Standard deviation of the task labels, relative to that of all topic coordinates together: prompts of different tasks
share a group only if there are more tasks than groups."""

MAX_TASKS: Final = 32
"""Labels that are distinguished, the most frequent ones: producers choose labels, and may choose many."""

MAX_GROUPS: Final = 12
PROMPTS_PER_GROUP: Final = 40
"""Judged prompts per group while there are too few for `MAX_GROUPS`, by default."""

MIN_GROUP_PROMPTS: Final = 20
"""Smaller clusters are merged into their neighbours."""

GROUPS_PER_FAMILY: Final = 3
"""On average."""

_SEED: Final = 1
_KMEANS_RUNS: Final = 5


class TooFewPromptsError(ValueError):
    """There are too few judged prompts to learn groups from."""


@dataclass(frozen=True, slots=True, eq=False)
class LearnedGroups:
    """Groups, and the judged prompts assigned to them.

    Attributes:
        leave_one_out: (prompts,) index of each judged prompt's group, predicted by a model without its verdict.
        families: name of the family (cluster of groups) by group name.
    """

    groups: PromptGroups
    leave_one_out: Indices
    families: dict[str, str]


@dataclass(frozen=True, slots=True, eq=False)
class Coordinates:
    """Coordinates of prompts, linear in their scaled features.

    Attributes:
        weights: (features, coordinates).
        intercept: (coordinates,).
        judged: (prompts, coordinates) of the judged prompts, predicted without their own verdicts.
    """

    weights: Doubles
    intercept: Doubles
    judged: Doubles

    @classmethod
    def constant(cls, matrix: sparse.csr_array) -> "Coordinates":
        """One coordinate that is 0 for every prompt, for prompts that do not differ."""
        prompts, features = matrix.shape
        return cls(np.zeros((features, 1)), np.zeros(1), np.zeros((prompts, 1)))


def learn_groups(
    prompts: Sequence[str],
    preferred: Indices,
    energy_kwh: Doubles,
    other_metrics: Sequence[Doubles] = (),
    tasks: Sequence[str | None] = (),
) -> LearnedGroups:
    """Learn groups from judged prompts; see `learn_groups_from_features`."""
    features = [extract_features(prompt) for prompt in prompts]
    return learn_groups_from_features(features, preferred, energy_kwh, other_metrics, tasks)


def learn_groups_from_features(
    features: Sequence[PromptFeatures],
    preferred: Indices,
    energy_kwh: Doubles,
    other_metrics: Sequence[Doubles] = (),
    tasks: Sequence[str | None] = (),
    *,
    prompts_per_group: int = PROMPTS_PER_GROUP,
) -> LearnedGroups:
    """Learn groups from the features of judged prompts.

    Args:
        preferred: (prompts,) index of the level that the judge preferred.
        energy_kwh: (prompts, levels) of the judged answers, all greater than 0.
        other_metrics: (prompts, levels) outcomes of every other metric; NaN where the metric is not defined.
        tasks: (prompts,) the producer's task label, None where there is none; empty: there are none at all.
        prompts_per_group: number of prompts for each group while there are too few for `MAX_GROUPS`.

    Raises:
        TooFewPromptsError: fewer prompts than two groups need.
    """
    if len(features) < 2 * MIN_GROUP_PROMPTS:
        raise TooFewPromptsError(f"{len(features)} judged prompts, at least {2 * MIN_GROUP_PROMPTS} are needed")
    # More threads mostly wait for each other: for 3,000 prompts on two cores they took at least twice the CPU time.
    with threadpool_limits(limits=1):
        labels = tasks or [None] * len(features)
        return _learn(features, preferred, energy_kwh, other_metrics, labels, prompts_per_group=prompts_per_group)


def _learn(
    features: Sequence[PromptFeatures],
    preferred: Indices,
    energy_kwh: Doubles,
    other_metrics: Sequence[Doubles],
    tasks: Sequence[str | None],
    *,
    prompts_per_group: int,
) -> LearnedGroups:
    scaling = fit_scaling(features)
    matrix = scaled_matrix(features, scaling)
    # An undefined outcome counts as 0 at every level, as it does in the optimizer's linear program.
    outcomes = [np.eye(energy_kwh.shape[1])[preferred], np.log(energy_kwh), *map(np.nan_to_num, other_metrics)]
    coverage = [np.isfinite(one.sum(axis=1, keepdims=True)).astype(np.float64) for one in other_metrics]
    components = principal_components(matrix)
    parts = (topics(components, matrix), predictions(components, outcomes, coverage))
    labels = _task_coordinates(tasks)
    unlabelled = np.zeros(len(labels))
    judged = np.hstack(
        [*(part.judged for part in parts), np.array([labels.get(task or "", unlabelled) for task in tasks])]
    )
    centres = _centres(
        judged,
        min(MAX_GROUPS, max(1, len(features) // prompts_per_group)),
        min_members=min(MIN_GROUP_PROMPTS, 2 * prompts_per_group // 3),
    )
    # |s - c|² is smallest where s·c - |c|²/2 is largest, which is linear in the features too.
    of_prompt, of_task = np.split(centres, [centres.shape[1] - len(labels)], axis=1)
    weights = np.hstack([part.weights for part in parts]) @ of_prompt.T
    intercept = np.hstack([part.intercept for part in parts]) @ of_prompt.T - np.square(centres).sum(axis=1) / 2.0
    groups = _prompt_groups(scaling, weights, intercept, {task: place @ of_task.T for task, place in labels.items()})
    families = _centres(centres, max(1, len(centres) // GROUPS_PER_FAMILY), min_members=1)
    family_of = pairwise_distances_argmin(centres, families)
    return LearnedGroups(
        groups,
        pairwise_distances_argmin(judged, centres),
        {name: f"family-{index}" for name, index in zip(groups.names, family_of, strict=True)},
    )


def fit_scaling(features: Sequence[PromptFeatures]) -> FeatureScaling:
    """The scaling of features by inverse document frequency and by the spread of the shapes, from judged prompts."""
    document_frequency = np.bincount(np.concatenate([one.buckets for one in features]), minlength=HASHED)
    idf = np.where(document_frequency >= 2, np.log((1.0 + len(features)) / (1.0 + document_frequency)), 0.0)
    shapes = np.stack([one.shape for one in features])
    return FeatureScaling(idf.astype(np.float32), shapes.mean(axis=0), np.maximum(shapes.std(axis=0), 1e-6))


def scaled_matrix(features: Sequence[PromptFeatures], scaling: FeatureScaling) -> sparse.csr_array:
    """The scaled features of prompts, (prompts, FEATURE_COUNT)."""
    shape_columns = np.arange(HASHED, FEATURE_COUNT)
    columns = [np.concatenate([one.buckets, shape_columns]) for one in features]
    values = [np.concatenate(scaling.transform(one)) for one in features]
    ends = np.cumsum([0, *map(len, columns)])
    return sparse.csr_array(
        (np.concatenate(values).astype(np.float64), np.concatenate(columns), ends), shape=(len(features), FEATURE_COUNT)
    )


def principal_components(matrix: sparse.csr_array) -> Coordinates:
    """The principal components of scaled features, (prompts, FEATURE_COUNT), largest first."""
    # Lanczos iterations beyond the rank of the matrix would restart at random vectors.
    rank = len(np.unique(matrix @ np.random.default_rng(_SEED).normal(size=matrix.shape[1]))) - 1
    if rank < 1:
        return Coordinates.constant(matrix)
    pca = PCA(min(COMPONENTS, rank), svd_solver="arpack", random_state=_SEED).fit(matrix)
    weights = pca.components_[pca.explained_variance_ratio_ > 1e-6].T
    return Coordinates(weights, -pca.mean_ @ weights, (matrix @ weights) - pca.mean_ @ weights)


def topics(components: Coordinates, matrix: sparse.csr_array) -> Coordinates:
    """The first components, scaled so that all features together have a standard deviation of 1."""
    mean = np.asarray(matrix.mean(axis=0))
    variance = float(matrix.multiply(matrix).mean(axis=0).sum() - np.square(mean).sum())
    scale = 1.0 / np.sqrt(max(variance, 1e-12))
    return Coordinates(
        components.weights[:, :TOPICS] * scale,
        components.intercept[:TOPICS] * scale,
        components.judged[:, :TOPICS] * scale,
    )


def _task_coordinates(tasks: Sequence[str | None]) -> dict[str, Doubles]:
    """Coordinates of every label that enough prompts have, (labels,) each; those of all labelled prompts are centred.

    A prompt without one of these labels has the coordinates 0: the mean of the labels.
    """
    found = [(task, count) for task, count in Counter(tasks).most_common() if task and count >= MIN_GROUP_PROMPTS]
    counts = dict(found[:MAX_TASKS])
    if len(counts) < 2:
        return {}
    shares = np.array(list(counts.values())) / sum(counts.values())
    scale = TASK_SPREAD / np.sqrt((shares * (1.0 - shares)).sum())
    return dict(zip(counts, scale * (np.eye(len(shares)) - shares), strict=True))


def predictions(components: Coordinates, outcomes: Sequence[Doubles], coverage: Sequence[Doubles]) -> Coordinates:
    """Outcomes and coverage predicted from the components, each scaled to its spread.

    Args:
        outcomes: each (prompts, levels).
        coverage: each (prompts, 1).
    """
    outcome_count = sum(one.shape[1] for one in outcomes)
    targets = np.hstack([*outcomes, *coverage])
    varying = targets.std(axis=0) > 1e-12
    is_outcome, targets = (np.arange(targets.shape[1]) < outcome_count)[varying], targets[:, varying]
    if not varying.any():
        return Coordinates(components.weights[:, :0], components.intercept[:0], components.judged[:, :0])
    centred = targets - targets.mean(axis=0)
    # The column of ones is an intercept with the same penalty as every other weight.
    design = np.hstack([components.judged, np.ones((len(centred), 1))])
    ridge = RidgeCV([RIDGE_PENALTY], fit_intercept=False, scoring="neg_mean_squared_error", store_cv_results=True).fit(
        design, centred
    )
    coefficients = np.atleast_2d(ridge.coef_).T
    # With `scoring` set, `cv_results_` holds the leave-one-out predictions.
    predicted = ridge.cv_results_[:, :, 0]
    mean, deviation = predicted.mean(axis=0), np.maximum(predicted.std(axis=0), 1e-12)
    correlation = ((predicted - mean) * centred).mean(axis=0) / deviation / targets.std(axis=0)
    # A prediction that does not correlate with what it predicts is noise.
    scale = np.where(is_outcome, OUTCOME_SPREAD, COVERAGE_SPREAD * np.maximum(correlation, 0.0)) / deviation
    slopes = coefficients[:-1] * scale
    return Coordinates(
        components.weights @ slopes,
        components.intercept @ slopes + (coefficients[-1] - mean) * scale,
        (predicted - mean) * scale,
    )


def _centres(points: Doubles, count: int, *, min_members: int) -> Doubles:
    """k-means centres, (centres, coordinates); clusters with fewer members are removed."""
    count = min(count, len(np.unique(points, axis=0)))
    centres: Doubles = KMeans(count, n_init=_KMEANS_RUNS, random_state=_SEED).fit(points).cluster_centers_
    while len(centres) > 1:
        members = np.bincount(pairwise_distances_argmin(points, centres), minlength=len(centres))
        if members.min() >= min_members:
            break
        centres = np.delete(centres, members.argmin(), axis=0)
    return centres


def _prompt_groups(
    scaling: FeatureScaling, weights: Doubles, intercept: Doubles, task_scores: Mapping[str, Doubles]
) -> PromptGroups:
    rounded = weights.astype(np.float16)
    published_intercept = intercept.astype(np.float32)
    published_scores = {task: scores.astype(np.float32) for task, scores in task_scores.items()}
    # Of the rounded numbers: those of two runs on the same prompts can differ by the last bits of a double.
    content = [rounded.tobytes(), published_intercept.tobytes()]
    content += [task.encode() + scores.tobytes() for task, scores in published_scores.items()]
    version = hashlib.blake2b(b"".join(content), digest_size=4).hexdigest()
    # Two versions share no name, so counts of different versions cannot be mixed up.
    names = tuple(f"{version}.{index:02}" for index in range(weights.shape[1]))
    return PromptGroups(version, names, scaling, rounded.astype(np.float32), published_intercept, published_scores)
