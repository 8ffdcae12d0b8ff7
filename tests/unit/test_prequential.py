"""Quality out of sample: the figure covers the true quality, and policies are scored by verdicts they had not seen."""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest
from numpy.typing import NDArray

from shared.messages import OptionEstimate, Paired, Policy, QualityCount
from shared.prequential import (
    MIN_PROMPTS,
    PoliciesInForce,
    QualityScore,
    combined,
    excess_of_misses,
    is_missed,
    score,
    served_shares,
)
from tests.support.contract import EXAMPLES

NOW = datetime(2024, 2, 3, tzinfo=UTC)
DAY = timedelta(days=1)
OPTIONS = ("p/L0", "p/L1", "p/L2")
Floats = NDArray[np.float64]


def policy(
    x: Floats, weights: Floats, *, at: datetime = NOW, version: int = 1, expected: float = 0.95, metric="preference"
) -> Policy:
    """A policy of groups g0, g1, ... with probabilities x, (groups, options)."""
    example = EXAMPLES["policies"]
    assert isinstance(example, Policy)
    names = [f"g{g}" for g in range(len(x))]
    inputs = example.inputs.model_copy(
        update={
            "weights": dict(zip(names, weights.tolist(), strict=True)),
            "estimates": {name: {"p/L0": OptionEstimate(energy_kwh=1, processing_s=1, quality={})} for name in names},
        }
    )
    return example.model_copy(
        update={
            "version": version,
            "created_at": at,
            "groups": {name: dict(zip(OPTIONS, row.tolist(), strict=True)) for name, row in zip(names, x, strict=True)},
            "overall": {"p/L0": 1.0},
            "inputs": inputs,
            "bounds": {metric: 0.9},
            "expected_quality": {metric: expected},
        }
    )


def counts_of(outcomes: Sequence[Floats], *, metric: str = "preference") -> list[QualityCount]:
    """Counts of outcomes, one array (prompts, options) for each group."""
    return [
        QualityCount(
            group=f"g{g}",
            option=option,
            metric=metric,
            successes=float(y[:, o].sum()),
            trials=len(y),
            paired=Paired(
                reference="p/L0",
                successes=float(y[:, 0].sum()),
                both=float(np.minimum(y[:, o], y[:, 0]).sum()),
            ),
        )
        for g, y in enumerate(outcomes)
        if len(y)
        for o, option in enumerate(OPTIONS)
    ]


class World:
    """Prompt groups with true success rates; preferences are one of three, right answers are correlated."""

    def __init__(self, rng: np.random.Generator, *, groups: int, metric: str) -> None:
        self.rng = rng
        self.metric = metric
        self.weights = rng.dirichlet(np.full(groups, 2.0))
        self.rates = (
            rng.dirichlet((4.0, 3.0, 2.0), groups) if metric == "preference" else rng.uniform(0.3, 0.95, (groups, 3))
        )

    def judged(self, prompts: int) -> list[QualityCount]:
        numbers = self.rng.multinomial(prompts, self.weights)
        return counts_of([self._outcomes(p, n) for p, n in zip(self.rates, numbers, strict=True)], metric=self.metric)

    def _outcomes(self, p: Floats, prompts: int) -> Floats:
        if self.metric == "preference":
            return np.eye(3)[self.rng.choice(3, size=prompts, p=p)]
        easy = self.rng.random(prompts)[:, None]  # one draw decides all options of most prompts
        own = self.rng.random((prompts, 3))
        return (np.where(self.rng.random((prompts, 3)) < 0.6, easy, own) < p).astype(float)

    def policy(self, *, at: datetime, version: int) -> Policy:
        """Mostly pure rows, as the solutions of the program are."""
        x = np.eye(3)[self.rng.integers(0, 3, len(self.weights))]
        x[0] = self.rng.dirichlet((1.0, 1.0, 1.0))
        return policy(0.95 * x + 0.05 * np.eye(3)[0], self.weights, at=at, version=version, metric=self.metric)

    def true_quality(self, policies: Sequence[Policy]) -> float:
        x = np.mean([[[one.groups[g][o] for o in OPTIONS] for g in one.groups] for one in policies], axis=0)
        return float((self.weights[:, None] * x * self.rates).sum() / (self.weights @ self.rates[:, 0]))


@pytest.mark.statistical
@pytest.mark.parametrize("metric", ["preference", "correctness"])
@pytest.mark.parametrize(("groups", "prompts"), [(4, 40), (12, 150)])
def test_the_interval_covers_the_true_quality_in_at_least_93_percent_of_weeks(metric, groups, prompts):
    rng = np.random.default_rng(5)
    covered, weeks = 0, 200
    for _ in range(weeks):
        world = World(rng, groups=groups, metric=metric)
        in_force, scores, policies = PoliciesInForce(), [], []
        for day in range(7):
            policies.append(world.policy(at=NOW + day * DAY, version=day + 1))
            in_force.add(policies[-1])
            scores += in_force.scored(f"e{day}", world.judged(prompts), NOW + (day + 1) * DAY)
        assert len(scores) == 7
        found = combined(scores)
        assert found is not None
        covered += found.low <= world.true_quality(policies) <= found.high
    print(f"{metric}, {groups} groups, {prompts} prompts a day: {covered / weeks:.1%} of {weeks} weeks")
    assert covered / weeks >= 0.93


PURE = np.array([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
HALVES = np.array([0.5, 0.5])
ALL_FIRST = [np.tile([1.0, 0.0, 0.0], (30, 1)), np.tile([1.0, 0.0, 0.0], (30, 1))]


def test_the_figure_weights_groups_by_traffic_and_options_by_probability():
    outcomes = [np.eye(3)[[0] * 10 + [1] * 30], np.eye(3)[[0] * 20 + [2] * 20]]
    weights = np.array([0.8, 0.2])
    (one,) = score("e", counts_of(outcomes), [(policy(PURE, weights), DAY)], since=NOW, until=NOW + DAY)
    assert one.served == pytest.approx(0.8 * 30 / 40 + 0.2 * 20 / 40)
    assert one.reference == pytest.approx(0.8 * 10 / 40 + 0.2 * 20 / 40)
    assert (one.prompts, one.promised, one.bound) == (80.0, 0.95, 0.9)
    found = combined([one])
    assert found is not None
    assert found.estimate == pytest.approx(one.served / one.reference)
    assert found.low < found.estimate < found.high


def test_a_group_counts_by_the_share_of_its_prompts_for_which_the_metric_is_defined():
    right = [np.tile([1.0, 0.0, 0.0], (10, 1)), np.tile([1.0, 1.0, 1.0], (40, 1))]
    counts = [*counts_of(ALL_FIRST), *counts_of(right, metric="correctness")]
    many = [one.model_copy(update={"trials": 40.0}) if one.metric == "preference" else one for one in counts]
    by_metric = {one.metric: one for one in score("e", many, [(policy(PURE, HALVES), DAY)], since=NOW, until=NOW + DAY)}
    # A quarter of the first group's prompts can be checked, and all of the second's.
    assert by_metric["correctness"].served == pytest.approx(0.8)


def test_the_reference_alone_has_the_quality_1_without_doubt():
    x = np.array([[1.0, 0.0, 0.0]] * 2)
    (one,) = score("e", counts_of(ALL_FIRST), [(policy(x, HALVES), DAY)], since=NOW, until=NOW + DAY)
    found = combined([one])
    assert found is not None
    assert found.estimate == pytest.approx(1.0)
    assert found.standard_error == pytest.approx(0.0, abs=1e-2)


def test_only_policies_made_before_an_evaluation_are_scored_each_by_its_time_in_force():
    in_force, reference = PoliciesInForce(), np.array([[1.0, 0.0, 0.0]] * 2)
    assert in_force.scored("e0", counts_of(ALL_FIRST), NOW) == []
    in_force.add(policy(reference, HALVES, at=NOW, expected=1.0))
    in_force.add(policy(PURE, HALVES, at=NOW + 3 * DAY, version=2, expected=0.6))
    assert in_force.scored("before", counts_of(ALL_FIRST), NOW) == []
    # Learned from the evaluation: made after it, although it arrives first.
    in_force.add(policy(PURE, HALVES, at=NOW + 4 * DAY + timedelta(minutes=1), version=3, expected=0.0))
    (one,) = in_force.scored("e1", counts_of(ALL_FIRST), NOW + 4 * DAY)
    assert (one.since, one.until) == (NOW, NOW + 4 * DAY)
    assert one.promised == pytest.approx(0.75 * 1.0 + 0.25 * 0.6)
    assert one.served == pytest.approx(0.75 * 1.0 + 0.25 * 0.5)
    assert in_force.scored("e1", counts_of(ALL_FIRST), NOW + 4 * DAY) == []  # redelivered
    (two,) = in_force.scored("e2", counts_of(ALL_FIRST), NOW + 5 * DAY)
    assert two.since == NOW + 4 * DAY
    assert two.promised == pytest.approx(0.0, abs=1e-3)


def test_an_evaluation_stands_for_a_week_at_most():
    in_force = PoliciesInForce()
    in_force.add(policy(PURE, HALVES))
    (one,) = in_force.scored("e", counts_of(ALL_FIRST), NOW + 30 * DAY)
    assert one.until - one.since == 7 * DAY


def test_policies_of_other_prompt_groups_and_verdicts_without_the_reference_are_not_scored():
    length = [(policy(PURE, HALVES), DAY)]
    other = [one.model_copy(update={"group": "other"}) for one in counts_of(ALL_FIRST)]
    assert score("e", other, length, since=NOW, until=NOW + DAY) == []
    brief = [one for one in counts_of(ALL_FIRST) if one.option != "p/L0"]
    assert score("e", brief, length, since=NOW, until=NOW + DAY) == []
    assert served_shares([]) == {}


def quality_score(estimate: float, *, promised: float | None = 0.95, prompts: float = 400.0) -> QualityScore:
    return QualityScore(
        "e", "m", "preference", NOW, NOW + DAY, promised, 0.9, prompts, 0.4 * estimate, 0.4, 1e-4, 1e-4, 1e-4
    )  # fmt: skip


def test_an_evaluation_misses_a_promise_only_beyond_its_standard_error():
    found = combined([quality_score(0.9)])
    assert found is not None
    error = found.standard_error
    assert is_missed(quality_score(0.9, promised=0.9 + 1.7 * error))
    assert not is_missed(quality_score(0.9, promised=0.9 + 1.6 * error))
    assert not is_missed(quality_score(0.5, promised=None))
    assert not is_missed(quality_score(0.5, prompts=MIN_PROMPTS - 1))
    assert combined([]) is None


@pytest.mark.parametrize(
    ("missed", "scored", "least", "most"),
    [(0, 0, 0, 0), (0, 20, 0, 0), (1, 20, 0, 0), (3, 20, 0, 0), (4, 20, 0.3, 0.6), (20, 20, 5, 8)],
)
def test_misses_count_beyond_what_chance_explains(missed, scored, least, most):
    assert least <= excess_of_misses(missed, scored) <= most
