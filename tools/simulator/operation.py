"""The evaluator and the optimizer in one window, hour by hour, without look-ahead.

Every hour the services' own code decides whether to evaluate, estimates energy, time and quality from what was served
and judged so far, and solves the program. What is served is the expectation over the measured prompts.
"""

import math
import re
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Literal

import numpy as np

from services.evaluator.budget import (
    CEILING_WINDOW,
    MIN_PROMPTS,
    Spending,
    Uncertainty,
    evaluation_size,
    judged_prompts,
)
from services.evaluator.opportunity import Opportunity, OpportunityRules
from services.optimizer.bounds import TrailingRange, quality_bounds, range_of
from services.optimizer.costs import Consumption, ResourceUse
from services.optimizer.estimates import Estimates, estimate
from services.optimizer.outcome import settled_groups
from services.optimizer.policy import build_problem
from services.optimizer.problem import LaterHours, OptionPrice, Problem, Solution
from services.optimizer.program import Program, solve
from services.optimizer.promise import Account, Period, RestOfPeriod, TrailingHours, plan_rest
from services.optimizer.safety_margin import solve_jointly
from services.optimizer.settings import OptimizerSettings
from services.optimizer.state import QualityCounts
from shared.messages import EvaluationCost, Quality
from shared.pools import DEFAULT_EMBODIED_G_PER_S
from tools.simulator.evaluation import Findings, Judge, Thinning
from tools.simulator.grid import HOUR, Window
from tools.simulator.published_case import NO_SOLUTION
from tools.simulator.requests import Floats
from tools.simulator.world import World

Rule = Literal["reference", "program", "program_once", "cheapest"]
"""How the options are chosen: always the reference; by the program, every hour or once; by carbon only."""

DEFAULT_REQUESTS_PER_HOUR = 10_000.0

_NO_COST = EvaluationCost(generations=0, judgements=0, completion_tokens=0, processing_s=0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """Settings of the services.

    Attributes:
        optimizer: with the quality limits of the scheme.
        trigger: when the evaluator runs.
        prompts_per_evaluation: drawn each time, at most.
        max_carbon_share: ceiling of the evaluator's carbon as a share of the requests'; None: no ceiling.
        settled_share: share of the prompts that are evaluated in groups whose decision is settled.
        requests_per_hour: of the traffic.
        seed: of the evaluator's draws.
    """

    optimizer: OptimizerSettings
    trigger: OpportunityRules = field(default_factory=OpportunityRules)
    prompts_per_evaluation: int = 500
    max_carbon_share: float | None = 0.02
    settled_share: float = 0.1
    requests_per_hour: float = DEFAULT_REQUESTS_PER_HOUR
    seed: int = 1


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ProductionCase:
    """One scheme in one window.

    Attributes:
        mix: (hours, tasks), shares of the traffic.
        families: families of prompt groups, by group; None: there are none.
    """

    scheme: str
    rule: Rule
    window: Window
    mix: Floats
    world: World
    judge: Judge
    operation: Operation
    families: Mapping[str, str] | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Decision:
    """The probabilities of one hour.

    Attributes:
        x: (G, O), probabilities.
        quality: lower confidence bound by limited metric, relative to the reference's.
        fallback: why only the reference could be served; None if there was a choice.
        ineligible: options that could not be used because too little is known about them.
    """

    x: Floats
    quality: Mapping[str, float] = field(default_factory=dict)
    fallback: str | None = None
    ineligible: tuple[str, ...] = ()


class Run:
    """The evaluator and the optimizer in one window, with the data that the ledger and the judge would publish.

    Attributes:
        fallbacks: hours in which only the reference could be served, by reason.
        ineligible: hours in which an option could not be used, by option.
        evaluated: hours in which the evaluator ran, and `judged_prompts` how many prompts it judged in them.
        evaluator_grams: (hours,), of the evaluator, per request of the traffic.
        evaluator_kwh: (hours,), of the evaluator.
        bounds: by limited metric, (hours,).
    """

    def __init__(self, case: ProductionCase) -> None:
        self._case = case
        self._settings = case.operation.optimizer
        if case.rule not in ("program", "program_once"):
            # No metric limits the choice.
            self._settings = self._settings.model_copy(update={"xi": {}, "floors": {}, "constant_bounds": frozenset()})
        self._consumption = Consumption()
        self._counts = QualityCounts(settings=self._settings, families=case.families)
        self._opportunity = Opportunity(case.operation.trigger)
        self._rng = np.random.default_rng([case.operation.seed, case.window.start_hour])
        self._once: Decision | None = None
        self._account = Account()
        hours = len(case.window.g_per_kwh)
        self._operation = case.operation
        self._solved: deque[tuple[Problem, Solution, Program | None]] = deque(maxlen=24)
        self._judged = 0.0
        self._prompts = 0
        self._served = case.world.all_reference(1)[0]
        self._requests_g = np.zeros(hours)
        self.fallbacks: Counter[str] = Counter()
        self.ineligible: Counter[str] = Counter()
        self.evaluated: list[int] = []
        self.judged_prompts = 0
        self.evaluator_grams = np.zeros(hours)
        self.evaluator_kwh = np.zeros(hours)
        self.bounds: dict[str, Floats] = {metric: np.full(hours, np.nan) for metric in self._settings.xi}

    def simulate(self) -> Floats:
        """Decide and serve hour by hour; returns the probabilities, (hours, G, O)."""
        hours = len(self._case.window.g_per_kwh)
        x = self._case.world.all_reference(hours)
        if self._case.rule != "reference":
            for hour in range(hours):
                x[hour] = self._decide(hour)
                self._serve(hour, x[hour])
        return x

    def _decide(self, hour: int) -> Floats:
        """Probabilities of the hour, (G, O)."""
        case, now = self._case, self._case.window.at(hour)
        k0 = float(case.window.g_per_kwh[hour])
        trailing = self._trailing(hour)
        values = trailing.g_per_kwh[:, 0]
        mean = float(values.mean())
        # A scheme without quality limits needs no evaluation and is charged none; one that decides once needs only the
        # first.
        if hour == 0:
            self._learn(case.judge.evaluate_all(at_s=now.timestamp()), hour, charged=bool(self._settings.xi))
            self._opportunity.evaluated(now)
        elif case.rule == "program" and self._opportunity.observe(now, k0, threshold=self._threshold(values)):
            self._evaluate(hour)
        trailing_range = range_of(values.tolist(), hours=len(values), settings=self._settings)
        bounds = quality_bounds(trailing_range.position(k0), self._settings)
        for metric, bound in bounds.items():
            self.bounds[metric][hour] = bound
        if case.rule != "program_once":
            decision = self._solve(now, k0, bounds, rest=self._rest(hour, trailing, trailing_range))
            self._account.add(now, case.operation.requests_per_hour, promised=bounds, kept=decision.quality)
        else:
            if self._once is None:
                at_mean = quality_bounds(trailing_range.position(mean), self._settings)
                self._once = self._solve(now, mean, at_mean)
            decision = self._once
        if decision.fallback is not None:
            self.fallbacks[decision.fallback] += 1
        self.ineligible.update(decision.ineligible)
        return decision.x

    def _rest(self, hour: int, trailing: TrailingHours, trailing_range: TrailingRange) -> RestOfPeriod | None:
        """What the rest of the period needs; None with an hourly promise."""
        if self._settings.promise == "hourly":
            return None
        window = self._case.window
        return plan_rest(
            self._account,
            trailing,
            period=self._period(hour),
            now=window.at(hour),
            k0=float(window.g_per_kwh[hour]),
            trailing_range=trailing_range,
            requests_per_s=self._case.operation.requests_per_hour / HOUR.total_seconds(),
            settings=self._settings,
        )

    def _period(self, hour: int) -> Period:
        """Periods start with the window, and the last one ends with it."""
        window, hours = self._case.window, 24 * self._settings.period_days
        start = hour - hour % hours
        return Period(window.at(start), window.at(min(start + hours, len(window.g_per_kwh))))

    def _evaluate(self, hour: int) -> None:
        """Evaluate as many prompts as pay for themselves, unless they are too few."""
        case, now = self._case, self._case.window.at(hour)
        size = evaluation_size(
            self._spending(hour),
            self._uncertainty(),
            maximum=case.operation.prompts_per_evaluation,
            max_carbon_share=case.operation.max_carbon_share,
            half_life_s=self._settings.quality_half_life_s,
        )
        if size.prompts >= MIN_PROMPTS:
            served, at_s = self._served, now.timestamp()
            thinning = Thinning(self._settled(), case.operation.settled_share)
            draws = case.judge.draw(
                case.mix[hour - 1], size.prompts, self._rng, served=served, at_s=at_s, thinning=thinning
            )
            self._learn(draws, hour, charged=True)
            self.judged_prompts += draws.prompts
            self._opportunity.evaluated(now)
            self.evaluated.append(hour)

    def _settled(self) -> frozenset[str]:
        """Groups whose decision was settled in all hours of the last day, of which every sixth is looked at."""
        if self._operation.settled_share >= 1.0 or len(self._solved) < 24:
            return frozenset()
        found = [
            frozenset() if program is None else settled_groups(program, min_trials=self._settings.min_trials)
            for _, _, program in list(self._solved)[::6]
        ]
        return frozenset.intersection(*found)

    def _spending(self, hour: int) -> Spending:
        """Carbon of the requests and of the evaluations so far; the bootstrap evaluation is the first one."""
        since, per_hour = max(0, hour - int(CEILING_WINDOW.total_seconds() / 3_600)), self._operation.requests_per_hour
        return Spending(
            requests_g=float(self._requests_g[since:hour].sum()),
            evaluator_g=float(self.evaluator_grams[max(1, since) : hour].sum()) * per_hour,
            requests_per_s=per_hour / 3_600.0,
            g_per_prompt=float(self.evaluator_grams[:hour].sum()) * per_hour / self._prompts,
        )

    def _uncertainty(self) -> Uncertainty:
        """What the safety margin cost on average in some hours of the last day."""
        margins = [
            solution.g_per_request - solve(replace(problem, confidence_z={})).g_per_request
            for problem, solution, _ in list(self._solved)[::6]
        ]
        return Uncertainty(max(0.0, float(np.mean(margins))), self._judged)

    def _serve(self, hour: int, x: Floats) -> None:
        """Add what an hour's requests used to the optimizer's consumption."""
        case, world = self._case, self._case.world
        per_hour = case.operation.requests_per_hour
        mix = case.mix[hour]
        requests = per_hour * np.tensordot(mix, world.share, 1)[:, None] * x
        energy = per_hour * np.tensordot(mix, world.energy_kwh, 1) * x
        time_s = per_hour * np.tensordot(mix, world.time_s, 1) * x
        self._served = x
        grams = energy * case.window.g_per_kwh[hour] + DEFAULT_EMBODIED_G_PER_S * time_s
        self._requests_g[hour] = float(grams.sum())
        at_s = case.window.at(hour + 1).timestamp()
        for g, o in zip(*np.nonzero(requests), strict=True):
            used = ResourceUse(float(requests[g, o]), float(energy[g, o]), float(time_s[g, o]))
            self._consumption.add(
                world.groups[g], world.options[o], used, at_s=at_s, settings=self._settings, traffic=used.requests
            )

    def _threshold(self, trailing: Floats) -> float:
        """Intensity above which the evaluator does not start."""
        trigger = self._case.operation.trigger
        hours = min(len(trailing), trigger.threshold_window_h)
        return trigger.threshold(trailing[-int(hours) :].tolist())

    def _trailing(self, hour: int) -> TrailingHours:
        """Intensities of the trailing window, this hour's last; hours without a value are left out."""
        window = self._case.window
        length = math.ceil(self._settings.window_h)
        values = np.concatenate([window.past[-length:], window.g_per_kwh[: hour + 1]])[-length:]
        of_day = (window.at(hour).hour - np.arange(len(values))[::-1]) % 24
        known = ~np.isnan(values)
        return TrailingHours((window.zone,), of_day[known], values[known][:, None])

    def _learn(self, findings: Findings, hour: int, *, charged: bool) -> None:
        case, now = self._case, self._case.window.at(hour)
        self._counts.add(
            Quality(
                evaluation_id=str(hour), model="model", evaluated_at=now, trigger="simulated", counts=findings.counts,
                prompts=1, abstentions=0, cost=_NO_COST,
            )
        )  # fmt: skip
        self._prompts += findings.prompts
        for group, row in findings.answers.items():
            for option, used in row.items():
                traffic = used.requests if hour == 0 else 0.0
                self._consumption.add(
                    group, option, used, at_s=now.timestamp(), settings=self._settings, traffic=traffic
                )
        if charged:
            intensity = float(case.window.g_per_kwh[hour])
            grams = findings.energy_kwh * intensity + DEFAULT_EMBODIED_G_PER_S * findings.time_s
            self.evaluator_grams[hour] += grams / case.operation.requests_per_hour
            self.evaluator_kwh[hour] += findings.energy_kwh

    def _solve(
        self, now: datetime, k0: float, bounds: Mapping[str, float], *, rest: RestOfPeriod | None = None
    ) -> Decision:
        world = self._case.world
        reference = world.options[0]
        x = np.zeros((len(world.groups), len(world.options)))
        estimates = estimate(
            self._consumption,
            self._counts,
            options=world.options,
            reference=reference,
            settings=self._settings,
            now_s=now.timestamp(),
        )
        if estimates is None:
            x[:, 0] = 1.0
            return Decision(x=x, quality=dict.fromkeys(bounds, 1.0), fallback="no footprint of the reference")
        problem = build_problem(
            estimates,
            reference=reference,
            prices=_prices(world.options, k0),
            bounds=bounds,
            rest_bounds=None if rest is None else rest.bounds,
            later=[
                LaterHours(share=hours.share, options=_prices(world.options, hours.g_per_kwh[self._case.window.zone]))
                for hours in (() if rest is None else rest.later)
            ],
            settings=self._settings,
        )
        problem, solution, program = solve_jointly(problem, self._settings)
        self._solved.append((problem, solution, program))
        self._judged = judged_prompts(estimates.groups)
        for g, group in enumerate(world.groups):
            row = solution.rows.get(group, {reference: 1.0})
            x[g] = [row.get(option, 0.0) for option in world.options]
        return Decision(
            x=x,
            quality=solution.quality,
            fallback=_fallback(solution, estimates),
            ineligible=tuple(estimates.ineligible),
        )


def _prices(options: Sequence[str], g_per_kwh: float) -> dict[str, OptionPrice]:
    return {
        option: OptionPrice(
            pool=option.partition("/")[0], g_per_kwh=g_per_kwh, embodied_g_per_s=DEFAULT_EMBODIED_G_PER_S
        )
        for option in options
    }


def _fallback(solution: Solution, estimates: Estimates) -> str | None:
    """Why the reference had to be served; None if there was a choice."""
    if solution.status == "optimal":
        return None
    if len(estimates.overall) > 1:
        return NO_SOLUTION
    # The counts differ from hour to hour; what there is too little of does not.
    reasons = {re.sub(r"^\S+ of \S+ ", "too few ", why) for why in estimates.ineligible.values()}
    return "; ".join(sorted(reasons)) or "there is no other option"
