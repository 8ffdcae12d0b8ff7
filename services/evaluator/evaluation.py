"""One evaluation from its trigger to the published quality: choose prompts, generate, judge, store, publish.

Only the leader of the evaluator's copies evaluates. One that lost its lease in the middle, for example because its
process was suspended, finds its evaluation marked as interrupted by the next leader, and stores and publishes nothing.
"""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final, Literal
from uuid import uuid4

from faststream.kafka import KafkaBroker

from services.evaluator.answers import contradicted
from services.evaluator.budget import MIN_PROMPTS, EvaluationSize, PolicyMemory, evaluation_size
from services.evaluator.cost import estimate_cost
from services.evaluator.generate import ModelCalls
from services.evaluator.group_store import GroupStore
from services.evaluator.judging import EvaluationFailedError, PromptJudging
from services.evaluator.learning import GroupLearner
from services.evaluator.metrics import EvaluatorMetrics
from services.evaluator.plan import Candidate, allocate, interleave, thin
from services.evaluator.quality import QualityMetric, prompt_hashes, tally
from services.evaluator.samples import SampleStore
from services.evaluator.settings import EvaluatorSettings
from services.evaluator.store import EvaluationStore
from shared.carbon import LatestIntensities
from shared.fleet import Fleet
from shared.hashing import uniform
from shared.kafka.leader import Leadership
from shared.kafka.publish import declare_publisher, publish_with_retry
from shared.messages import PromptGrouping, Quality, Sample, UsageRecord
from shared.runtime.clock import Clock
from shared.runtime.database import DatabaseStatus, DatabaseUnavailableError
from shared.runtime.logs import get_logger
from shared.runtime.settings import KafkaSettings
from shared.topics import PROMPT_GROUPS, QUALITY, USAGE

_SALT: Final = "settled"

_log = get_logger(__name__)


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
        return evaluation_size(
            await self.store.spending(model, now=self.clock.now()),
            None if await self._too_few_to_learn(model) else self.policies.uncertainty(model),
            maximum=settings.prompts_per_evaluation,
            max_carbon_share=settings.max_carbon_share,
            half_life_s=settings.quality_half_life_h * 3_600.0,
        )

    async def _too_few_to_learn(self, model: str) -> bool:
        """Whether groups cannot be learned yet, for which every verdict is needed."""
        if self.settings.prompt_groups != "learned":
            return False
        return (await self.group_store.progress(model)).judged < self.settings.min_judged_to_learn

    async def _settled(self, model: str, reason: str) -> frozenset[str]:
        """Groups that are judged thinly; none in an evaluation that a person requests, or before groups are learned."""
        if reason in ("first", "requested") or await self._too_few_to_learn(model):
            return frozenset()
        return self.policies.settled(model, self.clock.now())

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
        found = self._without_contradictions(await self._choose_samples(model, size.prompts))
        group_of = await self.learner.assignment(model, found)
        groups = {one.identity: group_of(one) for one in found}
        stands_for = thin(
            groups,
            await self._settled(model, trigger.reason),
            share=self.settings.settled_share,
            minimum=MIN_PROMPTS,
            draw=lambda identity: uniform(_SALT, f"{evaluation_id} {identity}", self.settings.draw_key_bytes),
        )
        samples = [one for one in found if one.identity in stands_for]
        skipped = [one.identity for one in found if one.identity not in stands_for]
        log.info(
            "evaluation started",
            prompts=len(samples),
            skipped=len(skipped),
            limit=size.limit,
            g_per_kwh=trigger.g_per_kwh,
        )
        judging = PromptJudging(
            evaluation_id,
            model,
            at=trigger.at,
            group_of=group_of,
            stands_for=stands_for,
            candidates=self.candidates[model],
            quality_metrics=self.quality_metrics,
            calls=self.calls,
            fleet=self.fleet,
            settings=self.settings,
            metrics=self.metrics,
        )
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
            prompt_hashes=prompt_hashes((one.group, one) for one in judging.judged),
            prompts=len(judging.evaluated),
            abstentions=judging.abstentions,
            skipped=len(skipped),
            skipped_by_group=dict(Counter(groups[identity] for identity in skipped)),
            directives=self.fleet.directive_hashes,
            judge=judging.work.card,
            rubric=rubric_name(self.settings.rubric),
            discarded=judging.discarded,
            cost=estimate_cost(judging.work, energy=energy, intensities=self._current_intensities(), fleet=self.fleet),
        )
        finished = await self.status.retry(
            lambda: self.store.finish(quality, evaluated=[*judging.evaluated, *skipped], judged=judging.judged)
        )
        if not finished:
            log.warning("the evaluation is dropped: another copy of the evaluator has taken over")
            return EvaluationResult("claimed_by_other")
        self.metrics.skipped_prompts.labels(model).inc(len(skipped))
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


def rubric_name(rubric: str | None) -> str:
    """Name of a rubric in messages: `default`, or a hash of its text."""
    return "default" if rubric is None else hashlib.blake2b(rubric.encode(), digest_size=4).hexdigest()
