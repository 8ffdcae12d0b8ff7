"""How often the program keeps what it promises, with simulated truth: estimates, margin and choice of options together.

The estimated quality of the chosen options is too high by chance, so the promise is kept less often than the margin
would keep it for options chosen beforehand.
"""

from dataclasses import dataclass

import numpy as np
import pytest

from services.optimizer.costs import Consumption, ResourceUse
from services.optimizer.estimates import estimate
from services.optimizer.policy import build_problem
from services.optimizer.problem import OptionPrice
from services.optimizer.program import solve_program
from services.optimizer.settings import OptimizerSettings
from services.optimizer.state import QualityCounts
from shared.messages import Paired, QualityCount

LEVELS = ("p/L0", "p/L1", "p/L2")
GROUPS = 12
DRAWS = 200


@dataclass(frozen=True)
class Draw:
    """Figures of one solution.

    Attributes:
        quality: true quality, relative to the baseline's.
        expected: its estimate.
        margin: what was taken off the estimate.
        saving: share of the energy.
    """

    quality: float
    expected: float
    margin: float
    saving: float


def drawn(rng: np.random.Generator, *, verdicts: int, settings: OptimizerSettings) -> Draw:
    """Groups that prefer the levels by different shares; verdicts on prompts drawn by traffic; one solution."""
    names = [f"g{place:02}" for place in range(GROUPS)]
    traffic = rng.dirichlet(np.full(GROUPS, 3.0))
    preferred = np.array([rng.dirichlet((4.6, 4.1, 3.3)) for _ in names])
    energy = rng.lognormal(0.0, 0.4, (GROUPS, 1)) * np.array([1.0, 0.45, 0.15])
    counts = QualityCounts(settings=settings, families={name: f"f{place % 4}" for place, name in enumerate(names)})
    consumption = Consumption()
    for place, (name, judged) in enumerate(zip(names, rng.multinomial(verdicts, traffic), strict=True)):
        won = rng.multinomial(judged, preferred[place]).astype(float)
        counts.add_counts(
            [
                QualityCount(
                    group=name, option=level, metric="preference", successes=won[o], trials=judged,
                    paired=Paired(reference=LEVELS[0], successes=won[0], both=won[0] if o == 0 else 0.0),
                )
                for o, level in enumerate(LEVELS)
            ], {}, at_s=0.0,
        )  # fmt: skip
        for level, joules in zip(LEVELS, energy[place], strict=True):
            served = 1e5 * traffic[place]
            used = ResourceUse(served, served * joules, served * joules)
            consumption.add(name, level, used, at_s=0.0, settings=settings, traffic=served / len(LEVELS))
    estimates = estimate(consumption, counts, options=LEVELS, reference=LEVELS[0], settings=settings, now_s=0.0)
    assert estimates is not None
    price = OptionPrice(pool="p", g_per_kwh=300.0, embodied_g_per_s=0.0)
    problem = build_problem(
        estimates,
        reference=LEVELS[0],
        prices=dict.fromkeys(LEVELS, price),
        bounds={"preference": 1.0},
        settings=settings,
    )
    solution, program = solve_program(problem)
    assert program is not None
    x = np.array([[solution.rows[name].get(level, 0.0) for level in LEVELS] for name in names])
    limit = program.cells.bounds["preference"]
    return Draw(
        float(traffic @ (x * preferred).sum(axis=1) / (traffic @ preferred[:, 0])),
        limit.mean(program.plan),
        limit.margin(program.plan),
        float(1.0 - traffic @ (x * energy).sum(axis=1) / (traffic @ energy[:, 0])),
    )


@pytest.mark.statistical
@pytest.mark.parametrize(("z", "least", "most"), [(1.0, 0.74, 0.87), (1.645, 0.88, 0.98)])
@pytest.mark.parametrize("verdicts", [1_200, 4_800])
def test_the_promise_is_kept_nearly_as_often_as_it_says_and_the_margin_is_not_overstated(verdicts, z, least, most):
    rng, settings = np.random.default_rng(11), OptimizerSettings(holdout=0.0, confidence_z=z)
    found = [drawn(rng, verdicts=verdicts, settings=settings) for _ in range(DRAWS)]
    kept = float(np.mean([one.quality >= 1.0 - 1e-5 for one in found]))
    quality, expected, margin, saving = (
        np.array([getattr(one, name) for one in found]) for name in ("quality", "expected", "margin", "saving")
    )
    claimed, actual = float(margin.mean()) / z, float((quality - expected).std())
    print(
        f"{verdicts} verdicts, z = {z}: kept in {kept:.1%} of {DRAWS} draws; quality {100 * quality.mean():.1f} %, "
        f"{100 * (quality - expected).mean():+.2f} points from the estimate; standard error {100 * claimed:.2f} points "
        f"claimed, {100 * actual:.2f} actual; saving {100 * saving.mean():.1f} %"
    )
    assert least <= kept <= most
    assert claimed < 1.1 * actual
