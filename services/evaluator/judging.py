"""Generates and judges the answers to the prompts of one evaluation."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime

from services.evaluator.card import card_of_outcomes, check_fault, comparison_fault
from services.evaluator.correctness import CORRECTNESS
from services.evaluator.cost import Call, CallContext, Work
from services.evaluator.generate import Answer, CallError, ModelCalls, all_or_first_error
from services.evaluator.judges import JudgeError
from services.evaluator.metrics import EvaluatorMetrics
from services.evaluator.plan import Candidate, served_candidate
from services.evaluator.preference import NOT_WORSE, PREFERENCE
from services.evaluator.quality import JudgedAnswer, JudgedPrompt, QualityMetric, hash_of
from services.evaluator.settings import EvaluatorSettings
from shared.fleet import Fleet
from shared.grouping import extract_features, prompt_text
from shared.messages import Sample, option_key, split_option
from shared.runtime.logs import get_logger

_log = get_logger(__name__)


class EvaluationFailedError(RuntimeError):
    """An evaluation has no result; the text says why."""


class PromptJudging:
    """Generates and judges the answers to all prompts of one evaluation.

    Attributes:
        judged: prompts with a verdict.
        evaluated: ids of the prompts that were answered and judged, with or without a verdict.
        abstentions: prompts without a verdict.
        dropped: prompts that were removed because a call failed.
        discarded: metrics whose outcomes do not count because the judge failed, with the reason.
        work: of all prompts, including dropped ones.
    """

    def __init__(
        self,
        evaluation_id: str,
        model: str,
        *,
        at: datetime,
        group_of: Callable[[Sample], str],
        stands_for: Mapping[str, float],
        candidates: Sequence[Candidate],
        quality_metrics: Sequence[QualityMetric],
        calls: ModelCalls,
        fleet: Fleet,
        settings: EvaluatorSettings,
        metrics: EvaluatorMetrics,
    ) -> None:
        """Prepare.

        Args:
            at: event time to which the evaluation is assigned.
            group_of: the group in which a sample is counted.
            stands_for: by identity of a sample, the number of samples that it stands for; 1 for others.
            candidates: answers to compare.
            quality_metrics: computed for every prompt; a prompt is judged if one of them has outcomes.
        """
        self.judged: list[JudgedPrompt] = []
        self.evaluated: list[str] = []
        self.abstentions = 0
        self.dropped = 0
        self.discarded: dict[str, str] = {}
        self.work = Work()
        self._evaluation_id = evaluation_id
        self._model = model
        self._at = at
        self._group_of = group_of
        self._stands_for = stands_for
        self._candidates = candidates
        self._quality_metrics = quality_metrics
        self._calls = calls
        self._fleet = fleet
        self._settings = settings
        self._metrics = metrics
        self._consecutive_failures = 0

    async def run(self, samples: Sequence[Sample]) -> None:
        """Evaluate all prompts concurrently; `ModelCalls` limits the calls.

        Raises:
            EvaluationFailedError: too many prompts in a row failed, or no prompt has a verdict.
        """
        failure: BaseException | None = None
        try:
            async with asyncio.TaskGroup() as group:
                for number, sample in enumerate(samples):
                    group.create_task(self._evaluate(sample, number))
        except* EvaluationFailedError as failures:
            failure = failures.exceptions[0]
        if failure is not None:
            raise failure
        self._rate_judge()
        # Repeating an evaluation costs energy and would not improve the judge.
        if not self.judged and not self.discarded:
            raise EvaluationFailedError(
                f"none of {len(samples)} prompts has a verdict: {self.abstentions} abstentions, {self.dropped} could "
                "not be answered or judged"
            )

    async def _evaluate(self, sample: Sample, number: int) -> None:
        context = CallContext(self._evaluation_id, self._model, self._group_of(sample), self.work)
        try:
            answers = await self._generate(sample, context, number)
            scores = {
                metric.name: await metric.score(sample, [one.text for one in answers], context)
                for metric in self._quality_metrics
            }
        except (CallError, JudgeError) as error:
            self._drop(error)
            return
        self._consecutive_failures = 0
        self.evaluated.append(sample.identity)
        outcomes = {name: found for name, found in scores.items() if found is not None}
        if not outcomes:
            self.abstentions += 1
            self._metrics.abstentions.labels(self._model).inc()
            return
        if PREFERENCE in outcomes:
            options = [candidate.options[0] for candidate in self._candidates]
            texts = [one.text for one in answers]
            self.work.card += card_of_outcomes(options, texts, outcomes[PREFERENCE], sample.reference)
        self._metrics.judged_prompts.labels(self._model).inc()
        self.judged.append(self._judged_prompt(sample, context.group, answers, outcomes))

    def _rate_judge(self) -> None:
        """Discard the outcomes of metrics for which the judge cannot be relied on."""
        metrics, card = self._metrics, self.work.card
        metrics.count_card(card)
        faults = {
            PREFERENCE: comparison_fault(card, self._settings),
            NOT_WORSE: comparison_fault(card, self._settings),
            CORRECTNESS: check_fault(card, self._settings),
        }
        measured = {name for one in self.judged for answer in one.answers for name in answer.outcomes}
        for name, reason in faults.items():
            metrics.judge_usable.labels(self._model, name).set(reason is None)
            if reason is not None and name in measured:
                self.discarded[name] = reason
                _log.warning("the judge's verdicts do not count", model=self._model, metric=name, reason=reason)
        if self.discarded:
            kept = (one.without(self.discarded) for one in self.judged)
            self.judged = [one for one in kept if any(answer.outcomes for answer in one.answers)]

    async def _generate(self, sample: Sample, context: CallContext, number: int) -> list[Answer]:
        """The answer of every candidate, the served one as it is; waits for all of them even if one fails."""
        limit = min(sample.sampling.max_tokens, self._settings.max_tokens)
        sampling = sample.sampling.model_copy(update={"max_tokens": limit})
        served, fleet = sample.served, self._fleet
        reused = served_candidate(served, self._candidates, fleet, max_tokens=limit)
        results = await asyncio.gather(
            *(
                self._calls.generate(
                    context,
                    purpose="evaluation",
                    pool=candidate.pool_for(number),
                    level=candidate.level,
                    messages=sample.messages,
                    sampling=sampling,
                )
                for place, candidate in enumerate(self._candidates)
                if place != reused
            ),
            return_exceptions=True,
        )
        answers = all_or_first_error(results)
        if served is not None and reused is not None:
            (pool, _) = split_option(served.option)
            call = Call("evaluation", pool, served.completion_tokens, served.processing_s)
            answers.insert(reused, Answer(served.text, call))
            context.work.reused += 1
        counted = self._metrics.answers
        counted.labels(self._model, "generated").inc(len(results))
        counted.labels(self._model, "served").inc(len(answers) - len(results))
        return answers

    def _judged_prompt(
        self, sample: Sample, group: str, answers: Sequence[Answer], outcomes: Mapping[str, Sequence[float]]
    ) -> JudgedPrompt:
        return JudgedPrompt(
            id=sample.identity,
            request_id=sample.request_id,
            stratum=sample.group,
            group=group,
            evaluated_at=self._at,
            features=extract_features(prompt_text(sample.messages)),
            tenant=sample.tenant,
            weight=self._stands_for.get(sample.identity, 1.0),
            prompt_hash=hash_of(sample.messages, self._settings.draw_key_bytes),
            answers=tuple(
                JudgedAnswer(
                    level=candidate.level,
                    options=candidate.options,
                    generated_by=option_key(answer.call.pool, candidate.level),
                    tokens=answer.call.tokens,
                    seconds=answer.call.seconds,
                    outcomes={name: found[index] for name, found in outcomes.items()},
                )
                for index, (candidate, answer) in enumerate(zip(self._candidates, answers, strict=True))
            ),
        )

    def _drop(self, error: Exception) -> None:
        self.dropped += 1
        self._consecutive_failures += 1
        self._metrics.dropped_prompts.labels(self._model).inc()
        _log.info("prompt dropped", model=self._model, evaluation=self._evaluation_id, error=str(error))
        if self._consecutive_failures >= self._settings.max_consecutive_failures:
            raise EvaluationFailedError(f"{self._consecutive_failures} prompts in a row failed; the last: {error}")
