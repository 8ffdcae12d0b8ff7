"""One evaluation from its trigger to the published quality: choose prompts, generate, judge, store, publish.

Only the leader of the evaluator's copies evaluates. One that lost its lease in the middle, for example because its
process was suspended, finds its evaluation marked as interrupted by the next leader, and stores and publishes nothing.
"""

import asyncio
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal
from uuid import uuid4

from faststream.kafka import KafkaBroker

from services.evaluator.answers import contradicted
from services.evaluator.budget import EvaluationSize, PolicyMemory, evaluation_size
from services.evaluator.card import card_of_outcomes, check_fault, comparison_fault
from services.evaluator.correctness import CORRECTNESS
from services.evaluator.cost import Call, CallContext, Work, estimate_cost
from services.evaluator.generate import Answer, CallError, ModelCalls, all_or_first_error
from services.evaluator.judges import JudgeError
from services.evaluator.learning import GroupLearner
from services.evaluator.metrics import EvaluatorMetrics
from services.evaluator.not_worse import NOT_WORSE
from services.evaluator.plan import Candidate, allocate, interleave, served_candidate
from services.evaluator.preference import PREFERENCE
from services.evaluator.quality import JudgedAnswer, JudgedPrompt, QualityMetric, tally
from services.evaluator.samples import SampleStore
from services.evaluator.settings import EvaluatorSettings
from services.evaluator.store import EvaluationStore, GroupStore
from shared.carbon import LatestIntensities
from shared.fleet import Fleet
from shared.grouping import extract_features, prompt_text
from shared.kafka.leader import Leadership
from shared.kafka.publish import declare_publisher, publish_with_retry
from shared.messages import PromptGrouping, Quality, Sample, UsageRecord, option_key, split_option
from shared.runtime.clock import Clock
from shared.runtime.database import DatabaseStatus, DatabaseUnavailableError
from shared.runtime.logs import get_logger
from shared.runtime.settings import KafkaSettings
from shared.topics import PROMPT_GROUPS, QUALITY, USAGE

_log = get_logger(__name__)


class EvaluationFailedError(RuntimeError):
    """An evaluation has no result; the text says why."""


@dataclass(frozen=True, slots=True)
class EvaluationTrigger:
    """Why and when to evaluate.

    Attributes:
        reason: see `opportunity.Reason`.
        at: event time to which the evaluation is assigned.
        g_per_kwh: carbon intensity of the evaluator's zone, gCO2eq/kWh; None if no recent value is known.
    """

    reason: str
    at: datetime
    g_per_kwh: float | None = None


@dataclass(frozen=True, slots=True)
class EvaluationResult:
    """Result of an attempt to evaluate.

    Attributes:
        status: `claimed_by_other`: another process has taken the evaluation over, or has just evaluated the model.
        last: event time of the other process's evaluation, if known.
    """

    status: Literal["finished", "failed", "claimed_by_other"]
    last: datetime | None = None


class Publishers:
    """The evaluator's publishers. Methods return once Kafka has the message.

    Calls have used energy, so every process publishes its own. Results come from the leader only: the other methods
    raise `NotLeaderError`.
    """

    def __init__(self, broker: KafkaBroker, kafka: KafkaSettings, leadership: Leadership) -> None:
        self._leadership = leadership
        self._usage = declare_publisher(broker, kafka, USAGE)
        self._quality = declare_publisher(broker, kafka, QUALITY)
        self._groupings = declare_publisher(broker, kafka, PROMPT_GROUPS)

    async def usage(self, record: UsageRecord) -> None:
        """Publish a finished call."""
        await publish_with_retry(lambda: self._usage.publish(record, key=record.id.encode()))

    async def quality(self, quality: Quality) -> None:
        """Publish the result of an evaluation."""
        await self._leadership.publish(lambda: self._quality.publish(quality, key=quality.evaluation_id.encode()))

    async def grouping(self, grouping: PromptGrouping) -> None:
        """Publish a version of prompt groups."""
        await self._leadership.publish(lambda: self._groupings.publish(grouping, key=grouping.model.encode()))


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationRunner:
    """Runs evaluations.

    Attributes:
        candidates: answers to compare, by model.
        quality_metrics: computed for every prompt; a prompt is judged if one of them has outcomes.
    """

    samples: SampleStore
    store: EvaluationStore
    group_store: GroupStore
    status: DatabaseStatus
    learner: GroupLearner
    publishers: Publishers
    calls: ModelCalls
    quality_metrics: Sequence[QualityMetric]
    candidates: Mapping[str, Sequence[Candidate]]
    intensities: LatestIntensities
    policies: PolicyMemory
    fleet: Fleet
    clock: Clock
    settings: EvaluatorSettings
    metrics: EvaluatorMetrics

    async def evaluate(self, model: str, trigger: EvaluationTrigger) -> EvaluationResult:
        """Evaluate a model, unless another process has done so within the grace period; this one must be the leader.

        Raises:
            DatabaseUnavailableError: before the evaluation was finished.
            NotLeaderError: it is finished, but another process may be the leader, which then publishes the result.
        """
        last = await self.store.last_evaluation(model)
        recent = last is not None and trigger.at - last <= timedelta(hours=self.settings.min_gap_h)
        if recent and trigger.reason != "requested":
            return EvaluationResult("claimed_by_other", last)
        await self.store.recover_interrupted(model)
        evaluation_id = uuid4().hex
        await self.store.start(evaluation_id, model=model, reason=trigger.reason, at=trigger.at)
        return await self._run(evaluation_id, model, trigger)

    async def size(self, model: str, reason: str) -> EvaluationSize:
        """How many prompts an evaluation with this trigger may take now.

        The first evaluation, and one that a person requests, take as many as the setting allows. Until there are enough
        judged prompts to learn groups from, only the ceiling limits the others.

        Raises:
            DatabaseUnavailableError: the database is unavailable.
        """
        settings = self.settings
        if reason in ("first", "requested"):
            return EvaluationSize(settings.prompts_per_evaluation, "maximum")
        to_learn = settings.prompt_groups == "learned" and (
            (await self.group_store.progress(model)).judged < settings.min_judged_to_learn
        )
        return evaluation_size(
            await self.store.spending(model, now=self.clock.now()),
            None if to_learn else self.policies.uncertainty(model),
            maximum=settings.prompts_per_evaluation,
            max_carbon_share=settings.max_carbon_share,
            half_life_s=settings.quality_half_life_h * 3_600.0,
        )

    async def publish_unpublished(self) -> None:
        """Publish every result that Kafka may not have, then every version of groups."""
        for quality in await self.status.retry(self.store.unpublished):
            await self.publishers.quality(quality)
            await self.store.mark_published(quality.evaluation_id)
        for grouping in await self.status.retry(self.group_store.unpublished):
            await self.publishers.grouping(grouping)
            await self.group_store.mark_published(grouping)

    async def _run(self, evaluation_id: str, model: str, trigger: EvaluationTrigger) -> EvaluationResult:
        log = _log.bind(model=model, evaluation=evaluation_id, trigger=trigger.reason)
        size = await self.size(model, trigger.reason)
        samples = self._without_contradictions(await self._choose_samples(model, size.prompts))
        log.info("evaluation started", prompts=len(samples), limit=size.limit, g_per_kwh=trigger.g_per_kwh)
        group_of = await self.learner.assignment(model, samples)
        judging = PromptJudging(self, evaluation_id, model, at=trigger.at, group_of=group_of)
        try:
            await judging.run(samples)
        except EvaluationFailedError as error:
            log.warning("evaluation failed", error=str(error))
            await self.store.fail(evaluation_id, str(error))
            return EvaluationResult("failed")
        # The result has cost energy, so it is completed and stored however long the database is unavailable.
        energy = await self.status.retry(self.store.energy)
        quality = Quality(
            evaluation_id=evaluation_id,
            model=model,
            evaluated_at=trigger.at,
            trigger=trigger.reason,
            intensity_g_per_kwh=trigger.g_per_kwh,
            counts=tally((one.group, one) for one in judging.judged),
            prompts=len(judging.evaluated),
            abstentions=judging.abstentions,
            judge=judging.work.card,
            rubric=rubric_name(self.settings.rubric),
            discarded=judging.discarded,
            cost=estimate_cost(judging.work, energy=energy, intensities=self._current_intensities(), fleet=self.fleet),
        )
        finished = await self.status.retry(
            lambda: self.store.finish(quality, evaluated=judging.evaluated, judged=judging.judged)
        )
        if not finished:
            log.warning("the evaluation is dropped: another copy of the evaluator has taken over")
            return EvaluationResult("claimed_by_other")
        await self.publish_unpublished()
        await self._learn_groups(model)
        log.info(
            "evaluation finished",
            prompts=quality.prompts,
            abstentions=quality.abstentions,
            dropped=judging.dropped,
            reused=quality.cost.reused,
            energy_kwh=quality.cost.energy_kwh,
        )
        return EvaluationResult("finished")

    async def _choose_samples(self, model: str, prompts: int) -> list[Sample]:
        """Samples by traffic share, in an order whose beginning covers every group."""
        available = await self.samples.ids_by_group(model)
        numbers = allocate(
            {group: len(ids) for group, ids in available.items()},
            await self.samples.traffic(model),
            total=prompts,
            minimum=self.settings.min_prompts_per_group,
        )
        chosen = {group: available[group][:number] for group, number in numbers.items()}
        return await self.samples.load(model, [one for _, one in interleave(chosen)])

    @staticmethod
    def _without_contradictions(samples: Sequence[Sample]) -> list[Sample]:
        """The samples; references that contradict each other are removed."""
        unusable = contradicted(samples)
        if unusable:
            _log.warning("references of the same prompt contradict each other and are not used", samples=len(unusable))
        return [one.model_copy(update={"reference": None}) if one.identity in unusable else one for one in samples]

    def _current_intensities(self) -> dict[str, float]:
        """gCO2eq/kWh by zone; without zones whose latest value is too old."""
        now, max_age_s = self.clock.now(), self.settings.max_intensity_age_s
        values = {
            zone: self.intensities.fresh_g_per_kwh(zone, now, max_age_s=max_age_s) for zone in self.intensities.zones
        }
        return {zone: value for zone, value in values.items() if value is not None}

    async def _learn_groups(self, model: str) -> None:
        """Learn prompt groups if it is due. The evaluation is finished, so a failure here is only logged."""
        try:
            learned = await self.learner.learn_if_due(
                model,
                traffic=await self.samples.traffic(model),
                energy=await self.store.energy(),
                now=self.clock.now(),
            )
        except DatabaseUnavailableError as error:
            _log.warning("learning prompt groups is postponed", model=model, error=str(error))
            return
        if learned is not None:
            await self.publish_unpublished()


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
        runner: EvaluationRunner,
        evaluation_id: str,
        model: str,
        *,
        at: datetime,
        group_of: Callable[[Sample], str],
    ) -> None:
        """Prepare.

        Args:
            at: event time to which the evaluation is assigned.
            group_of: the group in which a sample is counted.
        """
        self.judged: list[JudgedPrompt] = []
        self.evaluated: list[str] = []
        self.abstentions = 0
        self.dropped = 0
        self.discarded: dict[str, str] = {}
        self.work = Work()
        self._runner = runner
        self._evaluation_id = evaluation_id
        self._model = model
        self._at = at
        self._group_of = group_of
        self._candidates = runner.candidates[model]
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
                for metric in self._runner.quality_metrics
            }
        except (CallError, JudgeError) as error:
            self._drop(error)
            return
        self._consecutive_failures = 0
        self.evaluated.append(sample.identity)
        outcomes = {name: found for name, found in scores.items() if found is not None}
        if not outcomes:
            self.abstentions += 1
            self._runner.metrics.abstentions.labels(self._model).inc()
            return
        if PREFERENCE in outcomes:
            options = [candidate.options[0] for candidate in self._candidates]
            texts = [one.text for one in answers]
            self.work.card += card_of_outcomes(options, texts, outcomes[PREFERENCE], sample.reference)
        self._runner.metrics.judged_prompts.labels(self._model).inc()
        self.judged.append(self._judged_prompt(sample, context.group, answers, outcomes))

    def _rate_judge(self) -> None:
        """Discard the outcomes of metrics for which the judge cannot be relied on."""
        metrics, card = self._runner.metrics, self.work.card
        metrics.count_card(card)
        faults = {
            PREFERENCE: comparison_fault(card, self._runner.settings),
            NOT_WORSE: comparison_fault(card, self._runner.settings),
            CORRECTNESS: check_fault(card, self._runner.settings),
        }
        for name, reason in faults.items():
            metrics.judge_usable.labels(self._model, name).set(reason is None)
            if reason is not None:
                self.discarded[name] = reason
                _log.warning("the judge's verdicts do not count", model=self._model, metric=name, reason=reason)
        if self.discarded:
            kept = (one.without(self.discarded) for one in self.judged)
            self.judged = [one for one in kept if any(answer.outcomes for answer in one.answers)]

    async def _generate(self, sample: Sample, context: CallContext, number: int) -> list[Answer]:
        """The answer of every candidate, the served one as it is; waits for all of them even if one fails."""
        limit = min(sample.sampling.max_tokens, self._runner.settings.max_tokens)
        sampling = sample.sampling.model_copy(update={"max_tokens": limit})
        served, fleet = sample.served, self._runner.fleet
        reused = served_candidate(served, self._candidates, fleet, max_tokens=limit)
        results = await asyncio.gather(
            *(
                self._runner.calls.generate(
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
        counted = self._runner.metrics.answers
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
        self._runner.metrics.dropped_prompts.labels(self._model).inc()
        _log.info("prompt dropped", model=self._model, evaluation=self._evaluation_id, error=str(error))
        if self._consecutive_failures >= self._runner.settings.max_consecutive_failures:
            raise EvaluationFailedError(f"{self._consecutive_failures} prompts in a row failed; the last: {error}")


def rubric_name(rubric: str | None) -> str:
    """Name of a rubric in messages: `default`, or a hash of its text."""
    return "default" if rubric is None else hashlib.blake2b(rubric.encode(), digest_size=4).hexdigest()
