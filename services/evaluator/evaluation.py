"""Carries an evaluation out: every prompt is answered by every contestant, and the answers are judged."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import TypeVar

from services.evaluator.calls import Answer, CallError, ModelCalls
from services.evaluator.counting import PREFERENCE, preference
from services.evaluator.judged import JudgedAnswer, JudgedPrompt, Looks
from services.evaluator.judging import Ballot, Comparison, Judge, JudgeError, Opinion
from services.evaluator.judging.prompt import LETTERS, question_of
from services.evaluator.metrics import EvaluatorMetrics
from services.evaluator.plan import Contestant
from services.evaluator.spending import Call, Errand
from shared.grouping import prompt_text
from shared.messages import Sample, option_key
from shared.runtime.logs import get_logger

_log = get_logger(__name__)

T = TypeVar("T")

GroupOf = Callable[[Sample], str]


class EvaluationFailedError(RuntimeError):
    """An evaluation came to nothing; the message says why."""


@dataclass(slots=True)
class Results:
    """What an evaluation has found so far.

    Attributes:
        judged: prompts with a verdict.
        evaluated: ids of the prompts that were answered and judged, abstentions included.
        dropped: prompts that a failed call took out.
        calls: that finished, of dropped prompts too.
    """

    judged: list[JudgedPrompt] = field(default_factory=list)
    evaluated: list[str] = field(default_factory=list)
    abstentions: int = 0
    dropped: int = 0
    judgements: int = 0
    calls: list[Call] = field(default_factory=list)


class Evaluation:
    """One evaluation of one model."""

    def __init__(
        self,
        evaluation_id: str,
        model: str,
        contestants: Sequence[Contestant],
        *,
        at: datetime,
        group_of: GroupOf,
        calls: ModelCalls,
        judge: Judge,
        metrics: EvaluatorMetrics,
        max_tokens: int,
        give_up_after: int,
    ) -> None:
        """Prepare.

        Args:
            at: event time that the evaluation counts from.
            group_of: the group that a sample is counted in.
        """
        self._at = at
        self._group_of = group_of
        self._evaluation_id = evaluation_id
        self._model = model
        self._contestants = contestants
        self._calls = calls
        self._judge = judge
        self._metrics = metrics
        self._max_tokens = max_tokens
        self._give_up_after = give_up_after
        self._dropped_in_a_row = 0
        self.results = Results()

    async def run(self, prompts: Sequence[Sample]) -> Results:
        """Evaluate the prompts, all at once as far as `calls` allows.

        Raises:
            EvaluationFailedError: so many prompts in a row came to nothing that there is no use in going on, or not
                one of them was judged.
        """
        failure: BaseException | None = None
        try:
            async with asyncio.TaskGroup() as group:
                for turn, sample in enumerate(prompts):
                    group.create_task(self._evaluate(sample, turn))
        except* EvaluationFailedError as failures:
            failure = failures.exceptions[0]
        if failure is not None:
            raise failure
        if not self.results.judged:
            raise EvaluationFailedError(
                f"of {len(prompts)} prompts none has a verdict: {self.results.abstentions} abstained, "
                f"{self.results.dropped} could not be answered or judged"
            )
        return self.results

    async def _evaluate(self, sample: Sample, turn: int) -> None:
        errand = Errand(self._evaluation_id, self._model, self._group_of(sample))
        try:
            answers = await self._answers(sample, errand, turn)
            await self._decide(sample, errand, answers)
        except (CallError, JudgeError) as error:
            self._drop(error)
        else:
            self._dropped_in_a_row = 0

    async def _answers(self, sample: Sample, errand: Errand, turn: int) -> list[Answer]:
        sampling = sample.sampling.model_copy(update={"max_tokens": min(sample.sampling.max_tokens, self._max_tokens)})
        asked = [
            self._calls.make(
                errand,
                purpose="evaluation",
                pool=contestant.pool_for(turn),
                level=contestant.level,
                messages=sample.messages,
                sampling=sampling,
            )
            for contestant in self._contestants
        ]
        answers = await asyncio.gather(*asked, return_exceptions=True)
        # What was generated costs energy, whether or not the prompt stays in.
        self.results.calls += [one.call for one in answers if isinstance(one, Answer)]
        return _all_or_error(answers)

    async def _decide(self, sample: Sample, errand: Errand, answers: Sequence[Answer]) -> None:
        ballot = Ballot([one.text for one in answers])
        question = question_of(sample.messages)
        opinions = await asyncio.gather(
            *(self._judge.best(Comparison(question, ballot.shown(order)), errand) for order in ballot.orders()),
            return_exceptions=True,
        )
        given = [one for one in opinions if isinstance(one, Opinion)]
        self.results.judgements += len(given)
        self.results.calls += [one.call for one in given if one.call is not None]
        verdict = ballot.verdict([one.choice for one in _all_or_error(opinions)])
        self.results.evaluated.append(sample.request_id)
        for opinion in given:
            named = "none" if opinion.choice is None else LETTERS[opinion.choice]
            self._metrics.positions.labels(named).inc()
        if not verdict.winners:
            self.results.abstentions += 1
            self._metrics.abstentions.labels(self._model).inc()
            return
        self._metrics.judged.labels(self._model).inc()
        self._metrics.votes.labels("yes").inc(verdict.agreeing)
        self._metrics.votes.labels("no").inc(verdict.votes - verdict.agreeing)
        winners = [self._contestants[place] for place in verdict.winners]
        self.results.judged.append(self._judged(sample, errand.group, answers, winners))

    def _judged(
        self, sample: Sample, group: str, answers: Sequence[Answer], winners: Sequence[Contestant]
    ) -> JudgedPrompt:
        successes = preference(self._contestants, winners)
        return JudgedPrompt(
            request_id=sample.request_id,
            stratum=sample.group,
            group=group,
            evaluated_at=self._at,
            looks=Looks.of(prompt_text(sample.messages)),
            answers=tuple(
                JudgedAnswer(
                    level=contestant.level,
                    options=contestant.options,
                    asked=option_key(answer.call.pool, contestant.level),
                    tokens=answer.call.tokens,
                    seconds=answer.call.seconds,
                    successes={PREFERENCE: success},
                )
                for contestant, answer, success in zip(self._contestants, answers, successes, strict=True)
            ),
        )

    def _drop(self, error: Exception) -> None:
        self.results.dropped += 1
        self._dropped_in_a_row += 1
        self._metrics.dropped.labels(self._model).inc()
        _log.info("prompt left out", model=self._model, evaluation=self._evaluation_id, error=str(error))
        if self._dropped_in_a_row >= self._give_up_after:
            raise EvaluationFailedError(f"{self._dropped_in_a_row} prompts in a row came to nothing; the last: {error}")


def chosen(samples: Mapping[str, Sample], ids: Sequence[str]) -> list[Sample]:
    """The samples of these ids in this order, less those that were deleted meanwhile."""
    return [samples[name] for name in ids if name in samples]


def _all_or_error(results: Sequence[T | BaseException]) -> list[T]:
    found: list[T] = []
    for one in results:
        if isinstance(one, BaseException):
            raise one
        found.append(one)
    return found
