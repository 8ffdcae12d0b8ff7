"""How many prompts an evaluation takes: what further verdicts save, what they cost, and the ceiling."""

import math
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from services.evaluator.budget import (
    EvaluationSize,
    PolicyMemory,
    Spending,
    Uncertainty,
    affordable_prompts,
    evaluation_size,
    worthwhile_prompts,
)
from services.evaluator.cost import CallSums, carbon_by_hour
from shared.messages import Footprint
from tests.support.contract import EXAMPLES

NOW = datetime(2023, 2, 10, 12, tzinfo=UTC)
HALF_LIFE_S = 720 * 3_600.0
LIFETIME_S = HALF_LIFE_S / math.log(2)
SPENDING = Spending(requests_g=100.0, evaluator_g=0.5, requests_per_s=1.0, g_per_prompt=0.01)


def total_g(n: float, *, c: float, requests_per_s: float, g_per_prompt: float) -> float:
    """Grams per second of keeping n judged prompts: the margin's, and those of replacing what is forgotten."""
    return requests_per_s * c / math.sqrt(n) + n / LIFETIME_S * g_per_prompt


@pytest.mark.parametrize("requests_per_s", [0.01, 0.1, 0.5])
@pytest.mark.parametrize("judged", [150.0, 5_000.0])
def test_the_wanted_number_of_verdicts_has_the_least_cost_of_margin_and_evaluation_together(requests_per_s, judged):
    c, g_per_prompt = 0.15, 0.02
    uncertainty = Uncertainty(c / math.sqrt(judged), judged)
    rates = {"requests_per_s": requests_per_s, "g_per_prompt": g_per_prompt}
    further = worthwhile_prompts(uncertainty, half_life_s=HALF_LIFE_S, **rates)
    best = min(range(10, 50_000, 10), key=lambda n: total_g(n, c=c, **rates))
    assert further == pytest.approx(max(0.0, best - judged), abs=11)


def test_six_times_the_traffic_is_worth_more_than_three_times_the_verdicts():
    """The optimum grows with traffic to the power of 2/3."""
    found = [
        worthwhile_prompts(
            Uncertainty(0.01, 100.0), requests_per_s=rate, g_per_prompt=0.02, half_life_s=HALF_LIFE_S
        ) + 100
        for rate in (1.0, 6.0)
    ]  # fmt: skip
    assert found[1] / found[0] == pytest.approx(6 ** (2 / 3), rel=0.01)


def test_without_a_margin_no_further_verdict_is_worth_its_cost():
    assert worthwhile_prompts(Uncertainty(0.0, 500.0), requests_per_s=9.0, g_per_prompt=0.1, half_life_s=1e6) == 0


def test_the_ceiling_is_a_share_of_what_the_requests_emitted():
    assert affordable_prompts(SPENDING, 0.02) == 150
    assert affordable_prompts(replace(SPENDING, evaluator_g=3.0), 0.02) == 0
    assert affordable_prompts(replace(SPENDING, g_per_prompt=None), 0.02) == 0


@pytest.mark.parametrize(
    ("spending", "uncertainty", "share", "size"),
    [
        (SPENDING, None, 0.02, EvaluationSize(140, "maximum")),
        (SPENDING, None, 0.01, EvaluationSize(50, "carbon_ceiling")),
        (SPENDING, None, None, EvaluationSize(140, "maximum")),
        (SPENDING, Uncertainty(0.0, 500.0), 0.01, EvaluationSize(0, "not_worthwhile")),
        (SPENDING, Uncertainty(1.0, 500.0), 0.01, EvaluationSize(50, "carbon_ceiling")),
        (replace(SPENDING, g_per_prompt=None), Uncertainty(0.0, 500.0), None, EvaluationSize(140, "maximum")),
        (Spending(), None, 0.02, EvaluationSize(0, "carbon_ceiling")),
    ],
)
def test_the_smallest_limit_counts(spending, uncertainty, share, size):
    found = evaluation_size(spending, uncertainty, maximum=140, max_carbon_share=share, half_life_s=HALF_LIFE_S)
    assert found == size


def test_the_cost_of_the_margin_is_averaged_over_a_day_of_policies():
    memory, policy = PolicyMemory(), EXAMPLES["policies"]
    assert memory.uncertainty("m") is None
    memory.update(policy)
    assert memory.uncertainty("m") is None  # of an earlier optimizer
    for version, (hours, margin_g) in enumerate([(0, 0.02), (24, 0.04), (48, 0.06)], start=2):
        fields = {"version": version, "created_at": NOW + timedelta(hours=hours), "margin_g_per_request": margin_g}
        memory.update(policy.model_copy(update=fields))
    # The last policy has not served yet.
    assert memory.uncertainty("m") == Uncertainty(pytest.approx(0.02 * math.exp(-1) + 0.04 * (1 - math.exp(-1))), 0.0)
    assert memory.bounds("m", "preference")
    assert not memory.bounds("m", "correctness")
    memory.update(policy.model_copy(update={"version": 9, "status": "reference", "margin_g_per_request": 0.0}))
    assert memory.uncertainty("m") is None


def test_a_group_is_judged_thinly_once_policies_found_it_settled_for_a_day():
    memory, example = PolicyMemory(), EXAMPLES["policies"]
    assert memory.settled("m", NOW) == frozenset()
    policy = example.model_copy(
        update={
            "valid_until": NOW + timedelta(hours=3),
            "settled": {"long": NOW - timedelta(hours=24), "short": NOW - timedelta(hours=23)},
        }
    )
    memory.update(policy)
    assert memory.settled("m", NOW) == {"long"}
    assert memory.settled("m", NOW + timedelta(hours=1)) == {"long", "short"}
    assert memory.settled("m", NOW + timedelta(hours=4)) == frozenset()  # the policy has expired
    memory.update(policy.model_copy(update={"version": 2, "settled": {}}))
    assert memory.settled("m", NOW) == frozenset()


def test_carbon_is_summed_by_model_hour_and_evaluation():
    request = EXAMPLES["footprints"]
    assert isinstance(request, Footprint)
    judge = request.model_copy(update={"purpose": "judge", "evaluation_id": "e1", "total_g": 0.5})
    unknown = request.model_copy(update={"total_g": None})
    hour = request.finished_at.replace(minute=0, second=0, microsecond=0)
    assert carbon_by_hour([request, request, judge, unknown]) == {
        ("m", hour, ""): CallSums(2, 0.008),
        ("m", hour, "e1"): CallSums(1, 0.5),
    }
