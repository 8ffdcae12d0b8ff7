"""The six schemes of the authors' published code (arXiv 2403.12900), to reproduce the paper's results.

They differ from production: k0_min and k0_max are those of the whole year, with its future; the evaluator's urgency has
the opposite sign, it compares the raw intensity with the mean of the whole window, and its carbon is not charged; the
quality is that of 1,000 fresh prompts every hour. The program and the evaluator's trigger are the services' own.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from services.evaluator.opportunity import PUBLISHED_URGENCY_PER_HOUR, Opportunity, OpportunityRules
from shared.pools import DEFAULT_EMBODIED_G_PER_S
from tools.simulator.grid import Window
from tools.simulator.outcome import Outcome, relative
from tools.simulator.published_case import PublishedCase, Solver
from tools.simulator.requests import Flags, Floats, Ints, Measured, SimulationInputError

STATIC_QUALITY = (1.0, 0.9168)
"""q0 and q1 that SPROUT_STA is solved with, relative to q0."""

STATIC_WHOLE_YEAR_START = 800
"""Start of the first window, which has less than a month of history: the mean intensity of the year is used."""

STATIC_HOURS = 720


def evaluation_hours(window: Window) -> tuple[int, ...]:
    """Hours in which the published code runs its evaluator, without hour 0 (trigger variant `published`)."""
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
    """The level with the least mean carbon, whatever its quality."""
    energy, time_s = case.mean_by_hour(case.measured.energy_kwh), case.mean_by_hour(case.measured.time_s)
    cheapest = int(case.grams(energy, time_s).mean(axis=0).argmin())
    shares = np.tile(np.eye(len(case.measured.levels))[cheapest], (case.hours, 1))
    return _by_levels(case, "co2_opt", shares, case.draws.levels)


def sprout(case: PublishedCase) -> Outcome:
    """Solved every hour, with the quality of the last evaluation."""
    energy, time_s = case.mean_by_hour(case.measured.energy_kwh), case.mean_by_hour(case.measured.time_s)
    evaluated = evaluation_hours(case.window)
    quality = _last_evaluated(case.draws.levels, evaluated)
    bounds, solver = case.bounds, Solver()
    shares = np.array(
        [
            solver.solve(
                energy[h], time_s[h], quality[h], g_per_kwh=float(case.window.g_per_kwh[h]), bound=float(bounds[h])
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
    """Solved once, for the mean mix and the mean intensity of the past; with L0 and L1 only."""
    energy, time_s = case.mean_by_hour(case.measured.energy_kwh), case.mean_by_hour(case.measured.time_s)
    window = case.window
    known = window.grid.g_per_kwh if window.start_hour == STATIC_WHOLE_YEAR_START else window.past[-STATIC_HOURS:]
    if not len(known):
        raise SimulationInputError(f"zone {window.zone}: the trace has no value before hour {window.start_hour}")
    k0 = float(np.nanmean(known))
    solver = Solver()
    x = solver.solve(
        energy.mean(axis=0)[:2], time_s.mean(axis=0)[:2], STATIC_QUALITY, g_per_kwh=k0, bound=case.bound(k0)
    )
    shares = np.tile(np.append(x, np.zeros(len(case.measured.levels) - 2)), (case.hours, 1))
    # The one decision applies to every hour.
    fallbacks = dict.fromkeys(solver.fallbacks, case.hours)
    return _by_levels(case, "sprout_sta", shares, case.draws.static, bounds=case.bounds, fallbacks=fallbacks)


def model_opt(case: PublishedCase) -> Outcome:
    """Two models without directives; the larger one's share is rounded to tenths.

    Raises:
        SimulationInputError: the smaller model was not measured.
    """
    measured = case.measured
    if measured.small_kwh is None or measured.small_s is None:
        raise SimulationInputError(
            "scheme model_opt needs a second model, measured without a directive on every prompt"
        )
    energy = case.mean_by_hour(np.column_stack([measured.energy_kwh[:, 0], measured.small_kwh]))
    time_s = case.mean_by_hour(np.column_stack([measured.time_s[:, 0], measured.small_s]))
    fresh = np.column_stack([case.draws.large_model, 1.0 - case.draws.large_model])
    evaluated = evaluation_hours(case.window)
    quality, bounds, solver = _last_evaluated(fresh, evaluated), case.bounds, Solver()
    shares = np.empty((case.hours, 2))
    for h in range(case.hours):
        x = solver.solve(
            energy[h], time_s[h], quality[h], g_per_kwh=float(case.window.g_per_kwh[h]), bound=float(bounds[h])
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


def oracle(case: PublishedCase) -> Outcome:
    """The upper bound: each request's own energy and preferred level are known.

    The program decides how many requests each level serves; the cheaper of the two levels in use serves the requests
    that save most by it. Expectation over the prompts; the published code draws them.
    """
    measured, levels = case.measured, case.measured.levels
    energy, time_s = case.mean_by_hour(measured.energy_kwh), case.mean_by_hour(measured.time_s)
    bounds, solver = case.bounds, Solver()
    known = measured.checkable
    all_rows = np.ones(len(measured), dtype=bool)
    of_all, of_judged, of_known = (_prompts_of_task(measured, rows) for rows in (all_rows, measured.judged, known))
    right = np.nan_to_num(measured.correct)
    grams, seconds, liked, base_liked, correct, base_correct = (np.zeros(case.hours) for _ in range(6))
    mix = np.zeros((case.hours, len(levels)))
    for h in range(case.hours):
        k0 = float(case.window.g_per_kwh[h])
        x = solver.solve(energy[h], time_s[h], case.draws.oracle[h], g_per_kwh=k0, bound=float(bounds[h]))
        traffic = case.mix[h, measured.task]
        weights = traffic / of_all
        own = measured.energy_kwh * k0 + DEFAULT_EMBODIED_G_PER_S * measured.time_s
        level = _cheaper_where_it_saves_most(x, own, weights)
        rows = np.arange(len(level))
        grams[h] = weights @ own[rows, level]
        seconds[h] = weights @ measured.time_s[rows, level]
        judged, checked = traffic * measured.judged / of_judged, traffic * known / of_known
        liked[h], base_liked[h] = judged @ (measured.preferred == level), judged @ (measured.preferred == 0)
        correct[h], base_correct[h] = checked @ right[rows, level], checked @ right[:, 0]
        mix[h] = [weights @ (level == one) for one in range(len(levels))]
    only_reference = mix[:, 0] >= 1.0 - 1e-9  # a sum over prompts
    return Outcome(
        zone=case.window.zone,
        window_start_hour=case.window.start_hour,
        scheme="oracle",
        xi=case.xi,
        options=levels,
        grams=grams,
        base_grams=case.grams(energy, time_s)[:, 0],
        preference=relative(liked, base_liked, only_reference=only_reference),
        bound=bounds,
        mix=mix,
        processing_s=seconds,
        base_processing_s=time_s[:, 0],
        g_per_kwh=case.window.g_per_kwh,
        correctness=relative(correct, base_correct, only_reference=only_reference) if known.any() else None,
        evaluator_grams=np.zeros(case.hours),
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


def _last_evaluated(draws: Floats, evaluated: Sequence[int]) -> Floats:
    """Draws of the last evaluation, for every hour; the first evaluation is in hour 0."""
    last = np.zeros(len(draws), dtype=int)
    last[list(evaluated)] = list(evaluated)
    return draws[np.maximum.accumulate(last)]


def _relative(quality: Floats, shares: Floats) -> Floats:
    """Quality of what was served relative to the first option's, (hours,); both arguments are (hours, options)."""
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
    """Outcome of a scheme, from its shares, (hours, levels), and fresh draws of quality, (hours, first levels)."""
    energy, time_s = case.mean_by_hour(case.measured.energy_kwh), case.mean_by_hour(case.measured.time_s)
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


def _prompts_of_task(measured: Measured, rows: Flags) -> Ints:
    """For every prompt, the number of these prompts of its task, at least 1."""
    counts = np.bincount(measured.task[rows], minlength=len(measured.tasks))
    return np.asarray(np.maximum(counts, 1)[measured.task])


def _cheaper_where_it_saves_most(x: Floats, grams: Floats, weights: Floats) -> np.ndarray:
    """Level of every request: of the two in use, the cheaper one for its share of those that save most by it."""
    used = [int(place) for place in np.flatnonzero(x > 1e-6)]
    used.sort(key=lambda place: -float(weights @ grams[:, place]))
    level = np.full(len(grams), used[0])
    if len(used) > 1:
        cheap = used[-1]
        order = np.argsort(grams[:, cheap] - grams[:, used[0]], kind="stable")
        level[order[np.cumsum(weights[order]) <= x[cheap]]] = cheap
    return level
