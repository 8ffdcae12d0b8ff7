"""Starts evaluations when it is time, one at a time for each model; never waits for one to end."""

import asyncio
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime

from services.evaluator.grid import Grid, readings, trailing_mean
from services.evaluator.metrics import EvaluatorMetrics
from services.evaluator.opportunity import Opportunity, OpportunityRules, Trigger
from services.evaluator.session import Occasion, Outcome, Session
from services.evaluator.storage import Storage
from shared.kafka.dead_letters import RetryLaterError
from shared.messages import CarbonIntensity
from shared.runtime.clock import Clock
from shared.runtime.health import Health
from shared.runtime.logs import get_logger, where

SHORTEST_TURN_S = 0.3
"""Wall seconds between two looks at all models, however much happens."""

LONGEST_TURN_S = 5.0
"""Wall seconds after which to look although nothing happened: an evaluation may have become overdue."""

EXPIRY_INTERVAL_S = 60.0
"""Wall seconds between two searches for samples that are too old."""

MOST_DOUBLINGS = 7
"""Of the pause after a failed evaluation."""

_log = get_logger(__name__)


@dataclass(slots=True)
class _Watched:
    """How things stand for a model.

    Attributes:
        zone: whose intensity decides.
        occasion: a reason to evaluate that has not been acted on.
        running: its evaluation.
        failures: evaluations in a row that came to nothing.
        not_before_s: loop time until which nothing is started, after a failure.
    """

    model: str
    zone: str
    opportunity: Opportunity
    occasion: Occasion | None = None
    running: "asyncio.Task[None] | None" = None
    failures: int = 0
    not_before_s: float = 0.0

    def adjusted(self) -> float:
        """Urgency-adjusted intensity, gCO2eq/kWh; NaN while there is none."""
        value = self.opportunity.adjusted()
        return math.nan if value is None else value


class Watch:
    """Knows for every model when it was last evaluated, and starts the next evaluation."""

    def __init__(
        self,
        zones: Mapping[str, str],
        *,
        rules: OpportunityRules,
        threshold_factor: float,
        max_intensity_age_s: float,
        min_samples: int,
        retry_pause_s: float,
        grid: Grid,
        clock: Clock,
        metrics: EvaluatorMetrics,
    ) -> None:
        """Set up.

        Args:
            zones: whose intensity decides, by model.
        """
        self._models = {model: _Watched(model, zone, Opportunity(rules)) for model, zone in zones.items()}
        self._threshold_factor = threshold_factor
        self._max_intensity_age_s = max_intensity_age_s
        self._min_samples = min_samples
        self._retry_pause_s = retry_pause_s
        self._grid = grid
        self._clock = clock
        self._metrics = metrics
        self._news = asyncio.Event()
        self._next_expiry_s = 0.0
        for watched in self._models.values():
            metrics.watch_adjusted(watched.model, watched.adjusted)
            metrics.running.labels(watched.model).set(0)

    async def restore(self, storage: Storage) -> None:
        """Recall the last evaluations; to be called before the first intensity is learned."""
        for watched in self._models.values():
            watched.opportunity.last = await storage.last_evaluation(watched.model)

    def learn(self, intensity: CarbonIntensity) -> None:
        """Take a new intensity."""
        if not self._grid.learn(intensity):
            return
        threshold = trailing_mean(intensity) * self._threshold_factor
        fresh = self._grid.fresh(intensity.zone, self._clock.now()) is not None
        for watched in self._models.values():
            if watched.zone != intensity.zone:
                continue
            trigger: Trigger | None = None
            for point in readings(intensity):
                trigger = watched.opportunity.observe(point.at, point.intensity_g_per_kwh, threshold=threshold)
            if trigger is not None and fresh:
                watched.occasion = Occasion(trigger, intensity.latest.at)
        self._news.set()

    def tell(self) -> None:
        """There are new samples."""
        self._news.set()

    def request(self, model: str) -> bool:
        """A person asks for an evaluation; returns whether the model is known."""
        watched = self._models.get(model)
        if watched is None:
            return False
        watched.occasion = Occasion("requested", self._clock.now())
        self._news.set()
        return True

    async def run(self, storage: Storage, session: Session, health: Health) -> None:
        """Start what is due, for ever."""
        await self._resume(storage)
        while True:
            try:
                await self._expire(storage)
                for watched in self._models.values():
                    await self._consider(watched, storage, session, health)
            except RetryLaterError as error:
                _log.warning("evaluations wait", error=str(error))
            await asyncio.sleep(SHORTEST_TURN_S)
            try:
                async with asyncio.timeout(LONGEST_TURN_S - SHORTEST_TURN_S):
                    await self._news.wait()
            except TimeoutError:
                pass
            self._news.clear()

    async def _resume(self, storage: Storage) -> None:
        """Give evaluations that a stop interrupted another go, unless their occasion is long past."""
        for watched in self._models.values():
            while True:
                try:
                    async with storage.claim(watched.model) as claimed:
                        left = await storage.take_interrupted(watched.model) if claimed else None
                except RetryLaterError:
                    await storage.pause()
                else:
                    break
            if left is not None and watched.occasion is None:
                watched.occasion = Occasion(left.trigger, left.evaluated_at)
                _log.info("an interrupted evaluation begins again", model=watched.model, trigger=left.trigger)

    async def _expire(self, storage: Storage) -> None:
        now_s = asyncio.get_running_loop().time()
        if now_s >= self._next_expiry_s:
            await storage.expire(now=self._clock.now())
            self._next_expiry_s = now_s + EXPIRY_INTERVAL_S

    async def _consider(self, watched: _Watched, storage: Storage, session: Session, health: Health) -> None:
        now = self._clock.now()
        if watched.running is not None or asyncio.get_running_loop().time() < watched.not_before_s:
            return
        samples = await storage.sample_count(watched.model)
        occasion = self._standing(watched, now)
        if occasion is None:
            trigger = watched.opportunity.due(now, samples=samples, min_samples=self._min_samples)
            if trigger is None:
                return
            occasion = Occasion(trigger, now)
        if not samples or not session.possible(watched.model):
            return
        watched.occasion = None
        occasion = replace(occasion, intensity=self._grid.fresh(watched.zone, now))
        watched.running = health.spawn(f"evaluate {watched.model}", self._evaluate(watched, occasion, session))

    def _standing(self, watched: _Watched, now: datetime) -> Occasion | None:
        """The occasion that has not been acted on; a minimum that is long past is none."""
        occasion = watched.occasion
        if occasion is None or occasion.trigger == "requested":
            return occasion
        if (now - occasion.at).total_seconds() > self._max_intensity_age_s:
            watched.occasion = occasion = None
        return occasion

    async def _evaluate(self, watched: _Watched, occasion: Occasion, session: Session) -> None:
        before = watched.opportunity.last
        # From here on, also while it runs, the grace period counts.
        watched.opportunity.evaluated(occasion.at)
        self._metrics.running.labels(watched.model).set(1)
        outcome = Outcome("failed")
        try:
            outcome = await session.evaluate(watched.model, occasion, grace_h=watched.opportunity.rules.grace_h)
        except RetryLaterError as error:
            _log.warning("evaluation failed", model=watched.model, error=str(error))
        except Exception as error:  # noqa: BLE001 - one evaluation must not end the service
            # The text of an unforeseen error may quote a prompt.
            _log.error(
                "evaluation failed unexpectedly", model=watched.model, error=type(error).__name__, where=where(error)
            )
        finally:
            self._metrics.running.labels(watched.model).set(0)
            watched.running = None
        if outcome.status == "finished":
            watched.failures = 0
            self._metrics.evaluations.labels(watched.model, occasion.trigger, "finished").inc()
        elif outcome.status == "elsewhere":
            watched.opportunity.last = outcome.last or before
            watched.not_before_s = asyncio.get_running_loop().time() + self._retry_pause_s
        else:
            self._metrics.evaluations.labels(watched.model, occasion.trigger, "failed").inc()
            watched.opportunity.last = before
            watched.occasion = watched.occasion or occasion
            # Each attempt costs energy: what keeps failing is tried ever more seldom.
            pause_s = self._retry_pause_s * 2.0 ** min(watched.failures, MOST_DOUBLINGS)
            watched.failures += 1
            watched.not_before_s = asyncio.get_running_loop().time() + pause_s
        self._news.set()
