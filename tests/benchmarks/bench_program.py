"""Time to build and solve the linear program: `python -m tests.benchmarks.bench_program`.

Medians of repeated runs on synthetic estimates with two quality limits and their safety margins, group floors and a
capacity; by hour, and over a period of ten kinds of later hours. Adds `program_64x12_ms` and
`program_64x12_period_ms` to build/bench.json.
"""

import random
import statistics
import time
from dataclasses import replace

from services.optimizer.highs import warm_up
from services.optimizer.problem import LaterHours, OptionPrice, Problem
from services.optimizer.program import solve
from services.optimizer.promise import BINS
from shared.messages import OptionEstimate
from tests.benchmarks.results import record

SIZES = ((1, 3), (6, 3), (64, 12))
REPEATS = 25
METRICS = ("preference", "correctness")


def synthetic(groups: int, options: int) -> Problem:
    """A problem of this size; always the same."""
    chance = random.Random(1)
    names = [f"pool-{number // 3}/L{number % 3}" for number in range(options)]
    saved = (1.0, 0.4, 0.3)
    return Problem(
        reference=names[0],
        options={
            name: OptionPrice(pool=name.split("/")[0], g_per_kwh=250.0 + 40 * number, embodied_g_per_s=1.7e-4)
            for number, name in enumerate(names)
        },
        weights={f"group-{number}": 1 / groups for number in range(groups)},
        estimates={
            f"group-{number}": {
                name: OptionEstimate(
                    energy_kwh=3e-4 * saved[place % 3] * chance.uniform(0.7, 1.4),
                    processing_s=5.0 * saved[place % 3] * chance.uniform(0.7, 1.4),
                    quality={"preference": chance.uniform(0.2, 0.45), "correctness": chance.uniform(0.2, 0.6)},
                    doubt={} if place == 0 else dict.fromkeys(METRICS, (chance.uniform(0.03, 0.06), 0.02, 0.01)),
                )
                for place, name in enumerate(names)
            }
            for number in range(groups)
        },
        families={f"group-{number}": f"family-{number // 6}" for number in range(groups)},
        confidence_z=dict.fromkeys(METRICS, 1.96),
        bounds={"preference": 0.93, "correctness": 0.97},
        floors={"preference": 0.8},
        capacities={"pool-0": 20.0},
        requests_per_s=2.0,
        holdout=0.05,
        traffic_requests=300.0,
    )


def over_a_period(problem: Problem) -> Problem:
    """The same as a hundredth of a period; the other hours are between 0.4 and 1.75 times as dirty."""
    later = tuple(
        LaterHours(
            share=0.99 / BINS,
            options={
                name: replace(one, g_per_kwh=one.g_per_kwh * (0.4 + 0.15 * number))
                for name, one in problem.options.items()
            },
        )
        for number in range(BINS)
    )
    return replace(problem, later=later)


def median_ms(problem: Problem) -> float:
    """Median time to build and solve the program."""
    times: list[float] = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        solve(problem)
        times.append(time.perf_counter() - started)
    return statistics.median(times) * 1_000


def main() -> None:
    """Print the table."""
    warm_up()
    print("groups x options   median ms   over a period")
    for groups, options in SIZES:
        problem = synthetic(groups, options)
        hourly_ms, period_ms = median_ms(problem), median_ms(over_a_period(problem))
        print(f"{groups:6} x {options:<10} {hourly_ms:8.2f} {period_ms:15.2f}")
        if (groups, options) == SIZES[-1]:
            record("program_64x12_ms", round(hourly_ms, 3))
            record("program_64x12_period_ms", round(period_ms, 3))


if __name__ == "__main__":
    main()
