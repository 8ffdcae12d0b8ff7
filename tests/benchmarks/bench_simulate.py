"""Time of a simulation of the paper's size: `python -m tests.benchmarks.bench_simulate`.

15 windows of 720 hours × 7 schemes on 16,000 synthetic prompts, in two processes. Adds `simulate_15x7_s` to
build/bench.json.
"""

import time
from datetime import UTC, datetime

import numpy as np

from services.evaluator.clusters import learn_groups
from services.optimizer.settings import OptimizerSettings
from tests.benchmarks.results import record
from tools.simulator.grid import Grid
from tools.simulator.jobs import Job, run_all
from tools.simulator.requests import UNJUDGED, Measured
from tools.simulator.schemes import DEFAULT_SCHEMES, Experiment, Fold, Grouping
from tools.simulator.traffic import constant_mix

PROMPTS = 16_000
JUDGED_SHARE = 0.37
HOURS = 720
STARTS = (800, 3_900, 7_000)
ZONES = 5
TASKS = 6
PROCESSES = 2
WORDS = ("which", "of", "these", "planets", "is", "larger", "than", "Earth", "and", "has", "7", "moons")


def synthetic_requests(rng: np.random.Generator) -> Measured:
    """Prompts of six tasks with different preferences."""
    task = rng.integers(0, TASKS, PROMPTS)
    shares = rng.dirichlet((3.0, 3.0, 2.0), TASKS)
    drawn = np.array([rng.choice(3, p=shares[one]) for one in task])
    energy = np.array([8e-4, 2e-4, 1.5e-4]) * rng.gamma(2.0, 0.5, (PROMPTS, 3)) + 1e-6
    return Measured(
        model="synthetic",
        prompts=tuple(f"Task {one}, number {rng.integers(0, 500)}, please?" for one in task),
        tasks=tuple(f"task {one}" for one in range(TASKS)),
        task=task,
        levels=("L0", "L1", "L2"),
        energy_kwh=energy,
        time_s=energy * 1.4e4,
        tokens=energy * 6e5,
        preferred=np.where(rng.random(PROMPTS) < JUDGED_SHARE, drawn, UNJUDGED),
        correct=(rng.random((PROMPTS, 3)) < (0.5, 0.47, 0.44)).astype(float),
        small_kwh=energy[:, 0] * 0.6,
        small_s=energy[:, 0] * 9e3,
    )


def synthetic_grid(rng: np.random.Generator, zone: int) -> Grid:
    """A year of carbon intensities with days and weather."""
    hours = np.arange(8_760)
    weather = np.convolve(rng.normal(0.0, 1.0, 8_760 + 71), np.ones(72) / 8.0, mode="valid")
    values = 260.0 - (40.0 + 20.0 * zone) * np.cos(2 * np.pi * (hours - 3) / 24.0) + 45.0 * weather
    return Grid(f"zone {zone}", datetime(2023, 1, 1, tzinfo=UTC), np.maximum(values, 15.0))


def main() -> None:
    """Print the times."""
    rng = np.random.default_rng(1)
    learn, measured = synthetic_requests(rng).halves(1)
    judged = learn.taken(learn.judged)
    started = time.perf_counter()
    learned = learn_groups(judged.prompts, judged.preferred, judged.energy_kwh, [judged.correct])
    learning_s = time.perf_counter() - started
    places = np.zeros(len(learn), dtype=np.int64)
    places[learn.judged] = learned.leave_one_out
    in_groups = learned.groups.assign_all(measured.prompts)
    contexts = Grouping(learned.groups.names, places, in_groups, learned.families)
    experiment = Experiment(
        variant="production",
        folds=(Fold(learn, measured, contexts),),
        mix=constant_mix(measured, hours=HOURS),
        optimizer=OptimizerSettings(holdout=0.0),
        large_preferred=np.full(TASKS, 0.57),
    )
    windows = [synthetic_grid(rng, zone).window(start, HOURS) for zone in range(ZONES) for start in STARTS]
    jobs = [Job(scheme, window, {"preference": 0.1}) for window in windows for scheme in DEFAULT_SCHEMES]
    started = time.perf_counter()
    done = sum(1 for _ in run_all(experiment, jobs, processes=PROCESSES))
    seconds = time.perf_counter() - started
    print(f"{done} runs of {HOURS} hours on {PROCESSES} processes: {seconds:.1f} s")
    print(f"groups learned from {len(judged):,} prompts: {learning_s:.1f} s, {len(learned.groups.names)} groups")
    for words in (10, 40, 160, 4_000):
        some = [" ".join(f"{word}," for word in rng.choice(WORDS, words)) for _ in range(200)]
        started = time.perf_counter()
        for prompt in some:
            learned.groups.assign(prompt)
        print(f"one prompt of {words:,} words assigned: {1e6 * (time.perf_counter() - started) / len(some):.0f} µs")
    record("simulate_15x7_s", round(seconds, 2))


if __name__ == "__main__":
    main()
