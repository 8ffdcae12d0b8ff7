"""`sprout simulate`: carbon savings on recorded traffic and carbon intensities, scheme by scheme."""

import json
import os
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar, cast, get_args

import typer
from pydantic import ValidationError
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from deploy.local.grid import shipped_trace
from shared.kafka.records import describe
from tools.cli.console import err, fail, needs_extra, out, say

# The functions import the simulator: other subcommands must start without loading the solver and scikit-learn.
if TYPE_CHECKING:
    from services.evaluator.opportunity import Variant as TriggerRule
    from tools.simulator.jobs import Job
    from tools.simulator.outcome import Outcome
    from tools.simulator.schemes import Experiment, Variant
    from tools.simulator.what_if import Plan

SCHEME_NAMES = "base, co2_opt, model_opt, sprout_sta, sprout, sprout_task, sprout_context, oracle"
"""For the help; those of `tools.simulator.schemes.SCHEMES`."""

Number = TypeVar("Number", int, float)
Choice = TypeVar("Choice", bound=str)


def simulate(
    *,
    requests: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Measured requests, JSON lines; default: the small file that is shipped"),
    ] = None,
    learn: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Requests to learn from; default: half of --requests, chosen by a hash"),
    ] = None,
    folds: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="Cross-validation: split --requests into this many parts and measure each by what was learned from "
            "the others; default: learn from one half and measure on the other",
        ),
    ] = None,
    carbon: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="PATH", help="Hourly carbon traces, files or folders, repeatable; default: the synthetic sample"
        ),
    ] = None,
    mix: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Traffic shares of the tasks by hour; default: as in --requests")
    ] = None,
    model_preference: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="How often the larger model is preferred, by task (for model_opt)"),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Model whose levels are simulated; default: the one measured at most levels")
    ] = None,
    variant: Annotated[
        str, typer.Option(help="production, or published: the protocol of the paper's published code")
    ] = "production",
    quality_draws: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The published code's own quality draws by hour (--variant published)"),
    ] = None,
    zones: Annotated[str, typer.Option(metavar="Z,...", help="Grid zones; default: every zone found")] = "",
    windows: Annotated[
        str,
        typer.Option(metavar="HOUR,...", help="Start of each window, hours into the trace; default: 800,3900,7000"),
    ] = "",
    hours: Annotated[
        int | None, typer.Option(min=24, help="Length of a window; default: 720, or what the trace has")
    ] = None,
    schemes: Annotated[str, typer.Option(metavar="NAME,...", help=f"Of {SCHEME_NAMES}; default: all")] = "",
    xi: Annotated[str, typer.Option(metavar="X,...", help="Maximum relative loss of preference")] = "0.1",
    xi_correctness: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="Maximum relative loss of correctness; default: no limit")
    ] = None,
    constant_correctness: Annotated[
        bool,
        typer.Option(
            "--constant-correctness",
            help="Tolerate --xi-correctness in every hour, not only at the highest carbon intensity",
        ),
    ] = False,
    correctness: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Judged matches (CSV: task, option, prompt, match) as correctness; default: 'correct' in --requests",
        ),
    ] = None,
    promise: Annotated[
        str, typer.Option(metavar="P", help="hourly: every hour keeps the limits; period: the mean over a period")
    ] = "hourly",
    period_days: Annotated[
        int, typer.Option(min=1, max=92, help="Length of the periods, which start with the window")
    ] = 30,
    life_cycle: Annotated[
        bool, typer.Option("--life-cycle", help="Use life-cycle instead of direct intensities")
    ] = False,
    task_labels: Annotated[
        bool,
        typer.Option(
            "--task-labels/--no-task-labels",
            help="Whether producers send task labels, which learned groups take into account",
        ),
    ] = True,
    trigger: Annotated[
        str,
        typer.Option(
            metavar="RULE",
            help="When the evaluator runs: low_intensity, or the paper's urgency or published (--variant production)",
        ),
    ] = "low_intensity",
    settled_share: Annotated[
        float,
        typer.Option(
            metavar="S", help="Share of the prompts that are judged in groups whose decision is settled; 1: all"
        ),
    ] = 0.1,
    fleet: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE", help="Servers with batch curves, repeatable: shows what their meters would show (what-if)"
        ),
    ] = None,
    dispatch: Annotated[
        str, typer.Option(metavar="D,...", help="With --fleet: spread requests over all servers, or pack them on few")
    ] = "spread,pack",
    sleep: Annotated[
        bool | None,
        typer.Option("--sleep/--no-sleep", help="With --fleet: servers that packing leaves empty sleep; default: both"),
    ] = None,
    latency_objective: Annotated[
        float | None, typer.Option(metavar="MS", help="With --fleet: most milliseconds per output token when packed")
    ] = None,
    target_batch: Annotated[
        int | None,
        typer.Option(min=1, help="With --fleet: requests at once to which packing fills a server; default: 128"),
    ] = None,
    requests_per_hour: Annotated[
        float | None,
        typer.Option(
            help="Mean number of requests, for the evaluator's share; default: 10000. With --fleet also the servers' "
            "load; default: that of --load, else see --peak-batch"
        ),
    ] = None,
    peak_batch: Annotated[
        int | None,
        typer.Option(min=1, help="With --fleet: as many requests as fill the servers so far at the peak; default: 64"),
    ] = None,
    load: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="With --fleet: requests by hour of a day or of the window; default: a daily cycle"
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the split and of the evaluator's draws")] = 1,
    jobs: Annotated[int, typer.Option(min=1, help="Number of processes")] = os.cpu_count() or 1,
    out_dir: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="Folder for summary.json and report.html")
    ] = Path("simulation"),
) -> None:
    """Replay measured requests on recorded carbon intensities with the services' decision code; write a report.

    Exit codes: 0 done, 1 an input is invalid (the message says which), 2 wrong usage.
    """
    with needs_extra("optimizer", "evaluator"):
        from deploy.triton.models import SHIPPED_WORKLOAD  # noqa: PLC0415
        from tools.simulator.inputs import PROMISES, Inputs, prepare  # noqa: PLC0415
        from tools.simulator.report import print_summary, render_page  # noqa: PLC0415
        from tools.simulator.requests import SimulationInputError  # noqa: PLC0415
        from tools.simulator.schemes import VARIANTS  # noqa: PLC0415
        from tools.simulator.what_if import simulate_fleets  # noqa: PLC0415

    protocol = _one_of(VARIANTS, variant, "--variant")
    summary, page = out_dir / "summary.json", out_dir / "report.html"
    _check_writable(out_dir, summary, page)
    try:
        inputs = Inputs(
            requests=requests or SHIPPED_WORKLOAD,
            carbon=tuple(carbon or (shipped_trace(),)),
            schemes=_schemes(schemes, protocol, models_compared=model_preference is not None),
            xi=_numbers(xi, float, "--xi"),
            learn=learn,
            folds=folds,
            mix=mix,
            model_preference=model_preference,
            model=model,
            variant=protocol,
            quality_draws=quality_draws,
            zones=tuple(zone.strip() for zone in zones.split(",") if zone.strip()),
            windows=_numbers(windows, int, "--windows"),
            hours=hours,
            xi_correctness=xi_correctness,
            constant_correctness=constant_correctness,
            correctness=correctness,
            promise=_one_of(PROMISES, promise, "--promise"),
            period_days=period_days,
            life_cycle=life_cycle,
            task_labels=task_labels,
            trigger=_trigger(trigger),
            settled_share=_share(settled_share),
            requests_per_hour=requests_per_hour,
            seed=seed,
        )
        plan = _plan(
            fleet or (),
            dispatch=dispatch,
            sleep=sleep,
            tpot_objective_ms=latency_objective,
            target_batch=target_batch,
            requests_per_hour=requests_per_hour,
            peak_batch=peak_batch,
            load=load,
            seed=seed,
        )
        experiment, todo = prepare(inputs, say)
        outcomes = _run(experiment, todo, processes=jobs)
        grids = {job.window.zone: job.window.grid for job in todo}
        fleets = [
            simulate_fleets(outcome, job.window, plan, grids)
            for outcome, job in zip(outcomes, todo, strict=True)
            if plan is not None
        ]
        if unknown := sorted({one.scheme for one, found in zip(outcomes, fleets, strict=False) if not found}):
            say(f"no fleet figures of {', '.join(unknown)}: the tokens of its answers are not known")
    except SimulationInputError as error:
        fail(str(error))
    except ValidationError as error:
        fail(describe(error))
    except KeyboardInterrupt:
        fail("interrupted; nothing was written")
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        figures = [one.summary() for one in outcomes]
        for run, outcome in zip(figures, outcomes, strict=True):
            known = outcome.correctness is not None
            run["correctness_source"] = ("string" if correctness is None else "judged") if known else None
        for run, found in zip(figures, fleets, strict=False):
            run["fleets"] = [one.summary() for one in found]
        summary.write_text(json.dumps(figures, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        page.write_text(render_page(outcomes, fleets), encoding="utf-8")
    except OSError as error:
        fail(f"--out {out_dir} cannot be written: {error}")
    print_summary(outcomes, out, fleets)
    out.print(f"wrote {summary} and {page}")


def _plan(
    files: Sequence[Path],
    *,
    dispatch: str,
    sleep: bool | None,
    tpot_objective_ms: float | None,
    target_batch: int | None,
    requests_per_hour: float | None,
    peak_batch: int | None,
    load: Path | None,
    seed: int,
) -> "Plan | None":
    """What is simulated on fleets; None without a fleet."""
    from tools.simulator.fleet import load_server_fleet  # noqa: PLC0415
    from tools.simulator.requests import SimulationInputError  # noqa: PLC0415
    from tools.simulator.what_if import Plan, dispatches_of, read_load  # noqa: PLC0415

    options = {
        "--sleep": sleep,
        "--latency-objective": tpot_objective_ms,
        "--target-batch": target_batch,
        "--peak-batch": peak_batch,
        "--load": load,
    }
    for name, value in (("--latency-objective", tpot_objective_ms), ("--requests-per-hour", requests_per_hour)):
        if value is not None and not 0.0 < value < float("inf"):
            raise SimulationInputError(f"{name} must be greater than 0, got {value:g}")
    if not files:
        if unused := [name for name, value in options.items() if value is not None]:
            raise SimulationInputError(f"{unused[0]} needs --fleet: the servers to simulate")
        return None
    return Plan(
        fleets=tuple(load_server_fleet(file) for file in files),
        dispatches=dispatches_of(dispatch),
        sleep=sleep,
        target_batch=target_batch,
        tpot_objective_ms=tpot_objective_ms,
        load=None if load is None else read_load(load),
        requests_per_hour=requests_per_hour,
        peak_batch=peak_batch,
        seed=seed,
    )


def _check_writable(folder: Path, *files: Path) -> None:
    """Exit with an error if the files cannot be written; leave nothing behind."""
    try:
        made = [path for path in (folder, *folder.parents) if not path.exists()]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
            for file in files:
                if file.exists():
                    with file.open("ab"):
                        pass
        finally:
            for path in made:
                with suppress(OSError):
                    path.rmdir()
    except FileExistsError:
        fail(f"--out {folder} is a file; name a folder, which need not exist")
    except OSError as error:
        fail(f"--out {folder} cannot be written: {error}; name another folder")


def _run(experiment: "Experiment", todo: "list[Job]", *, processes: int) -> "list[Outcome]":
    from tools.simulator.jobs import run_all  # noqa: PLC0415

    found: dict[int, Outcome] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=err, transient=not err.is_terminal) as progress:
        task = progress.add_task("simulating", total=len(todo))
        for place, outcome in run_all(experiment, todo, processes=min(processes, len(todo))):
            found[place] = outcome
            progress.update(task, advance=1, description=f"{outcome.zone} {outcome.scheme}")
        progress.update(task, description="simulated")
    return [found[place] for place in range(len(todo))]


def _schemes(text: str, variant: "Variant", *, models_compared: bool) -> tuple[str, ...]:
    """The schemes named; by default those whose inputs were given."""
    from tools.simulator.published import SCHEMES as PUBLISHED  # noqa: PLC0415
    from tools.simulator.schemes import DEFAULT_SCHEMES, names_of  # noqa: PLC0415

    if text:
        return tuple(names_of(text))
    names = tuple(PUBLISHED if variant == "published" else DEFAULT_SCHEMES)
    if models_compared:
        return names
    say("scheme model_opt is left out: it needs --model-preference")
    return tuple(name for name in names if name != "model_opt")


def _one_of(known: Sequence[Choice], text: str, option: str) -> Choice:
    for one in known:
        if text == one:
            return one
    return fail(f"{option} must be {' or '.join(known)}, got {text!r}")


def _share(value: float) -> float:
    if not 0.0 < value <= 1.0:
        fail(f"--settled-share must be larger than 0 and at most 1, got {value:g}")
    return value


def _trigger(text: str) -> "TriggerRule":
    from services.evaluator.opportunity import Variant as TriggerRule  # noqa: PLC0415

    for known in get_args(TriggerRule):
        if text == known:
            return cast("TriggerRule", known)
    return fail(f"--trigger must be {', '.join(get_args(TriggerRule))}, got {text!r}")


def _numbers(text: str, kind: Callable[[str], Number], option: str) -> tuple[Number, ...]:
    try:
        return tuple(kind(part) for part in text.split(",") if part.strip())
    except ValueError:
        fail(f"{option} must be numbers separated by commas, got {text!r}")
