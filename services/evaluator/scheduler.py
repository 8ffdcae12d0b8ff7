"""Starts evaluations when carbon intensities and samples call for them, at most one at a time per model.

Of several copies of the evaluator all take intensities in, and only the leader starts evaluations.
"""

import asyncio
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Final, Literal

from services.evaluator.budget import MIN_PROMPTS
from services.evaluator.evaluation import EvaluationResult, EvaluationRunner, EvaluationTrigger
from services.evaluator.metrics import EvaluatorMetrics
from services.evaluator.opportunity import Opportunity, Reason
from services.evaluator.settings import EvaluatorSettings
from services.evaluator.store import EvaluationStore
from shared.carbon import LatestIntensities, trailing_points
from shared.kafka.handling import RetryLaterError
from shared.kafka.leader import NotLeaderError
from shared.messages import CarbonIntensity
from shared.runtime.clock import Clock
from shared.runtime.health import Health
from shared.runtime.logs import get_logger, where
from shared.switchback import SwitchbackSchedule

MIN_CHECK_INTERVAL_S: Final = 0.3
"""Minimum wall time between two checks of all models."""

MAX_CHECK_INTERVAL_S: Final = 5.0
"""Wall time after which models are checked without an event: an evaluation may have become overdue."""

EXPIRY_INTERVAL_S: Final = 60.0
"""Wall time between two deletions of expired rows."""

PostponeReason = Literal["reference_block", "carbon_ceiling", "not_worthwhile"]

_POSTPONED_UNTIL: Final[dict[PostponeReason, str]] = {
    "reference_block": "the end of the reference block, in which the whole fleet serves without Sprout",
    "carbon_ceiling": "the requests have emitted enough for the evaluator's share (SPROUT_EVALUATOR_MAX_CARBON_SHARE)",
    "not_worthwhile": "further verdicts would save more than they cost",
}
"""What an evaluation that is due waits for, by reason."""

MAX_BACKOFF_DOUBLINGS: Final = 7

REQUESTED: Final = "requested"
"""Trigger of an evaluation that a person requested."""

RequestStatus = Literal[
    "requested", "requested; begins after the evaluation that is running", "requested before, and not begun yet"
]

_log = get_logger(__name__)


@dataclass(slots=True)
class ModelState:
    """Scheduling state of a model.

    Attributes:
        zone: whose intensity decides.
        pending: a trigger that has not started an evaluation yet.
        running: task of the running evaluation.
        failures: failed evaluations in a row.
        not_before_s: loop time before which no evaluation starts.
        postponed: why an evaluation that is due waits; None: none waits.
    """

    model: str
    zone: str
    opportunity: Opportunity
    pending: EvaluationTrigger | None = None
    running: "asyncio.Task[None] | None" = None
    failures: int = 0
    not_before_s: float = 0.0
    postponed: PostponeReason | None = None

    def adjusted_intensity(self) -> float:
        """Urgency-adjusted intensity, gCO2eq/kWh; NaN while it is unknown."""
        value = self.opportunity.adjusted()
        return math.nan if value is None else value


class Scheduler:
    """Decides for every model when to evaluate, and starts the evaluation.

    Attributes:
        states: by model.
    """

    def __init__(
        self,
        zones: Mapping[str, str],
        *,
        settings: EvaluatorSettings,
        intensities: LatestIntensities,
        switchback: SwitchbackSchedule,
        clock: Clock,
        metrics: EvaluatorMetrics,
    ) -> None:
        """Create.

        Args:
            zones: whose intensity decides, by model.
        """
        self.states = {model: ModelState(model, zone, Opportunity(settings)) for model, zone in zones.items()}
        self._settings = settings
        self._intensities = intensities
        self._switchback = switchback
        self._clock = clock
        self._metrics = metrics
        self._wake = asyncio.Event()
        self._next_expiry_s = 0.0
        for state in self.states.values():
            metrics.observe_adjusted_intensity(state.model, state.adjusted_intensity)
            metrics.running.labels(state.model).set(0)
            for reason in _POSTPONED_UNTIL:
                metrics.postponed.labels(state.model, reason).set(0)

    async def restore(self, store: EvaluationStore) -> None:
        """Load the times of the last evaluations; must be called before the first intensity arrives.

        A trigger from before the last evaluation is dropped, unless a person requested it: another process has acted
        on it.
        """
        for state in self.states.values():
            last = state.opportunity.last = await store.last_evaluation(state.model)
            trigger = state.pending
            if trigger is None or last is None or trigger.reason == "requested":
                continue
            if trigger.at <= last:
                state.pending = None

    def on_intensity(self, intensity: CarbonIntensity) -> None:
        """Process a new carbon intensity."""
        if not self._intensities.update(intensity):
            return
        window_s = self._settings.threshold_window_h * 3_600.0
        trailing = [
            point.intensity_g_per_kwh
            for point in trailing_points(intensity)
            if (intensity.latest.at - point.at).total_seconds() < window_s
        ]
        threshold = self._settings.threshold(trailing) * self._settings.threshold_factor
        fresh = self._fresh_g_per_kwh(intensity.zone) is not None
        for state in self.states.values():
            if state.zone != intensity.zone:
                continue
            reason: Reason | None = None
            for point in trailing_points(intensity):
                reason = state.opportunity.observe(point.at, point.intensity_g_per_kwh, threshold=threshold)
            if reason is not None and fresh:
                state.pending = EvaluationTrigger(reason, intensity.latest.at)
        self._wake.set()

    def on_new_samples(self) -> None:
        """New samples have been stored."""
        self._wake.set()

    def request(self, model: str) -> RequestStatus:
        """Evaluate a model as soon as possible, regardless of the grid. A request waits until it has begun.

        Returns:
            What the requester can expect, for people.

        Raises:
            KeyError: the model is unknown.
        """
        state = self.states[model]
        if state.pending is not None and state.pending.reason == REQUESTED:
            return "requested before, and not begun yet"
        state.pending = EvaluationTrigger(REQUESTED, self._clock.now())
        self._wake.set()
        return "requested" if state.running is None else "requested; begins after the evaluation that is running"

    async def run(self, runner: EvaluationRunner, health: Health, *, is_reachable: Callable[[str], bool]) -> None:
        """Start evaluations until cancelled, which also ends running ones; this process must be the leader.

        Args:
            is_reachable: whether the servers that an evaluation of a model needs can be reached.
        """
        await runner.status.retry(lambda: self.restore(runner.store))
        await self._recover_interrupted(runner)
        await runner.status.retry(runner.publish_unpublished)
        try:
            await self._start_evaluations(runner, health, is_reachable)
        finally:
            running = [state.running for state in self.states.values() if state.running is not None]
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)

    async def _start_evaluations(
        self, runner: EvaluationRunner, health: Health, is_reachable: Callable[[str], bool]
    ) -> None:
        while True:
            try:
                await self._delete_expired(runner)
                for state in self.states.values():
                    await self._start_if_due(state, runner, health, is_reachable)
            except RetryLaterError as error:
                _log.warning("scheduling is postponed", error=str(error))
            await asyncio.sleep(MIN_CHECK_INTERVAL_S)
            try:
                async with asyncio.timeout(self._longest_wait_s()):
                    await self._wake.wait()
            except TimeoutError:
                pass
            self._wake.clear()

    async def _recover_interrupted(self, runner: EvaluationRunner) -> None:
        """Schedule evaluations that were interrupted by a stop; `_current_trigger` discards old ones."""
        for state in self.states.values():

            async def recover(model: str = state.model) -> EvaluationTrigger | None:
                found = await runner.store.recover_interrupted(model)
                return None if found is None else EvaluationTrigger(found.reason, found.evaluated_at)

            interrupted = await runner.status.retry(recover)
            if interrupted is not None and state.pending is None:
                state.pending = interrupted
                _log.info("interrupted evaluation will be repeated", model=state.model, trigger=interrupted.reason)

    async def _delete_expired(self, runner: EvaluationRunner) -> None:
        now_s = asyncio.get_running_loop().time()
        if now_s >= self._next_expiry_s:
            for store in (runner.samples, runner.group_store, runner.store):
                await store.delete_expired(now=self._clock.now())
            self._next_expiry_s = now_s + EXPIRY_INTERVAL_S

    async def _start_if_due(
        self, state: ModelState, runner: EvaluationRunner, health: Health, is_reachable: Callable[[str], bool]
    ) -> None:
        now = self._clock.now()
        if state.running is not None or asyncio.get_running_loop().time() < state.not_before_s:
            return
        samples = await runner.samples.count(state.model)
        trigger = self._current_trigger(state, now)
        if trigger is None:
            reason = state.opportunity.due(now, samples=samples, min_samples=self._settings.min_samples)
            trigger = None if reason is None else EvaluationTrigger(reason, now)
        if trigger is None or samples == 0:
            self._set_postponed(state, None)
            return
        self._set_postponed(state, await self._obstacle(state, trigger, runner, now))
        if state.postponed is not None or not is_reachable(state.model):
            return
        state.pending = None
        trigger = replace(trigger, g_per_kwh=self._fresh_g_per_kwh(state.zone))
        state.running = health.spawn(f"evaluate {state.model}", self._evaluate(state, trigger, runner))

    async def _obstacle(
        self, state: ModelState, trigger: EvaluationTrigger, runner: EvaluationRunner, now: datetime
    ) -> PostponeReason | None:
        """Why an evaluation that is due waits; None: it starts."""
        if self._near_reference_block(now):
            return "reference_block"
        size = await runner.size(state.model, trigger.reason)
        return size.limit if size.limit != "maximum" and size.prompts < MIN_PROMPTS else None

    def _near_reference_block(self, now: datetime) -> bool:
        """Whether a reference block is running, or starts within the margin."""
        if self._switchback.is_reference(now):
            return True
        start = self._switchback.next_change(now)
        return start is not None and (start - now).total_seconds() <= self._settings.reference_block_margin_s

    def _set_postponed(self, state: ModelState, reason: PostponeReason | None) -> None:
        if reason is not None and reason != state.postponed:
            _log.info("evaluation postponed", model=state.model, reason=reason, until=_POSTPONED_UNTIL[reason])
        state.postponed = reason
        for one in _POSTPONED_UNTIL:
            self._metrics.postponed.labels(state.model, one).set(one == reason)

    def _longest_wait_s(self) -> float:
        """Wall time until models are checked without an event: also when a block ends that evaluations wait for."""
        longest_s = MAX_CHECK_INTERVAL_S - MIN_CHECK_INTERVAL_S
        if any(state.postponed == "reference_block" for state in self.states.values()):
            change = self._switchback.next_change(self._clock.now())
            if change is not None:
                longest_s = min(longest_s, max(0.0, self._clock.wall_seconds_until(change)))
        return longest_s

    def _current_trigger(self, state: ModelState, now: datetime) -> EvaluationTrigger | None:
        """The pending trigger; one that is too old is discarded, unless a person requested it."""
        trigger = state.pending
        if trigger is None or trigger.reason == REQUESTED:
            return trigger
        if (now - trigger.at).total_seconds() > self._settings.max_intensity_age_s:
            state.pending = trigger = None
        return trigger

    async def _evaluate(self, state: ModelState, trigger: EvaluationTrigger, runner: EvaluationRunner) -> None:
        last_before = state.opportunity.last
        # The grace period starts with the evaluation.
        state.opportunity.evaluated(trigger.at)
        self._metrics.running.labels(state.model).set(1)
        result = EvaluationResult("failed")
        try:
            result = await runner.evaluate(state.model, trigger)
        except RetryLaterError as error:
            _log.warning("evaluation failed", model=state.model, error=str(error))
        except NotLeaderError:
            _log.warning("the next leader publishes the evaluation", model=state.model)
            result = EvaluationResult("claimed_by_other", trigger.at)
        except Exception as error:  # noqa: BLE001 - a failed evaluation must not stop the service
            # The text of an unexpected error may quote a prompt.
            _log.error(
                "evaluation failed unexpectedly", model=state.model, error=type(error).__name__, where=where(error)
            )
        finally:
            self._metrics.running.labels(state.model).set(0)
            state.running = None
        now_s = asyncio.get_running_loop().time()
        if result.status == "finished":
            state.failures = 0
            self._metrics.evaluations.labels(state.model, trigger.reason, "finished").inc()
        elif result.status == "claimed_by_other":
            state.opportunity.last = result.last or last_before
            if trigger.reason == REQUESTED:  # it was promised
                state.pending = state.pending or trigger
            state.not_before_s = now_s + self._settings.retry_pause_s
        else:
            self._metrics.evaluations.labels(state.model, trigger.reason, "failed").inc()
            state.opportunity.last = last_before
            state.pending = state.pending or trigger
            # Every attempt costs energy, so the pause doubles with each failure in a row.
            state.not_before_s = now_s + self._settings.retry_pause_s * 2.0 ** min(
                state.failures, MAX_BACKOFF_DOUBLINGS
            )
            state.failures += 1
        self._wake.set()

    def _fresh_g_per_kwh(self, zone: str) -> float | None:
        return self._intensities.fresh_g_per_kwh(zone, self._clock.now(), max_age_s=self._settings.max_intensity_age_s)
