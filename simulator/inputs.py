"""From files and options to what the runs share; whatever does not do is named before anything runs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from services.evaluator.grouping import TooFewPromptsError, learn_groups
from services.optimizer.settings import OptimizerSettings
from simulator.draws import QualityDraws, draw_quality, read_draws
from simulator.errors import SimulationInputError
from simulator.grid import Grid, Window, read_grids
from simulator.jobs import Job
from simulator.measured import Floats, Measured, read_measured
from simulator.schemes import Grouping, Study, Variant
from simulator.traffic import constant_mix, read_mix, read_model_preference
from simulator.world import CORRECTNESS, PREFERENCE

PAPER_WINDOWS = (800, 3900, 7000)
"""Hours of the year at which the paper's seasons begin."""

PAPER_HOURS = 720
WITHOUT_BOUND = frozenset({"base", "co2_opt"})
"""Schemes that run once, whatever the list of xi."""

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """What was asked for; see `sprout simulate --help`.

    Attributes:
        windows, hours: none: the paper's where the traces are long enough, else what there is.
        learn: none: half of the requests.
    """

    requests: Path
    carbon: Sequence[Path]
    schemes: Sequence[str]
    xi: Sequence[float]
    learn: Path | None = None
    mix: Path | None = None
    model_preference: Path | None = None
    model: str | None = None
    variant: Variant = "production"
    quality_draws: Path | None = None
    zones: Sequence[str] = ()
    windows: Sequence[int] = ()
    hours: int | None = None
    xi_correctness: float | None = None
    life_cycle: bool = False
    seed: int = 1


def prepare(asked: Inputs, say: Say) -> tuple[Study, list[Job]]:
    """Read everything, and say what is to be run.

    Raises:
        SimulationInputError: something of it does not do.
    """
    say("reading requests and traces")
    grids = read_grids(asked.carbon, column="life-cycle" if asked.life_cycle else "direct", zones=asked.zones)
    windows = _windows(grids, asked)
    measured = read_measured(asked.requests, model=asked.model)
    for note in measured.notes:
        say(f"left out {note}")
    measured, mix = _with_mix(measured, asked.mix, hours=len(windows[0].g_per_kwh))
    learn, measured = _halves(measured, asked)
    preferred = None
    if asked.model_preference is not None:
        preferred = read_model_preference(asked.model_preference, measured.tasks)
    study = Study(
        variant=asked.variant,
        learn=learn,
        measured=measured,
        mix=mix,
        # A holdout is the price of measuring; what is simulated need not be measured.
        optimizer=OptimizerSettings(holdout=0.0),
        large_preferred=preferred,
        draws=_draws(asked, measured, mix, preferred),
        contexts=_contexts(learn, measured, say) if "sprout_context" in asked.schemes else None,
        seed=asked.seed,
    )
    return study, _jobs(asked, windows)


def _with_mix(measured: Measured, path: Path | None, *, hours: int) -> tuple[Measured, Floats]:
    if path is None:
        return measured, constant_mix(measured, hours=hours)
    tasks, mix = read_mix(path, hours=hours)
    return measured.with_tasks(tasks), mix


def _halves(measured: Measured, asked: Inputs) -> tuple[Measured, Measured]:
    """What may be learned from, and what results are measured on."""
    if asked.learn is not None:
        return read_measured(asked.learn, model=measured.model).with_tasks(measured.tasks), measured
    # The published protocol knows no such difference.
    return (measured, measured) if asked.variant == "published" else measured.halves(asked.seed)


def _contexts(learn: Measured, measured: Measured, say: Say) -> Grouping:
    """Groups learned from the judged prompts; each of these lies where a model would put it that had not seen it."""
    judged = learn.taken(learn.judged)
    say(f"learning prompt groups from {len(judged):,} judged prompts")
    try:
        learned = learn_groups(judged.prompts, judged.preferred, judged.energy_kwh, [judged.correct])
    except TooFewPromptsError as error:
        raise SimulationInputError(f"scheme sprout_context: {error}; leave it out of --schemes") from error
    places = np.zeros(len(learn), dtype=np.int64)
    places[learn.judged] = learned.unseen
    return Grouping(learned.groups.names, places, learned.groups.places(measured.prompts))


def _draws(asked: Inputs, measured: Measured, mix: Floats, preferred: Floats | None) -> QualityDraws | None:
    if asked.variant != "published":
        if asked.quality_draws is not None:
            raise SimulationInputError("--quality-draws needs --variant published")
        return None
    if asked.quality_draws is None:
        return draw_quality(measured, mix, preferred, seed=asked.seed)
    return read_draws(asked.quality_draws, hours=len(mix))


def _windows(grids: Sequence[Grid], asked: Inputs) -> list[Window]:
    shortest = min(len(grid.g_per_kwh) for grid in grids)
    starts = asked.windows
    if not starts:
        enough = shortest >= PAPER_WINDOWS[-1] + (asked.hours or PAPER_HOURS)
        starts = PAPER_WINDOWS if enough else (shortest // 3,)
    hours = asked.hours or min(PAPER_HOURS, shortest - max(starts))
    if hours <= 0:
        raise SimulationInputError(f"--windows begins after the end of the shortest trace ({shortest} hours)")
    return [grid.window(start, hours) for grid in grids for start in starts]


def _jobs(asked: Inputs, windows: Sequence[Window]) -> list[Job]:
    if not asked.xi:
        raise SimulationInputError("--xi names no number; give one at least, such as 0.1")
    if wrong := [value for value in asked.xi if not 0.0 <= value <= 1.0]:
        raise SimulationInputError(f"--xi must lie between 0 and 1, got {wrong[0]:g}")
    more = {} if asked.xi_correctness is None else {CORRECTNESS: asked.xi_correctness}
    return [
        Job(scheme, window, {PREFERENCE: xi, **more})
        for window in windows
        for scheme in asked.schemes
        for xi in (asked.xi[:1] if scheme in WITHOUT_BOUND else asked.xi)
    ]
