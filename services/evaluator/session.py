"""One evaluation from its claim to its published result."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal, TypeVar
from uuid import uuid4

from services.evaluator.counting import tally
from services.evaluator.delivery import Delivery
from services.evaluator.evaluation import Evaluation, EvaluationFailedError, GroupOf, Results, chosen
from services.evaluator.grid import Grid
from services.evaluator.group_storage import GroupStorage
from services.evaluator.groups import Groups
from services.evaluator.plan import allocate, in_turn
from services.evaluator.spending import cost_of
from services.evaluator.storage import Storage
from shared.fleet import Fleet
from shared.kafka.dead_letters import RetryLaterError
from shared.messages import Quality, Sample
from shared.runtime.clock import Clock
from shared.runtime.logs import get_logger

_log = get_logger(__name__)

Begin = Callable[[str, str, datetime, GroupOf], Evaluation]
"""Makes an evaluation of (evaluation id, model, event time, the group of a sample)."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Occasion:
    """Why to evaluate.

    Attributes:
        at: event time that the evaluation counts from.
        intensity: of the evaluator's zone, gCO2eq/kWh; null where none is fresh.
    """

    trigger: str
    at: datetime
    intensity: float | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of an occasion.

    Attributes:
        status: `elsewhere`: another process evaluates the model, or has just done so.
        last: the other's evaluation, where it is known.
    """

    status: Literal["finished", "failed", "elsewhere"]
    last: datetime | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """All that evaluations need.

    Attributes:
        possible: whether model servers and judge of a model can be reached.
        prompts: most in one evaluation.
        min_per_group: prompts from each group before traffic share counts.
    """

    storage: Storage
    group_storage: GroupStorage
    groups: Groups
    delivery: Delivery
    begin: Begin
    possible: Callable[[str], bool]
    grid: Grid
    fleet: Fleet
    clock: Clock
    prompts: int
    min_per_group: int

    async def evaluate(self, model: str, occasion: Occasion, *, grace_h: float) -> Outcome:
        """Evaluate a model.

        Args:
            grace_h: another process's evaluation so shortly before makes this one needless, event hours.

        Raises:
            RetryLaterError: the database is away.
        """
        async with self.storage.claim(model) as claimed:
            if not claimed:
                return Outcome("elsewhere")
            last = await self.storage.last_evaluation(model)
            recent = last is not None and occasion.at - last <= timedelta(hours=grace_h)
            if recent and occasion.trigger != "requested":
                return Outcome("elsewhere", last)
            await self.storage.take_interrupted(model)
            evaluation_id = uuid4().hex
            await self.storage.began(evaluation_id, model=model, trigger=occasion.trigger, at=occasion.at)
            return await self._run(evaluation_id, model, occasion)

    async def publish_results(self) -> None:
        """Publish every result that Kafka may not have, and then the groups that were learned from them."""
        for quality in await self._insist(self.storage.unpublished):
            await self.delivery.quality(quality)
            await self.storage.published(quality.evaluation_id)
        for grouping in await self._insist(self.group_storage.unpublished):
            await self.delivery.grouping(grouping)
            await self.group_storage.published(grouping)

    async def _run(self, evaluation_id: str, model: str, occasion: Occasion) -> Outcome:
        log = _log.bind(model=model, evaluation=evaluation_id, trigger=occasion.trigger)
        prompts = await self._prompts(model)
        log.info("evaluation begins", prompts=len(prompts), intensity=occasion.intensity)
        group_of = await self.groups.assignment(model, prompts)
        evaluation = self.begin(evaluation_id, model, occasion.at, group_of)
        try:
            results = await evaluation.run(prompts)
        except EvaluationFailedError as error:
            log.warning("evaluation failed", reason=str(error))
            await self.storage.failed(evaluation_id, str(error))
            return Outcome("failed")
        quality = await self._quality(evaluation_id, model, occasion, results)
        # A result has cost energy: it is recorded, however long the database is away.
        await self._insist(lambda: self.storage.finished(quality, evaluated=results.evaluated, judged=results.judged))
        await self.publish_results()
        await self._learn(model)
        log.info(
            "evaluation finished",
            prompts=quality.prompts,
            abstentions=quality.abstentions,
            dropped=results.dropped,
            energy_kwh=quality.cost.energy_kwh,
        )
        return Outcome("finished")

    async def _prompts(self, model: str) -> list[Sample]:
        available = await self.storage.available(model)
        take = allocate(
            {group: len(ids) for group, ids in available.items()},
            await self.storage.traffic(model),
            total=self.prompts,
            minimum=self.min_per_group,
        )
        ordered = [name for _, name in in_turn({group: available[group][:number] for group, number in take.items()})]
        return chosen(await self.storage.samples(model, ordered), ordered)

    async def _quality(self, evaluation_id: str, model: str, occasion: Occasion, results: Results) -> Quality:
        return Quality(
            evaluation_id=evaluation_id,
            model=model,
            evaluated_at=occasion.at,
            trigger=occasion.trigger,
            intensity_g_per_kwh=occasion.intensity,
            counts=tally((one.group, one) for one in results.judged),
            prompts=len(results.evaluated),
            abstentions=results.abstentions,
            cost=cost_of(
                results.calls,
                judgements=results.judgements,
                book=await self.storage.energy(),
                intensities=self.grid.in_force(self.clock.now()),
                fleet=self.fleet,
            ),
        )

    async def _learn(self, model: str) -> None:
        """Learn prompt groups from what was judged, if it is time; an evaluation stands without them."""
        try:
            learned = await self.groups.learn(
                model,
                traffic=await self.storage.traffic(model),
                book=await self.storage.energy(),
                now=self.clock.now(),
            )
        except RetryLaterError as error:
            _log.warning("prompt groups are learned another time", model=model, reason=str(error))
            return
        if learned is not None:
            await self.publish_results()

    async def _insist(self, work: Callable[[], Awaitable[T]]) -> T:
        while True:
            try:
                return await work()
            except RetryLaterError:
                await self.storage.pause()
