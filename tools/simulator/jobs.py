"""Runs simulations in several processes."""

import multiprocessing
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass

from services.optimizer.highs import warm_up
from tools.simulator.grid import Window
from tools.simulator.outcome import Outcome
from tools.simulator.schemes import Experiment, run, without_texts

ONE_THREAD = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
"""The arrays are so small that threads of the linear algebra library only wait for each other."""


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """One scheme in one window."""

    scheme: str
    window: Window
    xi: Mapping[str, float]


def run_all(experiment: Experiment, jobs: Sequence[Job], *, processes: int) -> Iterator[tuple[int, Outcome]]:
    """Run all jobs; yields (place of the job, outcome) in the order in which they finish.

    Raises:
        SimulationInputError: an input that a scheme needs is missing.
    """
    if processes <= 1:
        warm_up()
        for place, job in enumerate(jobs):
            yield place, run(experiment, job.scheme, job.window, job.xi)
        return
    # A new process reads these variables when it loads the linear algebra library.
    before = {name: os.environ.get(name) for name in ONE_THREAD}
    os.environ.update(ONE_THREAD)
    pool = ProcessPoolExecutor(
        processes,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_prepare,
        initargs=(without_texts(experiment),),
    )
    try:
        futures = {pool.submit(_run, job): place for place, job in enumerate(jobs)}
        for future in as_completed(futures):
            yield futures[future], future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


_experiment: Experiment | None = None


def _prepare(experiment: Experiment) -> None:
    global _experiment  # noqa: PLW0603 - shared by all jobs of this process
    warm_up()
    _experiment = experiment


def _run(job: Job) -> Outcome:
    if _experiment is None:
        raise RuntimeError("_prepare() must run before the first job of a process")
    return run(_experiment, job.scheme, job.window, job.xi)
