"""The upper bound of the paper: what could be saved, were every request's own energy and preferred level known."""

import numpy as np

from tools.simulator.case import EMBODIED_G_PER_S, PublishedCase, Solver
from tools.simulator.measured import Flags, Floats, Ints, Measured
from tools.simulator.outcome import Outcome, relative


def oracle(case: PublishedCase) -> Outcome:
    """The upper bound: each request's own energy and preferred level are known.

    The program says how many requests each level serves; the cheaper of the two levels in use goes to the requests that
    save most by it. In expectation over the prompts, which the authors draw.
    """
    measured, levels = case.measured, case.measured.levels
    energy, time_s = case.of_mix(measured.energy_kwh), case.of_mix(measured.time_s)
    bounds, solver = case.bounds, Solver()
    known = measured.checkable
    everything = np.ones(len(measured), dtype=bool)
    of_all, of_judged, of_known = (_numbers(measured, rows) for rows in (everything, measured.judged, known))
    right = np.nan_to_num(measured.correct)
    grams, seconds, liked, base_liked, correct, base_correct = (np.zeros(case.hours) for _ in range(6))
    mix = np.zeros((case.hours, len(levels)))
    for h in range(case.hours):
        k0 = float(case.window.g_per_kwh[h])
        x = solver.solved(energy[h], time_s[h], case.draws.oracle[h], g_per_kwh=k0, bound=float(bounds[h]))
        asked = case.mix[h, measured.task]
        weights = asked / of_all
        own = measured.energy_kwh * k0 + EMBODIED_G_PER_S * measured.time_s
        level = _cheaper_where_it_saves_most(x, own, weights)
        rows = np.arange(len(level))
        grams[h] = weights @ own[rows, level]
        seconds[h] = weights @ measured.time_s[rows, level]
        judged, checked = asked * measured.judged / of_judged, asked * known / of_known
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


def _numbers(measured: Measured, rows: Flags) -> Ints:
    """Of every prompt: how many of these there are of its task, 1 at least."""
    counts = np.bincount(measured.task[rows], minlength=len(measured.tasks))
    return np.asarray(np.maximum(counts, 1)[measured.task])


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
