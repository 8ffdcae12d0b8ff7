"""Does the interval of the saving on the meter contain the truth? `python -m tests.benchmarks.bench_switchback`.

Simulates a fleet over many days in both worlds (`tests/support/switchback_days.py`), estimates the saving of every day
from the switchback blocks of the 28 days before its end, and compares it with the true one. With `--carbon PATH` grams
follow recorded intensities, one zone per seed.
"""

import argparse
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from shared.metered_saving import Estimate, Saving, metered_saving
from tests.support.switchback_days import FleetDays, Floats, day_bounds, simulate_days
from tools.simulator.grid import read_grids

AFTER_DAYS = 14
"""Days of which no saving is estimated, in the usual case: until then there are fewer blocks."""

SCENARIOS: Mapping[str, Mapping[str, Any]] = {
    "16 servers": {},
    "4 servers": {"servers": 4},
    "16 servers of four GPUs, 70B": {"curve": "llama-3.3-70b-4xh100"},
    "unseen changes twice and three times as large": {"length_drift": 0.1, "power_drift": 0.03},
    "100,000 requests/h": {"requests_per_hour": 100_000.0},
    "without Sprout: packed and asleep": {"servers": 4, "dispatch": "pack", "sleep": True},
}


@dataclass
class Compared:
    """Intervals of the saving, %, compared with the truth."""

    covered: list[bool] = field(default_factory=list)
    half_widths: list[float] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)

    def add(self, saving: Saving | None, truth: float) -> None:
        """Compare one interval; a saving without one does not count."""
        found: Estimate | None = None if saving is None else saving.saved_pct
        if found is not None:
            self.covered.append(found.low <= truth <= found.high)
            self.half_widths.append(found.half_width)
            self.errors.append(found.value - truth)


def compare(case: FleetDays, days: Sequence[int], *, period: int = 1) -> tuple[Compared, Compared, float]:
    """Intervals of the energy and the carbon of periods, and the mean true saving of energy, %.

    Args:
        case: what is simulated.
        days: last day of each period.
        period: its days.
    """
    bins, truth = simulate_days(case)
    energy, carbon, true = Compared(), Compared(), []
    for day in days:
        since_s, until_s = day_bounds(day - period + 1)[0], day_bounds(day)[1]
        result = metered_saving(bins, since_s=since_s, until_s=until_s)
        span = slice(day - period + 1, day + 1)
        true.append(_saved_pct(truth.actual_j[span], truth.without_j[span]))
        energy.add(result.energy, true[-1])
        carbon.add(result.carbon, _saved_pct(truth.actual_g[span], truth.without_g[span]))
    return energy, carbon, float(np.mean(true))


def _saved_pct(actual: Floats, without: Floats) -> float:
    return float(100.0 * (1.0 - actual.sum() / without.sum()))


def _row(name: str, energy: Compared, carbon: Compared, true_pct: float) -> str:
    cells = [name, f"{len(energy.covered)}", f"{true_pct:.1f}"]
    for one in (energy, carbon):
        cells += [
            f"{100.0 * np.mean(one.covered):.1f}",
            f"{np.median(one.half_widths):.2f} / {np.quantile(one.half_widths, 0.95):.2f} / {max(one.half_widths):.2f}",
        ]
    cells.append(f"{np.mean(energy.errors):+.2f}")
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", default="2001,2002,2003", help="one simulation each")
    parser.add_argument("--days", type=int, default=214, help="of a simulation; the first 14 are not estimated")
    parser.add_argument("--carbon", type=Path, help="recorded intensities; default: synthetic ones")
    arguments = parser.parse_args()
    seeds = [int(one) for one in arguments.seeds.split(",")]
    traces = (
        [] if arguments.carbon is None else [grid.g_per_kwh for grid in read_grids([arguments.carbon], column="direct")]
    )
    started = time.perf_counter()
    print(
        "| fleet, seed | periods | true saving % | energy: covered % | half-width, median / 95 % / largest "
        "| grams: covered % | half-width, median / 95 % / largest | mean error |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for name, options in SCENARIOS.items():
        for place, seed in enumerate(seeds):
            trace = traces[place % len(traces)] if traces else None
            case = FleetDays(days=arguments.days, seed=seed, g_per_kwh=trace, **options)
            days = range(AFTER_DAYS, case.days)
            print(_row(f"{name}, {seed}", *compare(case, days)), flush=True)
    for name, options in list(SCENARIOS.items())[:2]:
        for seed in seeds:
            case = FleetDays(days=arguments.days, seed=seed, **options)
            fortnights = range(2 * AFTER_DAYS - 1, case.days, AFTER_DAYS)
            print(_row(f"{name}, periods of 14 days, {seed}", *compare(case, fortnights, period=14)), flush=True)
    early_energy, early_carbon, true = Compared(), Compared(), []
    for seed in range(10 * seeds[0], 10 * seeds[0] + 60):
        energy, carbon, true_pct = compare(FleetDays(days=AFTER_DAYS, seed=seed), range(4, AFTER_DAYS))
        for total, one in ((early_energy, energy), (early_carbon, carbon)):
            total.covered += one.covered
            total.half_widths += one.half_widths
            total.errors += one.errors
        true.append(true_pct)
    print(_row("16 servers, days 5 to 14, 60 seeds", early_energy, early_carbon, float(np.mean(true))))
    print(f"{time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
