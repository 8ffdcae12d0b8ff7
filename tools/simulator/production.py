"""The schemes as they run in production: nothing is known of the future, and the evaluator's carbon is charged.

Every hour the trigger decides whether to evaluate, the estimates are made from what was served and judged, and the
program is solved: by the services' own modules. What is served is the expectation over the measured prompts.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal

import numpy as np

from services.evaluator.opportunity import Opportunity, OpportunityRules
from services.optimizer.bounds import quality_bounds, spanned
from services.optimizer.consumption import Consumed, Consumption
from services.optimizer.estimates import Estimates, estimate
from services.optimizer.problem import Option, Problem, Solution
from services.optimizer.program import solve
from services.optimizer.quality import QualityEvidence
from services.optimizer.settings import OptimizerSettings
from shared.messages import EvaluationCost, Quality
from tools.simulator.case import EMBODIED_G_PER_S, NO_SOLUTION
from tools.simulator.grid import Window
from tools.simulator.judging import Findings, Judge
from tools.simulator.measured import Floats
from tools.simulator.outcome import Outcome, relative
from tools.simulator.world import CORRECTNESS, PREFERENCE, World, pooled

Rule = Literal["reference", "program", "program_once", "cheapest"]
"""How the options are chosen: always the reference; the program, every hour or once; least carbon, without bounds."""

_NO_COST = EvaluationCost(generations=0, judgements=0, completion_tokens=0, processing_s=0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """How the services are run.

    Attributes:
        xi: largest relative loss, by metric.
        constant_bounds: metrics for which it is tolerated in every hour, not only in the dirtiest.
        prompts_per_evaluation: drawn each time.
        requests_per_hour: of the traffic.
        seed: of the evaluator's draws.
    """

    xi: Mapping[str, float]
    constant_bounds: frozenset[str] = frozenset()
    optimizer: OptimizerSettings
    trigger: OpportunityRules = field(default_factory=OpportunityRules)
    prompts_per_evaluation: int = 150
    requests_per_hour: float = 10_000.0
    seed: int = 1


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ProductionCase:
    """A scheme in a window; `mix` is (hours, tasks), `families` those of prompt groups, null: there are none."""

    scheme: str
    rule: Rule
    window: Window
    mix: Floats
    world: World
    judge: Judge
    operation: Operation
    families: Mapping[str, str] | None = None


def simulate(cases: Sequence[ProductionCase]) -> Outcome:
    """Live through the window once for every case, and measure them as one.

    Args:
        cases: one scheme in one window, each time with other prompts to learn from and to measure on.
    """
    operators = [_Operator(case) for case in cases]
    served = np.concatenate([operator.live() for operator in operators], axis=1)
    return _outcome(cases[0], pooled([case.world for case in cases]), served, operators)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Decision:
    """What serves an hour.

    Attributes:
        x: (G, O).
        fallback: why only the reference could be served; null where there was a choice.
        withheld: options that could not be used because too little is known of them.
    """

    x: Floats
    fallback: str | None = None
    withheld: tuple[str, ...] = ()


class _Operator:
    """The evaluator and the optimizer of one window, fed by what the ledger and the judge would tell."""

    def __init__(self, case: ProductionCase) -> None:
        self._case = case
        self._rules = case.operation.optimizer.estimate_rules
        self._memory = self._rules.memory
        self._consumption = Consumption()
        self._evidence = QualityEvidence(half_life_s=self._rules.quality.half_life_s, families=case.families)
        self._opportunity = Opportunity(case.operation.trigger)
        self._rng = np.random.default_rng([case.operation.seed, case.window.start_hour])
        self._metrics = tuple(case.operation.xi) if case.rule in ("program", "program_once") else ()
        self._once: _Decision | None = None
        self.fallbacks: Counter[str] = Counter()
        self.withheld: Counter[str] = Counter()
        self.evaluated: list[int] = []
        self.evaluator_grams = np.zeros(len(case.window.g_per_kwh))
        self.bounds: dict[str, Floats] = {name: np.full(len(case.window.g_per_kwh), np.nan) for name in self._metrics}

    def live(self) -> Floats:
        """Decide and serve hour by hour; returns what served, (hours, G, O)."""
        hours = len(self._case.window.g_per_kwh)
        x = self._case.world.all_reference(hours)
        if self._case.rule != "reference":
            for hour in range(hours):
                x[hour] = self.decide(hour)
                self.serve(hour, x[hour])
        return x

    def decide(self, hour: int) -> Floats:
        """(G, O): what serves the hour."""
        case, now = self._case, self._case.window.at(hour)
        k0 = float(case.window.g_per_kwh[hour])
        trailing = self._trailing(hour)
        mean = float(trailing.mean())
        # What is to be judged without a metric that counts would be energy for nothing; so would be a later look at
        # what is decided once.
        if hour == 0:
            self._learn(case.judge.study(at_s=now.timestamp()), hour, charged=bool(self._metrics))
            self._opportunity.evaluated(now)
        elif case.rule == "program" and self._opportunity.observe(now, k0, threshold=mean):
            prompts = case.operation.prompts_per_evaluation
            draws = case.judge.draw(case.mix[hour - 1], prompts, self._rng, at_s=now.timestamp())
            self._learn(draws, hour, charged=True)
            self._opportunity.evaluated(now)
            self.evaluated.append(hour)
        span = spanned(trailing.tolist(), hours=len(trailing), min_hours=case.operation.optimizer.min_window_hours)
        bounds = self._bounds(span.dirtiness(k0))
        for metric in self._metrics:
            self.bounds[metric][hour] = bounds[metric]
        if case.rule != "program_once":
            decision = self._solved(now, k0, bounds if self._metrics else {})
        else:
            if self._once is None:
                self._once = self._solved(now, mean, self._bounds(span.dirtiness(mean)))
            decision = self._once
        if decision.fallback is not None:
            self.fallbacks[decision.fallback] += 1
        self.withheld.update(decision.withheld)
        return decision.x

    def serve(self, hour: int, x: Floats) -> None:
        """Tell the optimizer what an hour's requests took."""
        case, world = self._case, self._case.world
        asked = case.operation.requests_per_hour
        mix = case.mix[hour]
        requests = asked * np.tensordot(mix, world.share, 1)[:, None] * x
        energy = asked * np.tensordot(mix, world.energy_kwh, 1) * x
        time_s = asked * np.tensordot(mix, world.time_s, 1) * x
        at_s = case.window.at(hour + 1).timestamp()
        for g, o in zip(*np.nonzero(requests), strict=True):
            taken = Consumed(float(requests[g, o]), float(energy[g, o]), float(time_s[g, o]))
            self._consumption.add(world.groups[g], world.options[o], taken, at_s=at_s, memory=self._memory, asked=True)

    def _bounds(self, dirtiness: float) -> dict[str, float]:
        operation = self._case.operation
        return quality_bounds(dirtiness, operation.xi, constant=operation.constant_bounds)

    def _trailing(self, hour: int) -> Floats:
        """Known intensities of the trailing window, this hour's the last; hours without a value are left out."""
        window = self._case.window
        length = math.ceil(self._case.operation.optimizer.window_h)
        values = np.concatenate([window.past[-length:], window.g_per_kwh[: hour + 1]])[-length:]
        return np.asarray(values[~np.isnan(values)])

    def _learn(self, findings: Findings, hour: int, *, charged: bool) -> None:
        case, now = self._case, self._case.window.at(hour)
        self._evidence.add(
            Quality(
                evaluation_id=str(hour), model="model", evaluated_at=now, trigger="simulated", counts=findings.counts,
                prompts=1, abstentions=0, cost=_NO_COST,
            )
        )  # fmt: skip
        for group, row in findings.taken.items():
            for option, cell in row.items():
                self._consumption.add(
                    group, option, Consumed(*cell), at_s=now.timestamp(), memory=self._memory, asked=hour == 0
                )
        if charged:
            grams = findings.energy_kwh * float(case.window.g_per_kwh[hour]) + EMBODIED_G_PER_S * findings.time_s
            self.evaluator_grams[hour] += grams / case.operation.requests_per_hour

    def _solved(self, now: datetime, k0: float, bounds: Mapping[str, float]) -> _Decision:
        case, world = self._case, self._case.world
        x = np.zeros((len(world.groups), len(world.options)))
        believed = estimate(
            self._consumption,
            self._evidence,
            options=world.options,
            reference=world.options[0],
            metrics=self._metrics,
            rules=self._rules,
            now_s=now.timestamp(),
        )
        if believed is None:
            x[:, 0] = 1.0
            return _Decision(x=x, fallback="no footprint of the reference")
        problem = Problem(
            reference=world.options[0],
            options={
                option: Option(pool=option.partition("/")[0], g_per_kwh=k0, embodied_g_per_s=EMBODIED_G_PER_S)
                for option in world.options
            },
            weights=believed.weights,
            families=believed.families,
            estimates=believed.groups,
            cautions=case.operation.optimizer.aims.caution.together(bounds),
            bounds=bounds,
            holdout=case.operation.optimizer.holdout,
        )
        solution = solve(problem)
        for g, group in enumerate(world.groups):
            row = solution.rows.get(group, {world.options[0]: 1.0})
            x[g] = [row.get(option, 0.0) for option in world.options]
        return _Decision(x=x, fallback=_fallback(solution, believed), withheld=tuple(believed.withheld))


def _fallback(solution: Solution, believed: Estimates) -> str | None:
    """Why the program had to serve the reference; null where it did not have to."""
    if solution.status == "optimal":
        return None
    if len(believed.whole) > 1:
        return NO_SOLUTION
    # The numbers differ from hour to hour; what is scarce does not.
    scarce = {re.sub(r"^\S+ of \S+ ", "too few ", why) for why in believed.withheld.values()}
    return "; ".join(sorted(scarce)) or "there is no other option"


def _outcome(case: ProductionCase, world: World, x: Floats, operators: Sequence[_Operator]) -> Outcome:
    window, mix = case.window, case.mix
    # When is judged, and what is asked for, follows the grid alone: it is the same for all.
    operator = operators[0]
    reference = world.all_reference(len(mix))

    def grams(served: Floats) -> Floats:
        energy = world.mean(world.energy_kwh, mix, served)
        return energy * window.g_per_kwh + EMBODIED_G_PER_S * world.mean(world.time_s, mix, served)

    only_reference = np.asarray((x[:, :, 0] >= 1.0).all(axis=1))

    def compared(metric: str) -> Floats:
        values = world.quality[metric]
        whole = world.mean(values, mix, reference)
        return relative(world.mean(values, mix, x), whole, only_reference=only_reference)

    return Outcome(
        zone=window.zone,
        window_start_hour=window.start_hour,
        scheme=case.scheme,
        xi=case.operation.xi.get(PREFERENCE, 0.0),
        options=world.options,
        grams=grams(x),
        base_grams=grams(reference),
        preference=compared(PREFERENCE),
        standard_errors={metric: world.standard_error(metric, mix, x) for metric in world.quality},
        bound=operator.bounds.get(PREFERENCE, np.full(len(mix), np.nan)),
        correctness=compared(CORRECTNESS) if CORRECTNESS in world.quality else None,
        correctness_bound=operator.bounds.get(CORRECTNESS),
        mix=np.einsum("ht,tg,hgo->ho", mix, world.share, x, optimize=True),
        processing_s=world.mean(world.time_s, mix, x),
        base_processing_s=world.mean(world.time_s, mix, reference),
        g_per_kwh=window.g_per_kwh,
        evaluator_grams=np.mean([one.evaluator_grams for one in operators], axis=0),
        evaluation_hours=tuple(operator.evaluated),
        fallbacks=_hours([one.fallbacks for one in operators]),
        withheld=_hours([one.withheld for one in operators]),
    )


def _hours(counts: Sequence[Counter[str]]) -> dict[str, int]:
    """Mean hours over several lives through a window, rounded up: what happened at all must be seen."""
    return {key: math.ceil(count / len(counts)) for key, count in sum(counts, Counter[str]()).items()}
