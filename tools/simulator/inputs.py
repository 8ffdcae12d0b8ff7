"""Reads files and options into an experiment; invalid inputs are reported before anything runs."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import ValidationError
from pydantic_settings import SettingsError

from services.evaluator.clusters import TooFewPromptsError, learn_groups
from services.evaluator.opportunity import OpportunityRules
from services.evaluator.opportunity import Variant as TriggerRule
from services.optimizer.settings import OptimizerSettings, Promise
from tools.simulator.grid import Say, Window, read_grids, say_missing_hours, say_missing_past, windows_of
from tools.simulator.jobs import Job
from tools.simulator.matches import read_matches
from tools.simulator.operation import DEFAULT_REQUESTS_PER_HOUR
from tools.simulator.published_case import QualityDraws, draw_quality, read_draws
from tools.simulator.requests import REFERENCE, Floats, Measured, SimulationInputError, read_measured
from tools.simulator.schemes import Experiment, Fold, Grouping, Variant
from tools.simulator.traffic import Part, Traffic, check_shares_by_hour, constant_mix, read_mix, read_model_preference
from tools.simulator.world import CORRECTNESS, PREFERENCE

PROMISES: tuple[Promise, ...] = ("hourly", "period")

WITHOUT_BOUND = frozenset({"base", "co2_opt"})
"""Schemes that run once, whatever the list of xi."""

NOT_BOUND_BY_CORRECTNESS = frozenset({"base", "co2_opt", "model_opt", "oracle"})
WITHOUT_PERIOD = frozenset({"base", "co2_opt", "sprout_sta", "oracle"})
PUBLISHED_LEVELS = 3
"""Number of levels in the published rules and draws."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """The options of `sprout simulate`; see its help.

    Attributes:
        windows, hours: empty or None: those of the paper if the traces are long enough, else what there is.
        learn: None: a part of the requests, chosen by hash.
        folds: number of parts of the requests, each measured by what was learned from the others; None: one half is
            measured by what was learned from the other.
        promise, period_days: what keeps the limits: every hour, or the mean over periods of so many days.
        correctness: judged matches; None: `correct` of the requests.
        task_labels: whether learned groups take the task labels into account.
        trigger: rule that decides when the evaluator runs.
        settled_share: share of the prompts that are evaluated in groups whose decision is settled.
        requests_per_hour: of the traffic; None: 10,000.
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
    correctness: Path | None = None
    promise: Promise = "hourly"
    period_days: int = 30
    life_cycle: bool = False
    task_labels: bool = True
    trigger: TriggerRule = "low_intensity"
    settled_share: float = 0.1
    requests_per_hour: float | None = None
    seed: int = 1


def prepare(inputs: Inputs, say: Say) -> tuple[Experiment, list[Job]]:
    """Read all inputs.

    Returns:
        The experiment, and the jobs to run.

    Raises:
        SimulationInputError: an input is invalid.
    """
    optimizer = _with_promise(_optimizer(), inputs)
    say("reading requests and traces")
    grids = read_grids(inputs.carbon, column="life-cycle" if inputs.life_cycle else "direct", zones=inputs.zones)
    windows = windows_of(grids, inputs.windows, inputs.hours)
    published = inputs.variant == "published"
    say_missing_hours(grids, inputs.schemes, published=published, say=say)
    say_missing_past(windows, inputs.schemes, published=published, trailing_hours=int(optimizer.window_h), say=say)
    traffic = _traffic(inputs, len(windows[0].g_per_kwh), say)
    _check_correctness(traffic, inputs, say)
    _check_promise(inputs, say)
    preferred = None
    if inputs.model_preference is not None:
        preferred = read_model_preference(inputs.model_preference, traffic.parts[0].measured.tasks)
    experiment = Experiment(
        variant=inputs.variant,
        folds=tuple(_fold(part, inputs, say) for part in traffic.parts),
        mix=traffic.mix,
        optimizer=optimizer,
        constant_bounds=frozenset({CORRECTNESS} if inputs.constant_correctness else ()),
        large_preferred=preferred,
        draws=_draws(inputs, traffic.parts[0].measured, traffic.mix, preferred),
        trigger=OpportunityRules(variant=inputs.trigger),
        settled_share=inputs.settled_share,
        requests_per_hour=inputs.requests_per_hour or DEFAULT_REQUESTS_PER_HOUR,
        seed=inputs.seed,
    )
    return experiment, _jobs(inputs, windows)


def _optimizer() -> OptimizerSettings:
    prefix = "SPROUT_OPTIMIZER_"
    try:
        # The holdout is the price of measuring savings in production; a simulation knows them.
        return OptimizerSettings(holdout=0.0)
    except SettingsError as error:
        name = re.search(r'field "(\w+)"', str(error))
        raise SimulationInputError(
            f"{prefix}{name[1].upper() if name else '*'} is not JSON of the expected form; correct it, or unset it"
        ) from error
    except ValidationError as error:
        # Checks of several settings name them in their message.
        wrong = [
            f"{prefix}{str(one['loc'][0]).upper().removeprefix(prefix)}: {one['msg']}" if one["loc"] else one["msg"]
            for one in error.errors(include_url=False, include_context=False, include_input=False)
        ]
        raise SimulationInputError(f"{'; '.join(wrong)}: correct it, or unset it") from error


def _with_promise(optimizer: OptimizerSettings, inputs: Inputs) -> OptimizerSettings:
    floors = optimizer.hourly_floors if inputs.promise == "period" else {}
    return optimizer.model_copy(
        update={"promise": inputs.promise, "period_days": inputs.period_days, "hourly_floors": floors}
    )


def _traffic(inputs: Inputs, hours: int, say: Say) -> Traffic:
    """Prompts to learn from and to measure on, and the traffic of every hour."""
    requests = _read(inputs.requests, inputs.model, inputs, say)
    if inputs.variant == "published" and len(requests.levels) != PUBLISHED_LEVELS:
        raise SimulationInputError(
            f"--variant published needs a model measured at {PUBLISHED_LEVELS} levels; {requests.model!r} was at "
            f"{', '.join(requests.levels)}: name another with --model, or take --variant production"
        )
    if inputs.mix is None:
        mix = constant_mix(requests, hours=hours)
    else:
        tasks, mix = read_mix(inputs.mix, hours=hours)
        requests = requests.with_tasks(tasks)
    return Traffic(tuple(_parts(requests, inputs, say)), mix).checked(say)


def _parts(requests: Measured, inputs: Inputs, say: Say) -> Iterator[Part]:
    """Prompts to measure on, with those to learn from."""
    everything = f"{inputs.requests} has"
    if inputs.folds is not None and (inputs.learn is not None or inputs.variant == "published"):
        raise SimulationInputError(
            "--folds splits --requests into prompts to learn from and to measure on: leave it out with --learn, "
            "and with --variant published, which uses the same prompts for both"
        )
    if inputs.learn is not None:
        if inputs.variant == "published":
            say("--learn is ignored: the published protocol learns from and measures on the same prompts")
        yield Part(_read_learn(inputs.learn, requests, inputs, say), f"{inputs.learn} has", requests, everything)
    elif inputs.variant == "published":
        # The published protocol learns from and measures on the same prompts.
        yield Part(requests, everything, requests, everything)
    elif inputs.folds is None:
        half = f"of {inputs.requests} (--seed {inputs.seed}) has"
        learn, measured = requests.halves(inputs.seed)
        yield Part(learn, f"the half to learn from {half}", measured, f"the half to measure on {half}")
    else:
        for number, (learn, measured) in enumerate(requests.folds(inputs.seed, inputs.folds), 1):
            part = f"part {number} of {inputs.folds} of {inputs.requests} (--seed {inputs.seed}) has"
            yield Part(learn, f"what is left to learn from without {part}", measured, part)


def _read(path: Path, model: str | None, inputs: Inputs, say: Say) -> Measured:
    matches = None if inputs.correctness is None else read_matches(inputs.correctness)
    measured = read_measured(path, model=model, matches=matches)
    for note in measured.notes:
        say(f"left out {note}")
    return measured


def _read_learn(path: Path, requests: Measured, inputs: Inputs, say: Say) -> Measured:
    learn = _read(path, requests.model, inputs, say)
    if learn.levels != requests.levels:
        raise SimulationInputError(
            f"--learn {path} has {requests.model!r} at {', '.join(learn.levels)}, {inputs.requests} at "
            f"{', '.join(requests.levels)}: both need the same levels"
        )
    if "model_opt" in inputs.schemes and requests.small_kwh is not None and learn.small_kwh is None:
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
            f"{both:,} of {len(requests):,} prompts of {inputs.requests} are in --learn {path} too: part of the "
            "results is measured on prompts that were learned from"
        )
    return learn


def _check_correctness(traffic: Traffic, inputs: Inputs, say: Say) -> None:
    """Check that a limit on correctness can be measured; report the schemes that have none."""
    if inputs.constant_correctness and inputs.xi_correctness is None:
        raise SimulationInputError("--constant-correctness needs --xi-correctness: how much may be lost in every hour")
    if inputs.xi_correctness is None or inputs.variant == "published":
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
    if unbound := [name for name in inputs.schemes if name in NOT_BOUND_BY_CORRECTNESS]:
        say(f"--xi-correctness does not bind {', '.join(unbound)}: they have no such bound")


def _check_promise(inputs: Inputs, say: Say) -> None:
    """Check that a promise by period is one of the program's; report the schemes without it."""
    if inputs.promise == "hourly":
        return
    if inputs.variant == "published":
        raise SimulationInputError(
            "--promise period needs --variant production: the published code limits every hour by itself"
        )
    if unbound := [name for name in inputs.schemes if name in WITHOUT_PERIOD]:
        say(f"--promise period does not change {', '.join(unbound)}: they do not solve the program by the hour")


def _fold(part: Part, inputs: Inputs, say: Say) -> Fold:
    contexts = None
    if "sprout_context" in inputs.schemes:
        contexts = _contexts(part.learn, part.measured, say, labels=inputs.task_labels)
    return Fold(part.learn, part.measured, contexts)


def _contexts(learn: Measured, measured: Measured, say: Say, *, labels: bool) -> Grouping:
    """Learn groups from the judged prompts; each of these is assigned by a model trained without it (out of sample)."""
    judged = learn.taken(learn.judged)
    say(f"learning prompt groups from {len(judged):,} judged prompts")
    try:
        learned = learn_groups(
            judged.prompts,
            judged.preferred,
            judged.energy_kwh,
            [judged.correct],
            _task_labels(judged) if labels else (),
        )
    except TooFewPromptsError as error:
        raise SimulationInputError(f"scheme sprout_context: {error}; leave it out of --schemes") from error
    places = np.zeros(len(learn), dtype=np.int64)
    places[learn.judged] = learned.leave_one_out
    assigned = learned.groups.assign_all(measured.prompts, _task_labels(measured) if labels else None)
    return Grouping(learned.groups.names, places, assigned, learned.families)


def _task_labels(measured: Measured) -> list[str]:
    return [measured.tasks[task] for task in measured.task]


def _draws(inputs: Inputs, measured: Measured, mix: Floats, preferred: Floats | None) -> QualityDraws | None:
    if inputs.variant != "published":
        if inputs.quality_draws is not None:
            raise SimulationInputError("--quality-draws needs --variant published")
        return None
    if inputs.quality_draws is None:
        return draw_quality(measured, mix, preferred, seed=inputs.seed)
    check_shares_by_hour(inputs.quality_draws, hours=len(mix))
    return read_draws(inputs.quality_draws, hours=len(mix))


def _jobs(inputs: Inputs, windows: Sequence[Window]) -> list[Job]:
    if not inputs.xi:
        raise SimulationInputError("--xi names no number; give one at least, such as 0.1")
    if wrong := [value for value in inputs.xi if not 0.0 <= value <= 1.0]:
        raise SimulationInputError(f"--xi must lie between 0 and 1, got {wrong[0]:g}")
    more = {} if inputs.xi_correctness is None else {CORRECTNESS: inputs.xi_correctness}
    return [
        Job(scheme, window, {PREFERENCE: xi, **more})
        for window in windows
        for scheme in inputs.schemes
        for xi in (inputs.xi[:1] if scheme in WITHOUT_BOUND else inputs.xi)
    ]
