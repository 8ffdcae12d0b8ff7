"""What the optimizer takes in: counts footprints and evaluations, and keeps the newest of all other messages.

Every copy of the optimizer does this, not only the leader.
"""

import asyncio
from collections.abc import Collection, Sequence
from datetime import datetime, timedelta

from services.optimizer.costs import Consumption
from services.optimizer.metrics import OptimizerMetrics
from services.optimizer.prices import PoolPrices
from services.optimizer.safety_margin import QualityScores
from services.optimizer.settings import OptimizerSettings
from services.optimizer.state import OptimizerState
from services.optimizer.store import Store
from shared.carbon import LatestIntensities
from shared.fleet import Fleet, reworded
from shared.messages import CarbonIntensity, EndpointCurve, Footprint, Policy, PromptGrouping, Quality, option_key
from shared.prequential import QualityScore
from shared.runtime.clock import Clock
from shared.runtime.database import DatabaseUnavailableError
from shared.runtime.logs import get_logger

EXPIRY_HALF_LIVES = 4
"""Evaluations older than this weigh less than a sixteenth and are deleted."""

_MAX_WARNINGS = 1_000

_log = get_logger(__name__)


class Intake:
    """Takes messages in.

    Attributes:
        options: of every model.
        intensities: newest carbon intensity of every zone.
        state: of every model.
        scores: quality out of sample of every model.
        published: newest policy of every model that has one.
        changed: set when something was taken in.
    """

    def __init__(
        self, *, fleet: Fleet, clock: Clock, settings: OptimizerSettings, metrics: OptimizerMetrics, prices: PoolPrices
    ) -> None:
        """Start without any state; await `restore` before the first message.

        Args:
            fleet: models, pools and levels.
            clock: event time.
            settings: of the optimizer.
            metrics: Prometheus metrics.
            prices: what a token costs in each pool.
        """
        self.options = {model.name: frozenset(fleet.options_of(model.name)) for model in fleet.models}
        self.intensities = LatestIntensities()
        self.state = OptimizerState(fleet, settings)
        self.scores = QualityScores(settings)
        self.published: dict[str, Policy] = {}
        self.changed = asyncio.Event()
        self._fleet = fleet
        self._clock = clock
        self._started_at = clock.now()
        self._settings = settings
        self._metrics = metrics
        self._prices = prices
        self._store: Store | None = None
        self._new_evaluations: list[Quality] = []
        self._new_scores: list[QualityScore] = []
        self._must_recount = False
        self._warned: set[str] = set()

    @property
    def store(self) -> Store:
        """The database."""
        if self._store is None:
            raise RuntimeError("Intake.restore() must be awaited first")
        return self._store

    async def restore(self, store: Store) -> None:
        """Load what the last process stored; what is known of other texts of the directives does not count."""
        self._store = store
        levels = await store.use_directives(self._fleet.directive_hashes, now_s=self._clock.now_s())
        evaluations = await store.evaluations()
        self._warn_of_other_texts(levels, evaluations)
        self.state.recount(evaluations)
        self.scores.add(await store.quality_scores())

    def update_policies(self, messages: Sequence[Policy]) -> None:
        """Store the newest policy of every model that Kafka has, whichever copy of the optimizer published it."""
        for one in messages:
            known = self.published.get(one.model)
            if one.model in self.options and (known is None or one.version > known.version):
                self.set_published(one)

    def update_intensities(self, messages: Sequence[CarbonIntensity]) -> None:
        """Store the newest intensity of every zone."""
        stored = [self.intensities.update(one) for one in messages]
        if any(stored):
            self.changed.set()

    def update_groupings(self, messages: Sequence[PromptGrouping]) -> None:
        """Store the newest prompt groups of every model."""
        stored = [self.state.update_grouping(one) for one in messages]
        if any(stored):
            self._must_recount = True
            self.changed.set()

    def update_curves(self, messages: Sequence[EndpointCurve]) -> None:
        """Store the newest power curve of every endpoint."""
        if self._prices.update_curves(messages):
            self.changed.set()

    def add_evaluations(self, messages: Sequence[Quality]) -> None:
        """Queue evaluations; the loop stores them, and the topic still has them after a crash."""
        for one in messages:
            if one.model not in self.options:
                self._warn_once(f"evaluations of model {one.model!r} are ignored", "name the model in the fleet file")
                continue
            for option in sorted({count.option for count in one.counts} - self.options[one.model]):
                self._warn_once(
                    f"quality of option {option!r} of {one.model!r} is ignored", "the fleet has no such option"
                )
            hashes = self._fleet.directive_hashes
            if (levels := reworded(one.directives, hashes)) and one.evaluated_at > self._started_at:
                self._warn_once(
                    f"evaluations that compared other texts of {', '.join(levels)} are ignored",
                    "give every service the same SPROUT_FLEET_FILE",
                )
            self._new_evaluations.append(one if one.directives else one.model_copy(update={"directives": hashes}))
            # Before it is learned from.
            self._new_scores += self.scores.score(one)
            self.changed.set()

    async def add_footprints(self, messages: Sequence[Footprint]) -> None:
        """Count footprints in the database.

        Raises:
            DatabaseUnavailableError: the database is unavailable; no footprint was counted.
        """
        counted = [one for one in messages if one.purpose != "judge" and self._is_known(one)]
        if counted:
            try:
                new = await self.store.count(counted, self._count)
            except DatabaseUnavailableError:
                await asyncio.sleep(self._settings.retry_pause_s)
                raise
            self._metrics.footprints.labels("counted").inc(new)
            self._metrics.footprints.labels("known").inc(len(counted) - new)
            self.changed.set()
        # A transaction costs the same for one footprint as for a thousand, so wait for more of them.
        await asyncio.sleep(self._settings.batch_interval_s)

    async def store_evaluations(self) -> None:
        """Store queued evaluations and count all that count, if there are new ones or other reasons to.

        Raises:
            DatabaseUnavailableError: the database is unavailable; the next call does what is left.
        """
        if not self._new_evaluations and not self._must_recount:
            return
        stored, scored = list(self._new_evaluations), list(self._new_scores)
        await self.store.add_evaluations(stored, oldest=self._oldest_evaluation())
        await self.store.add_quality_scores(scored, oldest=self._oldest_evaluation())
        self.scores.add(await self.store.quality_scores())
        self.state.recount(await self.store.evaluations())
        del self._new_evaluations[: len(stored)]
        del self._new_scores[: len(scored)]
        self._must_recount = False

    def count_again(self) -> None:
        """Count all evaluations again: other copies of the optimizer may have stored some."""
        self._must_recount = True
        self.changed.set()

    def set_published(self, policy: Policy) -> None:
        """Store the newest policy of a model."""
        self.published[policy.model] = policy
        self.scores.update_policy(policy)
        self._metrics.set_policy(policy)

    # Ages, for the metrics

    def policy_age_s(self, model: str) -> float | None:
        """Event seconds since a model's policy was made; None without one."""
        published = self.published.get(model)
        return None if published is None else (self._clock.now() - published.created_at).total_seconds()

    def evaluation_age_s(self, model: str) -> float | None:
        """Event seconds since a model's latest evaluation; None without one."""
        latest = self.state.latest_evaluation(model)
        return None if latest is None else (self._clock.now() - latest.evaluated_at).total_seconds()

    def intensity_age_s(self, zone: str) -> float | None:
        """Event seconds since the period of a zone's latest intensity started; None without one."""
        return self.intensities.age_s(zone, self._clock.now())

    # Helpers

    def _count(self, consumption: Consumption, footprints: Sequence[Footprint]) -> None:
        self.state.add_footprints(consumption, footprints, now_s=self._clock.now_s())

    def _oldest_evaluation(self) -> datetime:
        return self._clock.now() - timedelta(seconds=EXPIRY_HALF_LIVES * self._settings.quality_half_life_s)

    def _warn_of_other_texts(self, levels: Collection[str], evaluations: Sequence[Quality]) -> None:
        """Warn once after directives were changed, until the next evaluation.

        Args:
            levels: whose consumption was dropped.
            evaluations: oldest first.
        """
        hashes = self._fleet.directive_hashes
        newest = {one.model: one for one in evaluations}.values()
        changed = {*levels, *(level for one in newest for level in reworded(one.directives, hashes))}
        if changed:
            _log.warning(
                "the text of directives has changed: their energy and time, and evaluations that compared the old "
                "texts, do not count",
                levels=sorted(changed),
                evaluations=sum(bool(reworded(one.directives, hashes)) for one in evaluations),
                remedy="put the old text back and give the new one a level of its own: then what is known counts",
            )

    def _is_known(self, footprint: Footprint) -> bool:
        """Whether the fleet has the footprint's model and option; logs the first footprint for which it does not."""
        option = option_key(footprint.pool, footprint.level)
        if option in self.options.get(footprint.model, ()):
            return True
        self._metrics.footprints.labels("unknown").inc()
        self._warn_once(
            f"footprints of option {option!r} of model {footprint.model!r} are ignored",
            "the fleet file does not have it: give every service the same SPROUT_FLEET_FILE",
        )
        return False

    def _warn_once(self, what: str, remedy: str) -> None:
        if what not in self._warned and len(self._warned) < _MAX_WARNINGS:
            self._warned.add(what)
            _log.warning(what, remedy=remedy)
