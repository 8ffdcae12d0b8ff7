"""Runs many simulations on several processes."""

import multiprocessing
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass

from services.optimizer.linear import warm_up
from tools.simulator.grid import Window
from tools.simulator.outcome import Outcome
from tools.simulator.schemes import Study, run, without_texts

ONE_THREAD = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
"""The arrays are small: threads of a linear algebra library would only wait for each other."""


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """One scheme in one window."""

    scheme: str
    window: Window
    xi: Mapping[str, float]


def run_all(study: Study, jobs: Sequence[Job], *, processes: int) -> Iterator[tuple[int, Outcome]]:
    """Outcomes as they come, each with its job's place.

    Raises:
        SimulationInputError: a scheme needs what was not given.
    """
    if processes <= 1:
        warm_up()
        for place, job in enumerate(jobs):
            yield place, run(study, job.scheme, job.window, job.xi)
        return
    # A fresh process reads these before it loads its linear algebra.
    before = {name: os.environ.get(name) for name in ONE_THREAD}
    os.environ.update(ONE_THREAD)
    pool = ProcessPoolExecutor(
        processes,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_prepare,
        initargs=(without_texts(study),),
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


_study: Study | None = None


def _prepare(study: Study) -> None:
    global _study  # noqa: PLW0603 - what every job of this process shares
    warm_up()
    _study = study


def _run(job: Job) -> Outcome:
    if _study is None:
        raise RuntimeError("this process was not prepared")
    return run(_study, job.scheme, job.window, job.xi)
