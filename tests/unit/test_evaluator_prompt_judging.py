"""One evaluation: answers of all candidates, quality metrics, dropped prompts, and the work that is charged."""

import tomllib
from collections.abc import Sequence
from datetime import UTC, datetime

import pytest
from prometheus_client import CollectorRegistry

from services.evaluator.cost import Call, CallContext
from services.evaluator.generate import Answer, CallError
from services.evaluator.judges import JudgeError
from services.evaluator.judging import EvaluationFailedError, PromptJudging
from services.evaluator.metrics import EvaluatorMetrics
from services.evaluator.plan import Candidate
from services.evaluator.settings import EvaluatorSettings
from shared.fleet import Fleet
from shared.messages import JudgeCard, Sample, ServedAnswer
from tests.support.evaluator import sample
from tests.support.router import fleet_toml

AT = datetime(2023, 2, 10, 12, tzinfo=UTC)
FLEET = Fleet.model_validate(tomllib.loads(fleet_toml(["h:1"])))
CANDIDATES = (Candidate("L0", ("p", "q")), Candidate("L1", ("p", "q")))


class FakeCalls:
    """Answers with the level's name; calls for given prompts fail at L1."""

    def __init__(self, *, failing: frozenset[str] = frozenset()) -> None:
        self.failing = failing

    async def generate(self, context: CallContext, *, purpose, pool, level, messages, sampling) -> Answer:
        if level == "L1" and messages[-1].content in self.failing:
            raise CallError("no server")
        call = Call(purpose, pool, 10, 1.0)
        context.work.calls.append(call)
        return Answer(level, call)


class FixedMetric:
    """A metric with the same outcomes for every prompt, except for given request ids."""

    def __init__(self, name: str, outcomes: Sequence[float], *, without: frozenset[str] = frozenset()) -> None:
        self.name = name
        self.outcomes = outcomes
        self.without = without

    async def score(self, sample: Sample, answers: Sequence[str], context: CallContext) -> Sequence[float] | None:
        context.work.judgements += 1
        return None if sample.request_id in self.without else self.outcomes


class FailingMetric:
    name = "preference"

    async def score(self, sample: Sample, answers: Sequence[str], context: CallContext) -> Sequence[float] | None:
        raise JudgeError("the judge is down")


def judging(*metrics, calls: FakeCalls | None = None, max_consecutive_failures: int = 10) -> PromptJudging:
    return PromptJudging(
        "e",
        "m",
        at=AT,
        group_of=lambda one: one.group,
        stands_for={},
        candidates=CANDIDATES,
        quality_metrics=metrics,
        calls=calls or FakeCalls(),  # type: ignore[arg-type]
        fleet=FLEET,
        settings=EvaluatorSettings(max_consecutive_failures=max_consecutive_failures),
        metrics=EvaluatorMetrics(CollectorRegistry()),
    )


async def test_every_metric_adds_outcomes_and_a_prompt_without_any_is_an_abstention():
    preference = FixedMetric("preference", (1.0, 0.0), without=frozenset({"r1", "r2"}))
    correctness = FixedMetric("correctness", (1.0, 1.0), without=frozenset({"r0", "r2"}))
    run = judging(preference, correctness)
    await run.run([sample(number) for number in range(3)])
    assert {one.id: [answer.outcomes for answer in one.answers] for one in run.judged} == {
        "r0": [{"preference": 1.0}, {"preference": 0.0}],
        "r1": [{"correctness": 1.0}, {"correctness": 1.0}],
    }
    assert (sorted(run.evaluated), run.abstentions, run.dropped) == (["r0", "r1", "r2"], 1, 0)
    assert (len(run.work.calls), run.work.judgements) == (6, 6)
    assert {one.answers[0].generated_by for one in run.judged} == {"p/L0", "q/L0"}  # pools alternate


async def test_the_served_answer_is_judged_instead_of_a_new_one_and_costs_nothing():
    served = ServedAnswer(
        option="p/L1", directive=FLEET.directive_text("L1"), text="as served", completion_tokens=7, processing_s=2.0
    )
    seen: list[Sequence[str]] = []

    class Recorder(FixedMetric):
        async def score(self, sample: Sample, answers: Sequence[str], context: CallContext) -> Sequence[float] | None:
            seen.append(answers)
            return await super().score(sample, answers, context)

    run = judging(Recorder("preference", (1.0, 0.0)))
    await run.run([sample(0, served=served)])
    assert seen == [["L0", "as served"]]
    assert (len(run.work.calls), run.work.reused) == (1, 1)
    (prompt,) = run.judged
    assert (prompt.answers[1].generated_by, prompt.answers[1].tokens) == ("p/L1", 7)
    assert prompt.answers[1].seconds == 2.0


async def test_a_failed_call_drops_the_prompt_but_its_other_answers_are_charged():
    failing = sample(1).messages[-1].content
    run = judging(FixedMetric("preference", (1.0, 0.0)), calls=FakeCalls(failing=frozenset({failing})))
    await run.run([sample(0), sample(1)])
    assert ([one.id for one in run.judged], run.evaluated, run.dropped) == (["r0"], ["r0"], 1)
    assert len(run.work.calls) == 3


async def test_too_many_failures_in_a_row_end_the_evaluation():
    with pytest.raises(EvaluationFailedError, match="3 prompts in a row failed; the last: the judge is down"):
        await judging(FailingMetric(), max_consecutive_failures=3).run([sample(number) for number in range(9)])


async def test_an_evaluation_without_a_verdict_has_failed():
    undecided = FixedMetric("preference", (1.0, 0.0), without=frozenset({"r0", "r1"}))
    with pytest.raises(EvaluationFailedError, match="none of 2 prompts has a verdict: 2 abstentions, 0 could"):
        await judging(undecided).run([sample(0), sample(1)])


class CardedMetric(FixedMetric):
    """A metric that adds a card for every prompt."""

    def __init__(self, name: str, card: JudgeCard) -> None:
        super().__init__(name, (1.0, 0.0))
        self.card = card

    async def score(self, sample: Sample, answers: Sequence[str], context: CallContext) -> Sequence[float] | None:
        context.work.card += self.card
        return await super().score(sample, answers, context)


LOCKED = JudgeCard(votes=2, positions={"A": 2}, comparisons=1, ties=1, repeats=1, flips=1, flips_at_random=0.5)


async def test_verdicts_of_a_judge_that_always_names_the_same_position_are_discarded_and_the_others_count():
    run = judging(CardedMetric("preference", LOCKED), FixedMetric("correctness", (1.0, 1.0)))
    await run.run([sample(number) for number in range(20)])
    assert list(run.discarded) == ["preference"]
    assert "100% of the votes named the same position" in run.discarded["preference"]
    assert {name for one in run.judged for answer in one.answers for name in answer.outcomes} == {"correctness"}
    assert (len(run.judged), len(run.evaluated)) == (20, 20)


async def test_an_evaluation_whose_judge_cannot_be_used_ends_without_outcomes_and_is_not_repeated():
    run = judging(CardedMetric("preference", LOCKED))
    await run.run([sample(number) for number in range(20)])
    assert (run.judged, len(run.evaluated)) == ([], 20)
    registry = run._metrics
    assert registry.judge_usable.labels("m", "preference")._value.get() == 0.0
    assert registry.judge_usable.labels("m", "correctness")._value.get() == 1.0


async def test_the_card_has_the_lengths_of_the_answers_by_option():
    run = judging(FixedMetric("preference", (1.0, 0.0)))
    await run.run([sample(number) for number in range(3)])
    assert run.work.card.lengths["p/L1"].prompts == 3
    assert run.work.card.lengths["p/L1"].d == -3.0
