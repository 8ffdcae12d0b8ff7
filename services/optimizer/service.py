"""The optimizer's loop: solves when a trigger fires, stores and publishes policies that differ.

A model is solved again when carbon intensity, prompt groups, quality or estimates changed, and before its last policy
expires. A policy is published only if it differs materially from the last one, or renews it. Of several copies of the
optimizer all take messages in, and only the leader solves and publishes.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import datetime, timedelta
from typing import TypeVar

from services.optimizer.bounds import current_intensities, trailing_range
from services.optimizer.costs import Consumption
from services.optimizer.estimates import Estimates, estimate, estimates_changed
from services.optimizer.intake import Intake
from services.optimizer.metrics import OptimizerMetrics
from services.optimizer.outcome import extra_grams, limit_outcomes
from services.optimizer.policy import Situation, Trigger, make_policy, margin_g, policy_difference, settled_since
from services.optimizer.prices import PoolPrices
from services.optimizer.prior import ModelPrior
from services.optimizer.promise import Period, RestOfPeriod, plan_rest, trailing_hours
from services.optimizer.safety_margin import calibrated
from services.optimizer.settings import OptimizerSettings
from services.optimizer.triggers import SolveInputs, awaits_footprints, estimates_due, must_renew, solve_trigger
from shared.fleet import Fleet
from shared.kafka.leader import NotLeaderError
from shared.messages import Policy
from shared.runtime.clock import Clock
from shared.runtime.database import DatabaseUnavailableError
from shared.runtime.logs import get_logger

Publish = Callable[[Policy], Awaitable[None]]
T = TypeVar("T")

_log = get_logger(__name__)


class PolicyService:
    """The loop that turns what the intake knows into policies."""

    def __init__(
        self,
        intake: Intake,
        *,
        fleet: Fleet,
        clock: Clock,
        settings: OptimizerSettings,
        metrics: OptimizerMetrics,
        prices: PoolPrices,
        publish: Publish,
        priors: Mapping[str, ModelPrior] | None = None,
    ) -> None:
        """Set up.

        Args:
            intake: takes messages in.
            fleet: models, pools and levels.
            clock: event time.
            settings: of the optimizer.
            metrics: Prometheus metrics.
            prices: what a token costs in each pool.
            publish: returns once Kafka has acknowledged the policy, however long that takes; raises `NotLeaderError`
                if another copy of the optimizer may be the leader.
            priors: what an earlier fleet knew, by model.
        """
        self._intake = intake
        self._fleet = fleet
        self._clock = clock
        self._settings = settings
        self._metrics = metrics
        self._prices = prices
        self._publish = publish
        self._priors = priors or {}
        self._last: dict[str, SolveInputs] = {}
        self._leading = False
        # One solve at a time, off the event loop.
        self._solver = ThreadPoolExecutor(max_workers=1, thread_name_prefix="solver")

    def close(self) -> None:
        """Stop the solver's thread."""
        self._solver.shutdown(wait=False, cancel_futures=True)

    async def lead(self) -> None:
        """Solve and publish, not only take messages in, until cancelled."""
        self._last.clear()
        self._intake.count_again()
        self._leading = True
        try:
            await asyncio.Event().wait()
        finally:
            self._leading = False

    async def run(self) -> None:
        """Solve and publish until cancelled."""
        while True:
            try:
                await self.run_once()
                pause_s = self._settings.loop_interval_s
            except DatabaseUnavailableError as error:
                _log.warning("policies cannot be made now", reason=str(error))
                self._intake.changed.set()
                pause_s = self._settings.retry_pause_s
            except NotLeaderError:
                _log.info("a policy was not published: another copy of the optimizer may be the leader")
                pause_s = self._settings.loop_interval_s
            await asyncio.sleep(pause_s)
            try:
                async with asyncio.timeout(self._longest_wait_s()):
                    await self._intake.changed.wait()
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
        self._intake.changed.clear()
        store = self._intake.store
        if store.status.problem() is not None:
            await store.probe()
        await self._intake.store_evaluations()
        for model in self._intake.options if self._leading else ():
            await self._check(model)

    async def _check(self, model: str) -> None:
        """Solve for a model if a trigger fires."""
        now = self._clock.now()
        zones = {pool.zone for pool in self._fleet.pools_of(model)}
        intensities = current_intensities(self._intake.intensities, zones, now, self._settings)
        if self._zone(model) not in intensities:
            return
        evaluation, groups = self._intake.state.latest_evaluation(model), self._intake.state.group_version(model)
        evaluation_id = None if evaluation is None else evaluation.evaluation_id
        last = self._last.get(model)
        trigger = solve_trigger(
            last,
            intensities=intensities,
            groups=groups,
            evaluation=evaluation_id,
            published=self._intake.published.get(model),
            now=now,
            settings=self._settings,
        )
        if trigger is None and (last is None or not estimates_due(last, now, self._settings)):
            return
        # All copies of the optimizer count footprints.
        self._intake.state.consumption = await self._intake.store.consumption()
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
        intensity = self._intake.intensities.get(self._zone(model))
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
        calibrations = self._intake.scores.calibrations(model, now)
        self._metrics.set_calibrations(
            model,
            {metric: (one, self._intake.scores.recent(model, metric, now)) for metric, one in calibrations.items()},
        )
        settings, notes = calibrated(self._settings, calibrations)
        started = time.perf_counter()
        policy, program = await self._in_solver(
            lambda: make_policy(situation, fleet=self._fleet, settings=settings, version=1)
        )
        self._metrics.solve_s.labels(model).observe(time.perf_counter() - started)
        self._metrics.solves.labels(model, trigger, policy.status).inc()
        published = self._intake.published.get(model)
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
        policy = await self._intake.store.add_policy(policy, after=0 if published is None else published.version)
        await self._publish(policy)
        self._intake.set_published(policy)
        self._metrics.policies.labels(model, policy.status).inc()
        _log.info("policy", model=model, version=policy.version, status=policy.status, reason=policy.reason)

    async def _rest_of_period(self, situation: Situation) -> RestOfPeriod:
        """Book what the published policy kept until now, and plan what is left of the period."""
        model, now = situation.model, situation.now
        period, zone = Period.at(now, days=self._settings.period_days), self._zone(situation.model)
        before = period.before().start
        published = self._intake.published.get(model)
        account = await self._intake.store.book_promise(
            model,
            lambda account: account.book(published, now, since=before),
            since=min(before, now - timedelta(hours=self._settings.window_h)),
        )
        return plan_rest(
            account,
            trailing_hours(self._intake.intensities, situation.intensities, zone, self._settings),
            period=period,
            now=now,
            k0=situation.intensities[zone].g_per_kwh,
            trailing_range=situation.range,
            requests_per_s=situation.estimates.requests_per_s,
            settings=self._settings,
        )

    def _estimate(self, model: str, now: datetime) -> Estimates | None:
        prices = self._prices.of_model(
            model,
            self._intake.state.consumption.get(model, Consumption()),
            now_s=now.timestamp(),
            settings=self._settings,
        )
        return estimate(
            self._intake.state.consumption_of(model),
            self._intake.state.counts_of(model),
            options=self._fleet.options_of(model),
            reference=self._fleet.reference_of(model),
            settings=self._settings,
            now_s=now.timestamp(),
            equivalent=self._fleet.same_as_reference(model),
            prices=prices,
            prior=self._priors.get(model),
        )

    async def _in_solver(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._solver, work)

    def _zone(self, model: str) -> str:
        return self._fleet.pools_of(model)[0].zone
