"""The optimizer's loop: takes messages in, solves when a trigger fires, stores and publishes policies that differ.

A model is solved again when carbon intensity, prompt groups, quality or estimates changed, and before its last policy
expires. A policy is published only if it differs materially from the last one, or renews it. Of several copies of the
optimizer all take messages in, and only the leader solves and publishes.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import datetime, timedelta
from typing import TypeVar

from services.optimizer.bounds import current_intensities, trailing_range
from services.optimizer.costs import Consumption
from services.optimizer.estimates import Estimates, estimate, estimates_changed
from services.optimizer.metrics import OptimizerMetrics
from services.optimizer.outcome import extra_grams, limit_outcomes
from services.optimizer.policy import Situation, Trigger, make_policy, margin_g, policy_difference, settled_since
from services.optimizer.prices import PoolPrices
from services.optimizer.prior import ModelPrior
from services.optimizer.promise import Period, RestOfPeriod, plan_rest, trailing_hours
from services.optimizer.safety_margin import QualityScores, calibrated
from services.optimizer.settings import OptimizerSettings
from services.optimizer.state import OptimizerState
from services.optimizer.store import Store
from services.optimizer.triggers import SolveInputs, awaits_footprints, estimates_due, must_renew, solve_trigger
from shared.carbon import LatestIntensities
from shared.fleet import Fleet, reworded
from shared.kafka.leader import NotLeaderError
from shared.messages import CarbonIntensity, EndpointCurve, Footprint, Policy, PromptGrouping, Quality, option_key
from shared.prequential import QualityScore
from shared.runtime.clock import Clock
from shared.runtime.database import DatabaseUnavailableError
from shared.runtime.logs import get_logger

EXPIRY_HALF_LIVES = 4
"""Evaluations older than this weigh less than a sixteenth and are deleted."""

_MAX_WARNINGS = 1_000

Publish = Callable[[Policy], Awaitable[None]]
T = TypeVar("T")

_log = get_logger(__name__)


class PolicyService:
    """State of every model, and the loop that turns it into policies.

    Attributes:
        intensities: newest carbon intensity of every zone.
    """

    def __init__(
        self,
        *,
        fleet: Fleet,
        clock: Clock,
        settings: OptimizerSettings,
        metrics: OptimizerMetrics,
        prices: PoolPrices,
        publish: Publish,
        priors: Mapping[str, ModelPrior] | None = None,
    ) -> None:
        """Start without any state; await `restore` before the first message.

        Args:
            fleet: models, pools and levels.
            clock: event time.
            settings: of the optimizer.
            metrics: Prometheus metrics.
            prices: what a token costs in each pool.
            publish: returns once Kafka has acknowledged the policy, however long that takes; raises `NotLeaderError`
                if another copy of the optimizer may be the leader.
            priors: what an earlier fleet knew, by model.
        """
        self.intensities = LatestIntensities()
        self._fleet = fleet
        self._clock = clock
        self._started_at = clock.now()
        self._settings = settings
        self._metrics = metrics
        self._prices = prices
        self._publish = publish
        self._priors = priors or {}
        self._options = {model.name: frozenset(fleet.options_of(model.name)) for model in fleet.models}
        self._store: Store | None = None
        self._state = OptimizerState(fleet, settings)
        self._published: dict[str, Policy] = {}
        self._last: dict[str, SolveInputs] = {}
        self._new_evaluations: list[Quality] = []
        self._scores = QualityScores(settings)
        self._new_scores: list[QualityScore] = []
        self._must_recount = False
        self._leading = False
        self._changed = asyncio.Event()
        self._warned: set[str] = set()
        # One solve at a time, off the event loop.
        self._solver = ThreadPoolExecutor(max_workers=1, thread_name_prefix="solver")

    @property
    def store(self) -> Store:
        """The database."""
        if self._store is None:
            raise RuntimeError("PolicyService.restore() must be awaited first")
        return self._store

    async def restore(self, store: Store) -> None:
        """Load what the last process stored; what is known of other texts of the directives does not count."""
        self._store = store
        levels = await store.use_directives(self._fleet.directive_hashes, now_s=self._clock.now_s())
        evaluations = await store.evaluations()
        self._warn_of_other_texts(levels, evaluations)
        self._state.recount(evaluations)
        self._scores.add(await store.quality_scores())

    def close(self) -> None:
        """Stop the solver's thread."""
        self._solver.shutdown(wait=False, cancel_futures=True)

    async def lead(self) -> None:
        """Solve and publish, not only take messages in, until cancelled."""
        self._last.clear()
        self._must_recount = True  # other copies have stored evaluations, too
        self._leading = True
        self._changed.set()
        try:
            await asyncio.Event().wait()
        finally:
            self._leading = False

    # Messages

    def update_policies(self, messages: Sequence[Policy]) -> None:
        """Store the newest policy of every model that Kafka has, whichever copy of the optimizer published it."""
        for one in messages:
            known = self._published.get(one.model)
            if one.model in self._options and (known is None or one.version > known.version):
                self._set_published(one)

    def update_intensities(self, messages: Sequence[CarbonIntensity]) -> None:
        """Store the newest intensity of every zone."""
        stored = [self.intensities.update(one) for one in messages]
        if any(stored):
            self._changed.set()

    def update_groupings(self, messages: Sequence[PromptGrouping]) -> None:
        """Store the newest prompt groups of every model."""
        stored = [self._state.update_grouping(one) for one in messages]
        if any(stored):
            self._must_recount = True
            self._changed.set()

    def update_curves(self, messages: Sequence[EndpointCurve]) -> None:
        """Store the newest power curve of every endpoint."""
        if self._prices.update_curves(messages):
            self._changed.set()

    def add_evaluations(self, messages: Sequence[Quality]) -> None:
        """Queue evaluations; the loop stores them, and the topic still has them after a crash."""
        for one in messages:
            if one.model not in self._options:
                self._warn_once(f"evaluations of model {one.model!r} are ignored", "name the model in the fleet file")
                continue
            for option in sorted({count.option for count in one.counts} - self._options[one.model]):
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
            self._new_scores += self._scores.score(one)
            self._changed.set()

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
            self._changed.set()
        # A transaction costs the same for one footprint as for a thousand, so wait for more of them.
        await asyncio.sleep(self._settings.batch_interval_s)

    # The loop

    async def run(self) -> None:
        """Solve and publish until cancelled."""
        while True:
            try:
                await self.run_once()
                pause_s = self._settings.loop_interval_s
            except DatabaseUnavailableError as error:
                _log.warning("policies cannot be made now", reason=str(error))
                self._changed.set()
                pause_s = self._settings.retry_pause_s
            except NotLeaderError:
                _log.info("a policy was not published: another copy of the optimizer may be the leader")
                pause_s = self._settings.loop_interval_s
            await asyncio.sleep(pause_s)
            try:
                async with asyncio.timeout(self._longest_wait_s()):
                    await self._changed.wait()
            except TimeoutError:
                pass

    def _longest_wait_s(self) -> float:
        """Wall seconds until the next pass if no message arrives here; another copy may count the footprints."""
        now = self._clock.now()
        wait_s = self._settings.check_interval_min * 60.0
        if any(awaits_footprints(last, now, self._settings) for last in self._last.values()):
            wait_s = min(wait_s, self._settings.evaluation_interval_s)
        return self._clock.wall_seconds(wait_s)

    async def run_once(self) -> None:
        """Store queued evaluations, and, as the leader, check every model once.

        Raises:
            DatabaseUnavailableError: the database is unavailable; the next call does what is left.
            NotLeaderError: another copy of the optimizer may be the leader.
        """
        self._changed.clear()
        if self.store.status.problem() is not None:
            await self.store.probe()
        if self._new_evaluations or self._must_recount:
            stored, scored = list(self._new_evaluations), list(self._new_scores)
            await self.store.add_evaluations(stored, oldest=self._oldest_evaluation())
            await self.store.add_quality_scores(scored, oldest=self._oldest_evaluation())
            self._scores.add(await self.store.quality_scores())
            self._state.recount(await self.store.evaluations())
            del self._new_evaluations[: len(stored)]
            del self._new_scores[: len(scored)]
            self._must_recount = False
        for model in self._options if self._leading else ():
            await self._check(model)

    async def _check(self, model: str) -> None:
        """Solve for a model if a trigger fires."""
        now = self._clock.now()
        zones = {pool.zone for pool in self._fleet.pools_of(model)}
        intensities = current_intensities(self.intensities, zones, now, self._settings)
        if self._zone(model) not in intensities:
            return
        evaluation, groups = self._state.latest_evaluation(model), self._state.group_version(model)
        evaluation_id = None if evaluation is None else evaluation.evaluation_id
        last = self._last.get(model)
        trigger = solve_trigger(
            last,
            intensities=intensities,
            groups=groups,
            evaluation=evaluation_id,
            published=self._published.get(model),
            now=now,
            settings=self._settings,
        )
        if trigger is None and (last is None or not estimates_due(last, now, self._settings)):
            return
        # All copies of the optimizer count footprints.
        self._state.consumption = await self.store.consumption()
        estimates = await self._in_solver(lambda: self._estimate(model, now))
        if estimates is None:
            return
        seen_at = now if last is None or evaluation_id != last.evaluation else last.evaluation_seen_at
        current = SolveInputs(
            checked_at=now,
            intensities=intensities,
            groups=groups,
            evaluation=evaluation_id,
            evaluation_seen_at=seen_at,
            estimates=estimates,
        )
        if (
            trigger is None
            and last is not None
            and not estimates_changed(last.estimates, estimates, self._settings.estimates_change)
        ):
            self._last[model] = replace(current, estimates=last.estimates)
            return
        await self._solve(model, trigger or "estimates", current)
        self._last[model] = current

    async def _solve(self, model: str, trigger: Trigger, inputs: SolveInputs) -> None:
        """Solve, and publish the policy if it differs from the last one."""
        now = inputs.checked_at
        intensity = self.intensities.get(self._zone(model))
        if intensity is None:
            raise RuntimeError(f"no carbon intensity of {self._zone(model)}")
        situation = Situation(
            model=model,
            now=now,
            trigger=trigger,
            intensities=inputs.intensities,
            range=trailing_range(intensity, self._settings),
            estimates=inputs.estimates,
            group_version=inputs.groups,
        )
        if self._settings.promise == "period":
            situation = replace(situation, rest=await self._rest_of_period(situation))
        calibrations = self._scores.calibrations(model, now)
        self._metrics.set_calibrations(
            model, {metric: (one, self._scores.recent(model, metric, now)) for metric, one in calibrations.items()}
        )
        settings, notes = calibrated(self._settings, calibrations)
        started = time.perf_counter()
        policy, program = await self._in_solver(
            lambda: make_policy(situation, fleet=self._fleet, settings=settings, version=1)
        )
        self._metrics.solve_s.labels(model).observe(time.perf_counter() - started)
        self._metrics.solves.labels(model, trigger, policy.status).inc()
        published = self._published.get(model)
        if published is not None and not must_renew(published, now, self._settings):
            difference = policy_difference(published, policy, self._settings)
            if difference is None:
                return
        margin = await self._in_solver(lambda: margin_g(policy))
        settled = await self._in_solver(lambda: settled_since(policy, program, published, settings=self._settings))
        limits, extra_g = await self._in_solver(lambda: (limit_outcomes(program), extra_grams(program)))
        policy = policy.model_copy(
            update={
                "margin_g_per_request": margin,
                "settled": settled,
                "limits": limits,
                "extra_g": extra_g,
                "reason": "; ".join([policy.reason, *notes]),
            }
        )
        policy = await self.store.add_policy(policy, after=0 if published is None else published.version)
        await self._publish(policy)
        self._set_published(policy)
        self._metrics.policies.labels(model, policy.status).inc()
        _log.info("policy", model=model, version=policy.version, status=policy.status, reason=policy.reason)

    async def _rest_of_period(self, situation: Situation) -> RestOfPeriod:
        """Book what the published policy kept until now, and plan what is left of the period."""
        model, now = situation.model, situation.now
        period, zone = Period.at(now, days=self._settings.period_days), self._zone(situation.model)
        before = period.before().start
        published = self._published.get(model)
        account = await self.store.book_promise(
            model,
            lambda account: account.book(published, now, since=before),
            since=min(before, now - timedelta(hours=self._settings.window_h)),
        )
        return plan_rest(
            account,
            trailing_hours(self.intensities, situation.intensities, zone, self._settings),
            period=period,
            now=now,
            k0=situation.intensities[zone].g_per_kwh,
            trailing_range=situation.range,
            requests_per_s=situation.estimates.requests_per_s,
            settings=self._settings,
        )

    # Ages, for the metrics

    def policy_age_s(self, model: str) -> float | None:
        """Event seconds since a model's policy was made; None without one."""
        published = self._published.get(model)
        return None if published is None else (self._clock.now() - published.created_at).total_seconds()

    def evaluation_age_s(self, model: str) -> float | None:
        """Event seconds since a model's latest evaluation; None without one."""
        latest = self._state.latest_evaluation(model)
        return None if latest is None else (self._clock.now() - latest.evaluated_at).total_seconds()

    def intensity_age_s(self, zone: str) -> float | None:
        """Event seconds since the period of a zone's latest intensity started; None without one."""
        return self.intensities.age_s(zone, self._clock.now())

    # Helpers

    def _set_published(self, policy: Policy) -> None:
        self._published[policy.model] = policy
        self._scores.update_policy(policy)
        self._metrics.set_policy(policy)

    def _estimate(self, model: str, now: datetime) -> Estimates | None:
        prices = self._prices.of_model(
            model, self._state.consumption.get(model, Consumption()), now_s=now.timestamp(), settings=self._settings
        )
        return estimate(
            self._state.consumption_of(model),
            self._state.counts_of(model),
            options=self._fleet.options_of(model),
            reference=self._fleet.reference_of(model),
            settings=self._settings,
            now_s=now.timestamp(),
            equivalent=self._fleet.same_as_reference(model),
            prices=prices,
            prior=self._priors.get(model),
        )

    def _count(self, consumption: Consumption, footprints: Sequence[Footprint]) -> None:
        self._state.add_footprints(consumption, footprints, now_s=self._clock.now_s())

    def _oldest_evaluation(self) -> datetime:
        return self._clock.now() - timedelta(seconds=EXPIRY_HALF_LIVES * self._settings.quality_half_life_s)

    async def _in_solver(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._solver, work)

    def _zone(self, model: str) -> str:
        return self._fleet.pools_of(model)[0].zone

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
        if option in self._options.get(footprint.model, ()):
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
