"""The shell around the decisions: takes in what is known, has policies solved when due, keeps and publishes them."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import datetime, timedelta
from typing import TypeVar

from services.optimizer.beliefs import Beliefs
from services.optimizer.consumption import Consumption
from services.optimizer.grid import Grid
from services.optimizer.metrics import OptimizerMetrics
from services.optimizer.planning import Situation, make_policy
from services.optimizer.settings import OptimizerSettings
from services.optimizer.store import Store
from services.optimizer.triggers import Basis, Trigger, due, expiring, look_due, material, moved
from shared.fleet import Fleet
from shared.kafka.dead_letters import RetryLaterError
from shared.messages import CarbonIntensity, Footprint, Policy, PromptGrouping, Quality, option_key
from shared.runtime.clock import Clock
from shared.runtime.logs import get_logger

FORGOTTEN_HALF_LIVES = 10
"""An evaluation so old weighs less than a thousandth, and is dropped."""
_MOST_REMARKS = 1_000

Publish = Callable[[Policy], Awaitable[None]]
T = TypeVar("T")

_log = get_logger(__name__)


class Optimizing:
    """What is known of every model, and the loop that turns it into policies."""

    def __init__(
        self, *, fleet: Fleet, clock: Clock, settings: OptimizerSettings, metrics: OptimizerMetrics, publish: Publish
    ) -> None:
        """Know nothing yet; `restore` before the first message.

        Args:
            publish: returns once Kafka has the policy, however long that takes.
        """
        self.grid = Grid(
            max_age=timedelta(seconds=settings.max_intensity_age_s),
            window=timedelta(hours=settings.window_h),
            min_hours=settings.min_window_hours,
        )
        self._fleet = fleet
        self._clock = clock
        self._settings = settings
        self._aims = settings.aims
        self._quality_half_life_s = settings.estimate_rules.quality.half_life_s
        self._triggers = settings.trigger_rules
        self._metrics = metrics
        self._publish = publish
        self._options = {model.name: frozenset(fleet.options_of(model.name)) for model in fleet.models}
        self._store: Store | None = None
        self._beliefs = Beliefs(fleet, metrics=tuple(settings.xi), rules=settings.estimate_rules)
        self._published: dict[str, Policy] = {}
        self._bases: dict[str, Basis] = {}
        self._waiting: list[Quality] = []
        self._recount = False
        self._news = asyncio.Event()
        self._remarks: set[str] = set()
        # One policy at a time, off the event loop.
        self._solver = ThreadPoolExecutor(max_workers=1, thread_name_prefix="solver")

    @property
    def store(self) -> Store:
        """The tables."""
        if self._store is None:
            raise RuntimeError("Optimizing.restore() must be awaited first")
        return self._store

    def problem(self) -> str | None:
        """What stands against readiness."""
        return "PostgreSQL: not connected yet" if self._store is None else self._store.problem

    async def restore(self, store: Store) -> None:
        """Take up what was known when the last process ended."""
        self._beliefs.consumption = await store.consumption()
        self._published = await store.policies()
        self._store = store
        self._beliefs.add_up(await store.evaluations())
        for policy in self._published.values():
            self._metrics.in_force(policy)

    def close(self) -> None:
        """Give the solver's thread back."""
        self._solver.shutdown(wait=False, cancel_futures=True)

    # What comes in

    def learn_intensities(self, news: Sequence[CarbonIntensity]) -> None:
        """Take the newest of every zone."""
        taken = [self.grid.learn(one) for one in news]
        if any(taken):
            self._news.set()

    def learn_groupings(self, news: Sequence[PromptGrouping]) -> None:
        """Take the newest prompt groups of every model."""
        taken = [self._beliefs.learn_grouping(one) for one in news]
        if any(taken):
            self._recount = True
            self._news.set()

    def learn_quality(self, news: Sequence[Quality]) -> None:
        """Take evaluations; the loop keeps them, and the topic still has them after a crash."""
        for one in news:
            if one.model not in self._options:
                self._remark(f"evaluations of model {one.model!r} are ignored", "name the model in the fleet file")
                continue
            for option in sorted({count.option for count in one.counts} - self._options[one.model]):
                self._remark(
                    f"quality of option {option!r} of {one.model!r} is ignored", "the fleet has no such option"
                )
            self._waiting.append(one)
            self._news.set()

    async def learn_footprints(self, news: Sequence[Footprint]) -> None:
        """Count footprints.

        Raises:
            RetryLaterError: the database is away; none of them was counted.
        """
        mine = [one for one in news if one.purpose != "judge" and self._serves(one)]
        if mine:
            try:
                changed, fresh = await self.store.count(mine, self._count)
            except RetryLaterError:
                await asyncio.sleep(self._settings.retry_pause_s)
                raise
            self._beliefs.consumption |= changed
            self._metrics.footprints.labels("counted").inc(fresh)
            self._metrics.footprints.labels("known").inc(len(mine) - fresh)
            self._news.set()
        # A transaction costs the same for one footprint as for a thousand: let some come together.
        await asyncio.sleep(self._settings.batch_interval_s)

    # The loop

    async def run(self) -> None:
        """Look after every model until cancelled."""
        check_s = self._clock.wall_seconds(self._settings.check_interval_min * 60.0)
        while True:
            try:
                await self.turn()
                pause_s = self._settings.turn_interval_s
            except RetryLaterError as error:
                _log.warning("no policies for now", reason=str(error))
                self._news.set()
                pause_s = self._settings.retry_pause_s
            await asyncio.sleep(pause_s)
            try:
                async with asyncio.timeout(check_s):
                    await self._news.wait()
            except TimeoutError:
                pass

    async def turn(self) -> None:
        """Take what waits, and look at every model once.

        Raises:
            RetryLaterError: the database is away; a later turn does what this one did not.
        """
        self._news.clear()
        if self.store.problem is not None:
            await self.store.probe()
        if self._waiting or self._recount:
            taken = list(self._waiting)
            await self.store.add_evaluations(taken, oldest=self._oldest_evaluation())
            self._beliefs.add_up(await self.store.evaluations())
            del self._waiting[: len(taken)]
            self._recount = False
        for model in self._options:
            await self._consider(model)

    async def _consider(self, model: str) -> None:
        """Solve for a model if something calls for it, and publish what differs."""
        now = self._clock.now()
        intensities = self.grid.in_force({pool.zone for pool in self._fleet.pools_of(model)}, now)
        if self._zone(model) not in intensities:
            return
        latest = self._beliefs.latest_evaluation(model)
        evaluation, groups = None if latest is None else latest.evaluation_id, self._beliefs.group_version(model)
        basis, published = self._bases.get(model), self._published.get(model)
        trigger = due(
            basis,
            intensities=intensities,
            groups=groups,
            evaluation=evaluation,
            published=published,
            now=now,
            rules=self._triggers,
        )
        if trigger is None and (basis is None or not look_due(basis, now, self._triggers)):
            return
        estimates = await self._in_solver(lambda: self._beliefs.estimate(model, now))
        if estimates is None:
            return
        looked = Basis(
            looked_at=now, intensities=intensities, groups=groups, evaluation=evaluation, estimates=estimates
        )
        if trigger is None and basis is not None and not moved(basis.estimates, estimates, self._triggers):
            self._bases[model] = replace(looked, estimates=basis.estimates)
            return
        await self._solve(model, trigger or "estimates", looked)
        self._bases[model] = looked

    async def _solve(self, model: str, trigger: Trigger, basis: Basis) -> None:
        now = basis.looked_at
        situation = Situation(
            model=model,
            now=now,
            trigger=trigger,
            intensities=basis.intensities,
            range=self.grid.range(self._zone(model)),
            estimates=basis.estimates,
            group_version=basis.groups,
        )
        started = time.perf_counter()
        policy = await self._in_solver(lambda: make_policy(situation, fleet=self._fleet, aims=self._aims, version=1))
        self._metrics.solve_s.labels(model).observe(time.perf_counter() - started)
        self._metrics.solves.labels(model, trigger, policy.status).inc()
        published = self._published.get(model)
        # After a start the last one may have been kept and not published.
        if trigger != "start" and published is not None and not expiring(published, now, self._triggers):
            difference = material(published, policy, self._triggers)
            if difference is None:
                return
        policy = await self.store.keep_policy(policy)
        await self._publish(policy)
        self._published[model] = policy
        self._metrics.policies.labels(model, policy.status).inc()
        self._metrics.in_force(policy)
        _log.info("policy", model=model, version=policy.version, status=policy.status, reason=policy.reason)

    # Parts

    def policy_age_s(self, model: str) -> float | None:
        """Event seconds since a model's policy was made; null without one."""
        published = self._published.get(model)
        return None if published is None else (self._clock.now() - published.created_at).total_seconds()

    def evaluation_age_s(self, model: str) -> float | None:
        """Event seconds since a model's latest evaluation; null without one."""
        latest = self._beliefs.latest_evaluation(model)
        return None if latest is None else (self._clock.now() - latest.evaluated_at).total_seconds()

    def _count(self, consumption: Consumption, footprints: Sequence[Footprint]) -> None:
        self._beliefs.count(consumption, footprints, now_s=self._clock.now_s())

    def _oldest_evaluation(self) -> datetime:
        return self._clock.now() - timedelta(seconds=FORGOTTEN_HALF_LIVES * self._quality_half_life_s)

    async def _in_solver(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._solver, work)

    def _zone(self, model: str) -> str:
        return self._fleet.pools_of(model)[0].zone

    def _serves(self, footprint: Footprint) -> bool:
        """Whether the fleet has a footprint's model and option; if not, says so once."""
        option = option_key(footprint.pool, footprint.level)
        if option in self._options.get(footprint.model, ()):
            return True
        self._metrics.footprints.labels("unknown").inc()
        self._remark(
            f"footprints of option {option!r} of model {footprint.model!r} are ignored",
            "the fleet file lacks it: give every service the same SPROUT_FLEET_FILE",
        )
        return False

    def _remark(self, what: str, remedy: str) -> None:
        """Log something once."""
        if what not in self._remarks and len(self._remarks) < _MOST_REMARKS:
            self._remarks.add(what)
            _log.warning(what, remedy=remedy)
