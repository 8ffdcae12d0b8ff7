"""The six schemes as the authors' published code has them (arXiv 2403.12900), to reproduce the paper's results.

What cannot be done in production is done here: k0_min and k0_max are the whole year's, future included; the evaluator
weighs the grid with the opposite sign of urgency, compares the raw intensity with the mean of the whole window, and its
carbon is not charged; quality is that of 1,000 fresh prompts an hour. The program, the bounds and the trigger are the
services' own.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from services.evaluator.opportunity import PUBLISHED_URGENCY_PER_HOUR, Opportunity, OpportunityRules
from tools.simulator.case import PublishedCase, Solver
from tools.simulator.errors import SimulationInputError
from tools.simulator.grid import Window
from tools.simulator.measured import Floats
from tools.simulator.oracle import oracle
from tools.simulator.outcome import Outcome, relative

STATIC_QUALITY = (1.0, 0.9168)
"""q0 and q1 that SPROUT_STA was solved with, relative to q0."""

STATIC_WHOLE_YEAR_START = 800
"""The first window, before which a month of the year had not passed: its mean intensity is the year's."""

STATIC_HOURS = 720


def evaluation_hours(window: Window) -> tuple[int, ...]:
    """When the authors' code runs its evaluator: the services' trigger, variant `published`; hour 0 not counted."""
    rules = OpportunityRules(variant="published", urgency_per_hour=PUBLISHED_URGENCY_PER_HOUR)
    opportunity = Opportunity(rules, last=window.begin)
    threshold = float(window.g_per_kwh.mean())
    found = []
    for hour, intensity in enumerate(window.g_per_kwh):
        if opportunity.observe(window.at(hour), float(intensity), threshold=threshold) is not None and hour > 0:
            opportunity.evaluated(window.at(hour))
            found.append(hour)
    return tuple(found)


def base(case: PublishedCase) -> Outcome:
    """Only the reference."""
    shares = np.tile(np.eye(len(case.measured.levels))[0], (case.hours, 1))
    return _by_levels(case, "base", shares, case.draws.levels)


def co2_opt(case: PublishedCase) -> Outcome:
    """The level of least mean carbon, whatever its quality."""
    energy, time_s = case.of_mix(case.measured.energy_kwh), case.of_mix(case.measured.time_s)
    cheapest = int(case.grams(energy, time_s).mean(axis=0).argmin())
    shares = np.tile(np.eye(len(case.measured.levels))[cheapest], (case.hours, 1))
    return _by_levels(case, "co2_opt", shares, case.draws.levels)


def sprout(case: PublishedCase) -> Outcome:
    """Solved every hour, with the quality of the last evaluation."""
    energy, time_s = case.of_mix(case.measured.energy_kwh), case.of_mix(case.measured.time_s)
    evaluated = evaluation_hours(case.window)
    held = _held(case.draws.levels, evaluated)
    bounds, solver = case.bounds, Solver()
    shares = np.array(
        [
            solver.solved(
                energy[h], time_s[h], held[h], g_per_kwh=float(case.window.g_per_kwh[h]), bound=float(bounds[h])
            )
            for h in range(case.hours)
        ]
    )
    return _by_levels(
        case,
        "sprout",
        shares,
        case.draws.levels,
        bounds=bounds,
        evaluated=evaluated,
        fallbacks=solver.fallbacks,
    )


def sprout_sta(case: PublishedCase) -> Outcome:
    """Solved once, for the mean mix and a mean intensity of the past; L0 and L1 alone."""
    energy, time_s = case.of_mix(case.measured.energy_kwh), case.of_mix(case.measured.time_s)
    window = case.window
    known = window.grid.g_per_kwh if window.start_hour == STATIC_WHOLE_YEAR_START else window.past[-STATIC_HOURS:]
    if not len(known):
        raise SimulationInputError(f"zone {window.zone}: nothing is known before hour {window.start_hour}")
    k0 = float(np.nanmean(known))
    solver = Solver()
    x = solver.solved(
        energy.mean(axis=0)[:2], time_s.mean(axis=0)[:2], STATIC_QUALITY, g_per_kwh=k0, bound=case.bound(k0)
    )
    shares = np.tile(np.append(x, np.zeros(len(case.measured.levels) - 2)), (case.hours, 1))
    # What was decided once holds in every hour.
    fallbacks = dict.fromkeys(solver.fallbacks, case.hours)
    return _by_levels(case, "sprout_sta", shares, case.draws.static, bounds=case.bounds, fallbacks=fallbacks)


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
    held, bounds, solver = _held(fresh, evaluated), case.bounds, Solver()
    shares = np.empty((case.hours, 2))
    for h in range(case.hours):
        x = solver.solved(
            energy[h], time_s[h], held[h], g_per_kwh=float(case.window.g_per_kwh[h]), bound=float(bounds[h])
        )
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
        preference=_relative(fresh, shares),
        bound=bounds,
        mix=shares,
        processing_s=(time_s * shares).sum(axis=1),
        base_processing_s=time_s[:, 0],
        g_per_kwh=case.window.g_per_kwh,
        evaluator_grams=np.zeros(case.hours),
        evaluation_hours=evaluated,
        fallbacks=solver.fallbacks,
    )


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


def _relative(quality: Floats, shares: Floats) -> Floats:
    """Quality of what was served, relative to the first option's: both (hours, options)."""
    return relative((quality * shares).sum(axis=1), quality[:, 0], only_reference=shares[:, 0] >= 1.0)


def _by_levels(
    case: PublishedCase,
    scheme: str,
    shares: Floats,
    quality: Floats,
    *,
    bounds: Floats | None = None,
    evaluated: tuple[int, ...] = (),
    fallbacks: Mapping[str, int] | None = None,
) -> Outcome:
    """What a scheme did that serves every level a share; `quality` is drawn afresh, (hours, the first levels)."""
    energy, time_s = case.of_mix(case.measured.energy_kwh), case.of_mix(case.measured.time_s)
    grams, correct = case.grams(energy, time_s), case.correct
    drawn = min(quality.shape[1], shares.shape[1])
    if shares[:, drawn:].any():
        raise SimulationInputError(
            f"scheme {scheme} serves level {case.measured.levels[drawn]}, of which the published protocol draws no "
            "quality; use --variant production"
        )
    return Outcome(
        zone=case.window.zone,
        window_start_hour=case.window.start_hour,
        scheme=scheme,
        xi=case.xi,
        options=case.measured.levels,
        grams=(grams * shares).sum(axis=1),
        base_grams=grams[:, 0],
        preference=_relative(quality[:, :drawn], shares[:, :drawn]),
        bound=np.full(case.hours, np.nan) if bounds is None else bounds,
        mix=shares,
        processing_s=(time_s * shares).sum(axis=1),
        base_processing_s=time_s[:, 0],
        g_per_kwh=case.window.g_per_kwh,
        evaluator_grams=np.zeros(case.hours),
        evaluation_hours=evaluated,
        correctness=None if correct is None else _relative(correct, shares),
        fallbacks=fallbacks or {},
    )
