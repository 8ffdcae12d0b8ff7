"""From files and options to what the runs share; whatever does not do is named before anything runs."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import ValidationError
from pydantic_settings import SettingsError

from services.evaluator.clusters import TooFewPromptsError, learn_groups
from services.optimizer.settings import OptimizerSettings
from tools.simulator.draws import QualityDraws, draw_quality, read_draws
from tools.simulator.errors import SimulationInputError
from tools.simulator.grid import Window, read_grids
from tools.simulator.jobs import Job
from tools.simulator.measured import REFERENCE, Floats, Measured, read_measured
from tools.simulator.schemes import Fold, Grouping, Study, Variant
from tools.simulator.traffic import Part, Traffic, check_shares_by_hour, constant_mix, read_mix, read_model_preference
from tools.simulator.windows import Say, say_missing_hours, say_missing_past, windows_of
from tools.simulator.world import CORRECTNESS, PREFERENCE

WITHOUT_BOUND = frozenset({"base", "co2_opt"})
"""Schemes that run once, whatever the list of xi."""

NOT_BOUND_BY_CORRECTNESS = frozenset({"base", "co2_opt", "model_opt", "oracle"})
PUBLISHED_LEVELS = 3
"""The published rules and draws are written for so many."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """What was asked for; see `sprout simulate --help`.

    Attributes:
        windows, hours: none: the paper's where the traces are long enough, else what there is.
        learn: none: a part of the requests, by their hash.
        folds: so many parts of the requests, each measured by what was learned from the others; none: one half is
            measured by what was learned from the other.
    """

    requests: Path
    carbon: Sequence[Path]
    schemes: Sequence[str]
    xi: Sequence[float]
    learn: Path | None = None
    folds: int | None = None
    mix: Path | None = None
    model_preference: Path | None = None
    model: str | None = None
    variant: Variant = "production"
    quality_draws: Path | None = None
    zones: Sequence[str] = ()
    windows: Sequence[int] = ()
    hours: int | None = None
    xi_correctness: float | None = None
    constant_correctness: bool = False
    life_cycle: bool = False
    seed: int = 1


def prepare(asked: Inputs, say: Say) -> tuple[Study, list[Job]]:
    """Read everything, and say what is to be run.

    Raises:
        SimulationInputError: something of it does not do.
    """
    optimizer = _optimizer()
    say("reading requests and traces")
    grids = read_grids(asked.carbon, column="life-cycle" if asked.life_cycle else "direct", zones=asked.zones)
    windows = windows_of(grids, asked.windows, asked.hours)
    published = asked.variant == "published"
    say_missing_hours(grids, asked.schemes, published=published, say=say)
    say_missing_past(windows, asked.schemes, published=published, trailing_hours=int(optimizer.window_h), say=say)
    traffic = _traffic(asked, len(windows[0].g_per_kwh), say)
    _check_correctness(traffic, asked, say)
    preferred = None
    if asked.model_preference is not None:
        preferred = read_model_preference(asked.model_preference, traffic.parts[0].measured.tasks)
    study = Study(
        variant=asked.variant,
        folds=tuple(_fold(part, asked, say) for part in traffic.parts),
        mix=traffic.mix,
        optimizer=optimizer,
        constant_bounds=frozenset({CORRECTNESS} if asked.constant_correctness else ()),
        large_preferred=preferred,
        draws=_draws(asked, traffic.parts[0].measured, traffic.mix, preferred),
        seed=asked.seed,
    )
    return study, _jobs(asked, windows)


def _optimizer() -> OptimizerSettings:
    prefix = "SPROUT_OPTIMIZER_"
    try:
        # A holdout is the price of measuring; what is simulated need not be measured.
        return OptimizerSettings(holdout=0.0)
    except SettingsError as error:
        name = re.search(r'field "(\w+)"', str(error))
        raise SimulationInputError(
            f"{prefix}{name[1].upper() if name else '*'} is no JSON of the form that is needed; correct it, or unset it"
        ) from error
    except ValidationError as error:
        # A check of several settings together names them itself.
        wrong = [
            f"{prefix + str(one['loc'][0]).upper()}: {one['msg']}" if one["loc"] else one["msg"]
            for one in error.errors(include_url=False, include_context=False, include_input=False)
        ]
        raise SimulationInputError(f"{'; '.join(wrong)}: correct it, or unset it") from error


def _traffic(asked: Inputs, hours: int, say: Say) -> Traffic:
    """Prompts to learn from and to measure on, and what is asked in every hour."""
    requests = _read(asked.requests, asked.model, say)
    if asked.variant == "published" and len(requests.levels) != PUBLISHED_LEVELS:
        raise SimulationInputError(
            f"--variant published needs a model measured at {PUBLISHED_LEVELS} levels; {requests.model!r} was at "
            f"{', '.join(requests.levels)}: name another with --model, or take --variant production"
        )
    if asked.mix is None:
        mix = constant_mix(requests, hours=hours)
    else:
        tasks, mix = read_mix(asked.mix, hours=hours)
        requests = requests.with_tasks(tasks)
    return Traffic(tuple(_parts(requests, asked, say)), mix).checked(say)


def _parts(requests: Measured, asked: Inputs, say: Say) -> Iterator[Part]:
    """What is measured on, with what may be learned from."""
    everything = f"{asked.requests} has"
    if asked.folds is not None and (asked.learn is not None or asked.variant == "published"):
        raise SimulationInputError(
            "--folds splits --requests into what is learned from and what is measured on: leave it out with --learn, "
            "and with --variant published, which measures on what it learns from"
        )
    if asked.learn is not None:
        if asked.variant == "published":
            say("--learn is not made use of: the published protocol measures on what it learns from")
        yield Part(_read_learn(asked.learn, requests, asked, say), f"{asked.learn} has", requests, everything)
    elif asked.variant == "published":
        # The published protocol measures on what it learns from.
        yield Part(requests, everything, requests, everything)
    elif asked.folds is None:
        half = f"of {asked.requests} (--seed {asked.seed}) has"
        learn, measured = requests.halves(asked.seed)
        yield Part(learn, f"the half to learn from {half}", measured, f"the half to measure on {half}")
    else:
        for number, (learn, measured) in enumerate(requests.folds(asked.seed, asked.folds), 1):
            part = f"part {number} of {asked.folds} of {asked.requests} (--seed {asked.seed}) has"
            yield Part(learn, f"what is left to learn from without {part}", measured, part)


def _read(path: Path, model: str | None, say: Say) -> Measured:
    measured = read_measured(path, model=model)
    for note in measured.notes:
        say(f"left out {note}")
    return measured


def _read_learn(path: Path, requests: Measured, asked: Inputs, say: Say) -> Measured:
    learn = _read(path, requests.model, say)
    if learn.levels != requests.levels:
        raise SimulationInputError(
            f"--learn {path} has {requests.model!r} at {', '.join(learn.levels)}, {asked.requests} at "
            f"{', '.join(requests.levels)}: both need the same levels"
        )
    if "model_opt" in asked.schemes and requests.small_kwh is not None and learn.small_kwh is None:
        raise SimulationInputError(
            f"--learn {path} lacks the second model that scheme model_opt needs, at {REFERENCE} on every prompt; "
            "measure it, or leave model_opt out of --schemes"
        )
    try:
        learn = learn.with_tasks(requests.tasks)
    except SimulationInputError as error:
        raise SimulationInputError(
            f"--learn {path}: {error}; leave them out, or give prompts of these tasks"
        ) from error
    known = set(learn.prompts)
    if both := sum(prompt in known for prompt in requests.prompts):
        say(
            f"{both:,} of {len(requests):,} prompts of {asked.requests} are in --learn {path} too: results are not on "
            "fresh prompts alone"
        )
    return learn


def _check_correctness(traffic: Traffic, asked: Inputs, say: Say) -> None:
    """Whether a bound of correctness can be kept, and which schemes know none."""
    if asked.constant_correctness and asked.xi_correctness is None:
        raise SimulationInputError("--constant-correctness needs --xi-correctness: how much may be lost in every hour")
    if asked.xi_correctness is None or asked.variant == "published":
        return
    needed = [
        one
        for part in traffic.parts
        for one in (
            (part.measured_name, part.measured.checkable, "prompt"),
            (part.learn_name, part.learn.checkable & part.learn.judged, "judged prompt"),
        )
    ]
    for name, rows, kind in needed:
        if not rows.any():
            raise SimulationInputError(
                f"--xi-correctness: {name} no {kind} with 'correct' at every level: it cannot be checked; give it, "
                "or leave --xi-correctness out"
            )
    if unbound := [name for name in asked.schemes if name in NOT_BOUND_BY_CORRECTNESS]:
        say(f"--xi-correctness does not bind {', '.join(unbound)}: they have no such bound")


def _fold(part: Part, asked: Inputs, say: Say) -> Fold:
    contexts = _contexts(part.learn, part.measured, say) if "sprout_context" in asked.schemes else None
    return Fold(part.learn, part.measured, contexts)


def _contexts(learn: Measured, measured: Measured, say: Say) -> Grouping:
    """Groups learned from the judged prompts; each of these lies where a model would put it that had not seen it."""
    judged = learn.taken(learn.judged)
    say(f"learning prompt groups from {len(judged):,} judged prompts")
    try:
        learned = learn_groups(judged.prompts, judged.preferred, judged.energy_kwh, [judged.correct])
    except TooFewPromptsError as error:
        raise SimulationInputError(f"scheme sprout_context: {error}; leave it out of --schemes") from error
    places = np.zeros(len(learn), dtype=np.int64)
    places[learn.judged] = learned.leave_one_out
    return Grouping(learned.groups.names, places, learned.groups.assign_all(measured.prompts), learned.families)


def _draws(asked: Inputs, measured: Measured, mix: Floats, preferred: Floats | None) -> QualityDraws | None:
    if asked.variant != "published":
        if asked.quality_draws is not None:
            raise SimulationInputError("--quality-draws needs --variant published")
        return None
    if asked.quality_draws is None:
        return draw_quality(measured, mix, preferred, seed=asked.seed)
    check_shares_by_hour(asked.quality_draws, hours=len(mix))
    return read_draws(asked.quality_draws, hours=len(mix))


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
