"""The schemes as they run in production, measured: what was served, and the evaluator's carbon charged."""

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

from shared.pools import DEFAULT_EMBODIED_G_PER_S
from tools.simulator.operation import ProductionCase, Run
from tools.simulator.outcome import Outcome, relative
from tools.simulator.requests import Floats
from tools.simulator.world import CORRECTNESS, PREFERENCE, World, pooled


def simulate(cases: Sequence[ProductionCase]) -> Outcome:
    """Simulate the window once for every case, and measure the cases as one.

    Args:
        cases: one scheme in one window, each with other prompts to learn from and to measure on.
    """
    runs = [Run(case) for case in cases]
    served = np.concatenate([one.simulate() for one in runs], axis=1)
    return _outcome(cases[0], pooled([case.world for case in cases]), served, runs)


def _outcome(case: ProductionCase, world: World, x: Floats, runs: Sequence[Run]) -> Outcome:
    window, mix = case.window, case.mix
    # Bounds depend on the carbon intensity only: they are the same in every run. So are evaluation hours, unless an
    # evaluation is too small in one of them.
    first = runs[0]
    reference = world.all_reference(len(mix))

    def grams(served: Floats) -> Floats:
        energy = world.mean(world.energy_kwh, mix, served)
        return energy * window.g_per_kwh + DEFAULT_EMBODIED_G_PER_S * world.mean(world.time_s, mix, served)

    def tokens(served: Floats) -> Floats | None:
        return None if world.tokens is None else world.mean(world.tokens, mix, served)

    base_tokens = tokens(reference)
    base_kwh = world.mean(world.energy_kwh, mix, reference)
    evaluator_kwh = np.mean([one.evaluator_kwh for one in runs], axis=0)
    only_reference = np.asarray((x[:, :, 0] >= 1.0).all(axis=1))

    def compared(metric: str) -> Floats:
        values = world.quality[metric]
        of_reference = world.mean(values, mix, reference)
        return relative(world.mean(values, mix, x), of_reference, only_reference=only_reference)

    return Outcome(
        zone=window.zone,
        window_start_hour=window.start_hour,
        scheme=case.scheme,
        xi=case.operation.optimizer.xi.get(PREFERENCE, 0.0),
        options=world.options,
        grams=grams(x),
        base_grams=grams(reference),
        preference=compared(PREFERENCE),
        standard_errors={metric: world.standard_error(metric, mix, x) for metric in world.quality},
        bound=first.bounds.get(PREFERENCE, np.full(len(mix), np.nan)),
        correctness=compared(CORRECTNESS) if CORRECTNESS in world.quality else None,
        correctness_bound=first.bounds.get(CORRECTNESS),
        mix=np.einsum("ht,tg,hgo->ho", mix, world.share, x, optimize=True),
        processing_s=world.mean(world.time_s, mix, x),
        base_processing_s=world.mean(world.time_s, mix, reference),
        g_per_kwh=window.g_per_kwh,
        evaluator_grams=np.mean([one.evaluator_grams for one in runs], axis=0),
        tokens=tokens(x),
        base_tokens=base_tokens,
        evaluator_tokens=None if base_tokens is None else evaluator_kwh * _quotient(base_tokens, base_kwh),
        evaluation_hours=tuple(first.evaluated),
        judged_prompts=float(np.mean([one.judged_prompts for one in runs])),
        promise=case.operation.optimizer.promise,
        period_days=case.operation.optimizer.period_days,
        fallbacks=_mean_hours([one.fallbacks for one in runs]),
        ineligible=_mean_hours([one.ineligible for one in runs]),
    )


def _quotient(values: Floats, by: Floats) -> Floats:
    """0 where the divisor is."""
    return np.divide(values, by, out=np.zeros_like(values), where=by > 0.0)


def _mean_hours(counts: Sequence[Counter[str]]) -> dict[str, int]:
    """Mean over several runs, rounded up so that what happened once is not shown as 0."""
    return {key: math.ceil(count / len(counts)) for key, count in sum(counts, Counter[str]()).items()}
