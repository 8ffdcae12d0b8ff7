"""The metric `not_worse`: each answer against the baseline's alone, ties count, and other options change nothing."""

from collections.abc import Callable, Sequence
from datetime import UTC, datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from deploy.triton.stand_in.judge import parse_judge_prompt
from services.evaluator.card import comparison_fault
from services.evaluator.cost import CallContext
from services.evaluator.judges import LETTERS, JudgeError
from services.evaluator.metrics import EvaluatorMetrics
from services.evaluator.preference import NotWorseMetric, PreferenceMetric
from services.evaluator.quality import JudgedAnswer, JudgedPrompt, tally
from services.evaluator.settings import EvaluatorSettings
from shared.grouping import extract_features
from shared.messages import ChatMessage
from tests.support.evaluator import sample

FULL = "the full answer"


class PairJudge:
    """Names an answer by a rule, and remembers what it compared."""

    def __init__(self, rule: Callable[[Sequence[str]], int | None]) -> None:
        self.rule = rule
        self.compared: list[tuple[str, ...]] = []

    async def reply(self, messages: Sequence[ChatMessage], context: CallContext) -> str:
        answers = parse_judge_prompt(messages[-1].content).answers
        self.compared.append(answers)
        place = self.rule(answers)
        return "Unclear" if place is None else LETTERS[place]


def prefers(*ranked: str) -> Callable[[Sequence[str]], int]:
    """Names the answer that comes first in the ranking."""
    return lambda answers: min(range(len(answers)), key=lambda place: ranked.index(answers[place]))


async def score(rule, answers, *, asks: bool = True):
    judge = PairJudge(rule)
    preference = PreferenceMetric(judge, EvaluatorMetrics(CollectorRegistry()))
    context = CallContext("e", "m", "qa")
    outcomes = await NotWorseMetric(preference, asks_judge=lambda _: asks).score(sample(1), answers, context)
    return outcomes, judge.compared, context.work


async def test_an_answer_is_worse_if_the_baselines_is_named_in_both_orders():
    outcomes, compared, work = await score(prefers("better", FULL, "worse"), (FULL, "better", "worse"))
    assert outcomes == [1.0, 1.0, 0.0]
    assert sorted(compared) == sorted([(FULL, "better"), ("better", FULL), (FULL, "worse"), ("worse", FULL)])
    assert (work.judgements, work.card.votes) == (4, 4)


async def test_a_tie_counts_as_not_worse_and_shows_on_the_judges_card():
    outcomes, _, work = await score(lambda _: 0, (FULL, "other"))
    assert outcomes == [1.0, 1.0]
    assert (work.card.comparisons, work.card.ties, work.card.flips) == (1, 1, 1)


async def test_a_judge_that_only_considers_the_position_does_not_count():
    _, _, work = await score(lambda _: 0, (FULL, *(f"answer {number}" for number in range(20))))
    assert "the same position" in (comparison_fault(work.card, EvaluatorSettings()) or "")


async def test_equal_answers_are_compared_once_and_those_of_the_baseline_not_at_all():
    outcomes, compared, _ = await score(prefers(FULL, "no"), (FULL, "no", FULL, "no"))
    assert outcomes == [1.0, 0.0, 1.0, 0.0]
    assert len(compared) == 2


@settings(deadline=None)
@given(st.lists(st.sampled_from(["a", "b", "c", "d", "e", "f"]), min_size=1, max_size=6, unique=True), st.randoms())
async def test_what_else_is_in_the_catalogue_changes_nothing(others, chance):
    ranking = [FULL, *others]
    chance.shuffle(ranking)
    together, _, _ = await score(prefers(*ranking), (FULL, *others))
    assert together is not None
    for place, one in enumerate(others, 1):
        alone, _, _ = await score(prefers(*ranking), (FULL, one))
        assert alone == [1.0, together[place]]


async def test_an_unreadable_vote_leaves_the_prompt_without_an_outcome():
    outcomes, _, _ = await score(lambda answers: None if "b" in answers else 0, (FULL, "a", "b"))
    assert outcomes is None


async def test_the_judge_is_asked_only_while_a_policy_limits_the_metric():
    assert await score(lambda _: 0, (FULL, "a"), asks=False) == (None, [], CallContext("e", "m", "qa").work)


async def test_a_failed_vote_is_an_error():
    def fail(answers):
        raise JudgeError("away")

    with pytest.raises(JudgeError):
        await score(fail, (FULL, "a", "b"))


def test_outcomes_are_counted_with_those_of_the_baseline():
    answers = tuple(
        JudgedAnswer(level, (f"p/{level}",), f"p/{level}", 3, 1.0, {"not_worse": value})
        for level, value in (("L0", 1.0), ("L1", 1.0), ("L2", 0.0))
    )
    prompt = JudgedPrompt("r", "r", "qa", "qa", datetime(2024, 2, 8, tzinfo=UTC), extract_features("why?"), answers)
    counts = {one.option: one for one in tally([("qa", prompt)])}
    assert {option: (one.successes, one.trials) for option, one in counts.items()} == {
        "p/L0": (1.0, 1), "p/L1": (1.0, 1), "p/L2": (0.0, 1),
    }  # fmt: skip
    assert all(one.paired is not None and one.paired.successes == 1.0 for one in counts.values())
