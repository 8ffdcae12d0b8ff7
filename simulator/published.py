"""The six schemes as the authors' published code has them (arXiv 2403.12900), to reproduce the paper's results.

What cannot be done in production is done here: k0_min and k0_max are the whole year's, future included; the evaluator
weighs the grid with the opposite sign of urgency, compares the raw intensity with the mean of the whole window, and its
carbon is not charged; quality is that of 1,000 fresh prompts an hour. The program, the bounds and the trigger are the
services' own.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from services.evaluator.opportunity import PUBLISHED_URGENCY_PER_HOUR, Opportunity, OpportunityRules
from services.optimizer.bounds import TrailingRange, quality_bounds
from services.optimizer.program import Option, Problem, solve
from shared.messages import OptionEstimate
from simulator.draws import QualityDraws
from simulator.errors import SimulationInputError
from simulator.grid import Window
from simulator.measured import Floats, Measured
from simulator.outcome import Outcome

METRIC = "preference"
GROUP = "all"
POOL = "pool"

EMBODIED_G_PER_S = 26_356.568 / (5 * 365 * 86_400)
"""k1: the server's embodied carbon over five years of 365 days (paper, section 5)."""

STATIC_QUALITY = (1.0, 0.9168)
"""q0 and q1 that SPROUT_STA was solved with, relative to q0."""

STATIC_WHOLE_YEAR_START = 800
"""The first window, before which a month of the year had not passed: its mean intensity is the year's."""

STATIC_HOURS = 720


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PublishedCase:
    """A window to reproduce; `mix` is (hours, tasks)."""

    window: Window
    measured: Measured
    mix: Floats
    draws: QualityDraws
    xi: float

    @property
    def hours(self) -> int:
        """Of the window."""
        return len(self.window.g_per_kwh)

    @property
    def bounds(self) -> Floats:
        """b(k0) of every hour, with the year's range."""
        return np.array([self.bound(k0) for k0 in self.window.g_per_kwh])

    def bound(self, k0: float) -> float:
        """b(k0)."""
        year = self.window.grid.g_per_kwh
        return quality_bounds(
            TrailingRange(float(np.nanmin(year)), float(np.nanmax(year))).dirtiness(k0), {METRIC: self.xi}
        )[METRIC]

    def of_mix(self, values: Floats) -> Floats:
        """Means under the mix of every hour, of values by prompt: (hours, columns)."""
        by_task = np.array(
            [values[self.measured.task == task].mean(axis=0) for task in range(len(self.measured.tasks))]
        )
        return np.asarray(self.mix @ by_task)

    def grams(self, energy_kwh: Floats, time_s: Floats) -> Floats:
        """Of a request in every hour, (hours, options)."""
        return energy_kwh * self.window.g_per_kwh[:, None] + EMBODIED_G_PER_S * time_s


def evaluation_hours(window: Window) -> tuple[int, ...]:
    """When the authors' code runs its evaluator: the services' trigger, variant `published`; hour 0 not counted."""
    rules = OpportunityRules(variant="published", urgency_per_hour=PUBLISHED_URGENCY_PER_HOUR)
    opportunity = Opportunity(rules, last=window.begin)
    threshold = float(window.g_per_kwh.mean())
    found = []
    for hour, intensity in enumerate(window.g_per_kwh):
        if opportunity.follow(window.at(hour), float(intensity), threshold=threshold) is not None and hour > 0:
            opportunity.evaluated(window.at(hour))
            found.append(hour)
    return tuple(found)


def solved(
    energy_kwh: Sequence[float], time_s: Sequence[float], quality: Sequence[float], *, g_per_kwh: float, bound: float
) -> Floats:
    """Probability of every option in the program with one group; the first is the reference."""
    names = [str(place) for place in range(len(energy_kwh))]
    estimates = {
        name: OptionEstimate(energy_kwh=e, processing_s=p, quality={METRIC: q})
        for name, e, p, q in zip(names, energy_kwh, time_s, quality, strict=True)
    }
    option = Option(pool=POOL, g_per_kwh=g_per_kwh, embodied_g_per_s=EMBODIED_G_PER_S)
    problem = Problem(
        reference=names[0],
        options=dict.fromkeys(names, option),
        weights={GROUP: 1.0},
        estimates={GROUP: estimates},
        bounds={METRIC: bound},
    )
    row = solve(problem).rows[GROUP]
    return np.array([row.get(name, 0.0) for name in names])


def base(case: PublishedCase) -> Outcome:
    """Only the reference."""
    shares = np.tile(np.eye(len(case.measured.levels))[0], (case.hours, 1))
    return _by_levels(case, "base", shares, np.ones(case.hours))


def co2_opt(case: PublishedCase) -> Outcome:
    """The level of least mean carbon, whatever its quality."""
    energy, time_s = case.of_mix(case.measured.energy_kwh), case.of_mix(case.measured.time_s)
    cheapest = int(case.grams(energy, time_s).mean(axis=0).argmin())
    shares = np.tile(np.eye(len(case.measured.levels))[cheapest], (case.hours, 1))
    return _by_levels(case, "co2_opt", shares, case.draws.levels[:, cheapest] / case.draws.levels[:, 0])


def sprout(case: PublishedCase) -> Outcome:
    """Solved every hour, with the quality of the last evaluation."""
    energy, time_s = case.of_mix(case.measured.energy_kwh), case.of_mix(case.measured.time_s)
    evaluated = evaluation_hours(case.window)
    held = _held(case.draws.levels, evaluated)
    bounds = case.bounds
    shares = np.array(
        [
            solved(energy[h], time_s[h], held[h], g_per_kwh=float(case.window.g_per_kwh[h]), bound=float(bounds[h]))
            for h in range(case.hours)
        ]
    )
    preference = (case.draws.levels * shares).sum(axis=1) / case.draws.levels[:, 0]
    return _by_levels(case, "sprout", shares, preference, bounds=bounds, evaluated=evaluated)


def sprout_sta(case: PublishedCase) -> Outcome:
    """Solved once, for the mean mix and a mean intensity of the past; L0 and L1 alone."""
    energy, time_s = case.of_mix(case.measured.energy_kwh), case.of_mix(case.measured.time_s)
    window = case.window
    known = window.grid.g_per_kwh if window.start_hour == STATIC_WHOLE_YEAR_START else window.past[-STATIC_HOURS:]
    if not len(known):
        raise SimulationInputError(f"zone {window.zone}: nothing is known before hour {window.start_hour}")
    k0 = float(np.nanmean(known))
    x = solved(energy.mean(axis=0)[:2], time_s.mean(axis=0)[:2], STATIC_QUALITY, g_per_kwh=k0, bound=case.bound(k0))
    shares = np.tile(np.append(x, np.zeros(len(case.measured.levels) - 2)), (case.hours, 1))
    preference = (case.draws.static * x).sum(axis=1) / case.draws.static[:, 0]
    return _by_levels(case, "sprout_sta", shares, preference, bounds=case.bounds)


def model_opt(case: PublishedCase) -> Outcome:
    """Two models without directives; the larger one's share is rounded to tenths.

    Raises:
        SimulationInputError: no smaller model was measured.
    """
    measured = case.measured
    if measured.small_kwh is None or measured.small_s is None:
        raise SimulationInputError(
            "scheme model_opt needs a second model, measured without a directive on every prompt"
        )
    energy = case.of_mix(np.column_stack([measured.energy_kwh[:, 0], measured.small_kwh]))
    time_s = case.of_mix(np.column_stack([measured.time_s[:, 0], measured.small_s]))
    fresh = np.column_stack([case.draws.large_model, 1.0 - case.draws.large_model])
    evaluated = evaluation_hours(case.window)
    held, bounds = _held(fresh, evaluated), case.bounds
    shares = np.empty((case.hours, 2))
    for h in range(case.hours):
        x = solved(energy[h], time_s[h], held[h], g_per_kwh=float(case.window.g_per_kwh[h]), bound=float(bounds[h]))
        large = round(float(x[0]), 1)
        shares[h] = large, 1.0 - large
    grams = case.grams(energy, time_s)
    return Outcome(
        zone=case.window.zone,
        window_start_hour=case.window.start_hour,
        scheme="model_opt",
        xi=case.xi,
        options=(measured.model, "smaller model"),
        grams=(grams * shares).sum(axis=1),
        base_grams=grams[:, 0],
        preference=(fresh * shares).sum(axis=1) / fresh[:, 0],
        bound=bounds,
        mix=shares,
        processing_s=(time_s * shares).sum(axis=1),
        g_per_kwh=case.window.g_per_kwh,
        evaluator_grams=np.zeros(case.hours),
        evaluation_hours=evaluated,
    )


def oracle(case: PublishedCase) -> Outcome:
    """The upper bound: each request's own energy and preferred level are known.

    The program says how many requests each level serves; the cheaper of the two levels in use goes to the requests that
    save most by it. In expectation over the prompts, which the authors draw.
    """
    measured, levels = case.measured, case.measured.levels
    energy, time_s = case.of_mix(measured.energy_kwh), case.of_mix(measured.time_s)
    bounds = case.bounds
    judged = measured.judged
    weights = case.mix[:, measured.task] / np.bincount(measured.task)[measured.task]
    judged_weights = case.mix[:, measured.task] * judged / np.bincount(measured.task[judged])[measured.task]
    grams, seconds, preference = (np.empty(case.hours) for _ in range(3))
    mix = np.zeros((case.hours, len(levels)))
    for h in range(case.hours):
        k0 = float(case.window.g_per_kwh[h])
        x = solved(energy[h], time_s[h], case.draws.oracle[h], g_per_kwh=k0, bound=float(bounds[h]))
        own = measured.energy_kwh * k0 + EMBODIED_G_PER_S * measured.time_s
        level = _cheaper_where_it_saves_most(x, own, weights[h])
        rows = np.arange(len(level))
        grams[h] = weights[h] @ own[rows, level]
        seconds[h] = weights[h] @ measured.time_s[rows, level]
        preference[h] = (
            judged_weights[h] @ (measured.preferred == level) / (judged_weights[h] @ (measured.preferred == 0))
        )
        mix[h] = [weights[h] @ (level == one) for one in range(len(levels))]
    return Outcome(
        zone=case.window.zone,
        window_start_hour=case.window.start_hour,
        scheme="oracle",
        xi=case.xi,
        options=levels,
        grams=grams,
        base_grams=case.grams(energy, time_s)[:, 0],
        preference=preference,
        bound=bounds,
        mix=mix,
        processing_s=seconds,
        g_per_kwh=case.window.g_per_kwh,
        evaluator_grams=np.zeros(case.hours),
    )


def _cheaper_where_it_saves_most(x: Floats, grams: Floats, weights: Floats) -> np.ndarray:
    """The level of every request: of the two in use, the cheaper one for its share of those that save most by it."""
    used = [int(place) for place in np.flatnonzero(x > 1e-6)]
    used.sort(key=lambda place: -float(weights @ grams[:, place]))
    level = np.full(len(grams), used[0])
    if len(used) > 1:
        cheap = used[-1]
        order = np.argsort(grams[:, cheap] - grams[:, used[0]], kind="stable")
        level[order[np.cumsum(weights[order]) <= x[cheap]]] = cheap
    return level


SCHEMES: Mapping[str, Callable[[PublishedCase], Outcome]] = {
    "base": base,
    "co2_opt": co2_opt,
    "model_opt": model_opt,
    "sprout_sta": sprout_sta,
    "sprout": sprout,
    "oracle": oracle,
}


def _held(draws: Floats, evaluated: Sequence[int]) -> Floats:
    """The draws of the last evaluation, in every hour; the first is hour 0's."""
    last = np.zeros(len(draws), dtype=int)
    last[list(evaluated)] = list(evaluated)
    return draws[np.maximum.accumulate(last)]


def _by_levels(
    case: PublishedCase,
    scheme: str,
    shares: Floats,
    preference: Floats,
    *,
    bounds: Floats | None = None,
    evaluated: tuple[int, ...] = (),
) -> Outcome:
    energy, time_s = case.of_mix(case.measured.energy_kwh), case.of_mix(case.measured.time_s)
    grams = case.grams(energy, time_s)
    return Outcome(
        zone=case.window.zone,
        window_start_hour=case.window.start_hour,
        scheme=scheme,
        xi=case.xi,
        options=case.measured.levels,
        grams=(grams * shares).sum(axis=1),
        base_grams=grams[:, 0],
        preference=preference,
        bound=np.full(case.hours, np.nan) if bounds is None else bounds,
        mix=shares,
        processing_s=(time_s * shares).sum(axis=1),
        g_per_kwh=case.window.g_per_kwh,
        evaluator_grams=np.zeros(case.hours),
        evaluation_hours=evaluated,
    )
