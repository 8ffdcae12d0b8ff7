"""`sprout demo`: a simulated day through the real services in four minutes, with a report."""

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import typer
from pydantic import ValidationError

from deploy.local.config import MODELS, ModelName, StackConfig, event_time
from deploy.local.grid import SAMPLE_ZONE, default_day, shipped_trace, zone_of
from shared.kafka.records import describe
from tools.cli.console import err, fail, out, quiet_clients, say
from tools.cli.stack import Carbon, Model, Workload, Zone
from tools.demo.day import PACES, DemoDay, Pace, machine_slowdown


def demo(
    *,
    workload: Workload = None,
    model: Model = MODELS[0],
    carbon: Carbon = None,
    zone: Zone = None,
    start: Annotated[
        str | None,
        typer.Option(
            metavar="TIME", envvar="START", help="Event time of the first request, UTC; default: a week into the trace"
        ),
    ] = None,
    hours: Annotated[float, typer.Option(min=0.1, max=168.0, help="Duration of the traffic, event hours")] = 24.0,
    requests: Annotated[
        int | None, typer.Option(min=1, help="Number of requests; default: depends on the model")
    ] = None,
    day_seconds: Annotated[
        float | None,
        typer.Option(
            min=10.0, help="Wall seconds for 24 event hours; default: depends on the model and on this machine's speed"
        ),
    ] = None,
    seed: Annotated[int, typer.Option(envvar="SEED", help="Seed of the random traffic")] = 1,
    dispatch: Annotated[
        Literal["pack", "spread"],
        typer.Option(help="pack: fill one model server before the next is used; spread: use the least busy one"),
    ] = "pack",
    sleep: Annotated[bool, typer.Option(help="Put model servers that are not needed to sleep")] = True,
    small: Annotated[
        bool,
        typer.Option(
            "--small", envvar="SMALL", help="Also serve a smaller variant of the model, on a server of its own"
        ),
    ] = False,
    compare: Annotated[
        bool,
        typer.Option("--compare", envvar="COMPARE", help="Play the same day without Sprout too, for the true saving"),
    ] = False,
    html: Annotated[Path, typer.Option(metavar="FILE", help="Output file for the report page")] = Path(
        "demo-report.html"
    ),
    json_file: Annotated[Path, typer.Option("--json", metavar="FILE", help="Output file for the figures")] = Path(
        "demo-report.json"
    ),
) -> None:
    """Replay a day of traffic on a temporary local stack, report the carbon saved, and stop the stack.

    Exit codes: 0 success, 1 an error or a failed check (named in the output), 2 wrong usage.
    """
    # Other subcommands must start without loading numpy and plotly.
    from deploy.local.model_servers import TritonModels  # noqa: PLC0415
    from deploy.local.stack import STACK_ERRORS  # noqa: PLC0415
    from deploy.triton.models import SHIPPED_WORKLOAD  # noqa: PLC0415
    from deploy.triton.stand_in.workload import WorkloadError  # noqa: PLC0415
    from tools.demo.result import evaluate_demo, fell_behind  # noqa: PLC0415
    from tools.demo.run import run_demo  # noqa: PLC0415
    from tools.reporting import render_html, render_tables  # noqa: PLC0415

    try:
        trace = carbon if carbon is not None else shipped_trace(zone or SAMPLE_ZONE)
        chosen = _model_named(model)
        pace = replace(PACES[chosen], wall_s=day_seconds or _day_seconds(PACES[chosen]))
        day = DemoDay(
            model=chosen,
            zone=zone_of(trace, wanted=zone),
            trace=trace,
            workload=_existing(workload or SHIPPED_WORKLOAD),
            start=event_time(start) if start else default_day(trace),
            hours=hours,
            requests=requests or max(1, round(pace.requests * hours / 24.0)),
            seed=seed,
            pace=pace,
            dispatch=dispatch,
            sleep=sleep and dispatch == "pack",
            small=small,
        )
        config = StackConfig()
    except ValidationError as error:
        fail(describe(error))
    except ValueError as error:  # an invalid trace, time or model
        fail(str(error))
    quiet_clients()
    demo_errors: tuple[type[Exception], ...] = (*STACK_ERRORS, WorkloadError)
    try:
        reference = None
        if compare:
            say("first the day without Sprout: no directives, requests spread over all servers")
            reference = asyncio.run(run_demo(day, config, TritonModels(), world="reference", console=err, say=say))
        run = asyncio.run(run_demo(day, config, TritonModels(), console=err, say=say))
    except demo_errors as error:
        fail(str(error))
    except KeyboardInterrupt:
        fail("interrupted; every started process was stopped")
    result = evaluate_demo(
        planned=day.requests,
        sent=run.sent,
        tally=run.tally,
        report=run.report,
        seconds=run.seconds,
        without_sprout=None if reference is None else reference.report,
    )
    title = f"Sprout: {day.hours:g} hours in {day.zone}, from {day.start:%Y-%m-%d %H:%M} UTC"
    json_file.write_text(json.dumps(result.figures, indent=2) + "\n", encoding="utf-8")
    html.write_text(render_html(run.report, title=title), encoding="utf-8")
    render_tables(run.report, out)
    out.print(f"wrote {html} and {json_file} after {run.seconds:.0f} s")
    if fell_behind(run.report):
        say(
            "this machine could not keep up with the replay: the simulated servers' latencies and the saving on the "
            f"meter are worse than they should be; stop other work, or try `--day-seconds {2 * pace.wall_s:.0f}`"
        )
    if result.problems:
        fail("checks of the demo failed:", remedy="\n".join(f"- {problem}" for problem in result.problems))
    out.print("every request was answered exactly once, and the energy balance is complete", style="green")


def _day_seconds(pace: Pace) -> float:
    slowdown = 1.0 if pace.batched is None else machine_slowdown()
    if slowdown > 1.2:
        say(f"this machine is slow now: the day takes {pace.wall_s * slowdown:.0f} s instead of {pace.wall_s:.0f}")
        return pace.wall_s * slowdown
    return pace.wall_s


def _existing(workload: Path) -> Path:
    if not workload.is_file():
        raise ValueError(f"there is no file {workload}; give --workload a file of JSON lines, may be gzipped")
    return workload


def _model_named(name: str) -> ModelName:
    for known in MODELS:
        if name == known:
            return known
    raise ValueError(f"there is no local model {name!r}; choose one of {', '.join(MODELS)}")
