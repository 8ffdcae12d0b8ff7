"""`sprout demo`: a day of grid and traffic through the real services in two minutes, and what it saved."""

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from pydantic import ValidationError

from deploy.demo.day import PACES, DemoDay
from deploy.demo.outcome import outcome_of
from deploy.demo.run import run_demo, stack_config
from deploy.local.config import StackConfig, event_time
from deploy.local.errors import LOCAL_ERRORS
from deploy.local.fleet import MODELS, ModelName
from deploy.local.grid import SAMPLE_ZONE, default_day, shipped_trace, zone_of
from deploy.local.model_servers import TritonModels
from deploy.triton.models import SHIPPED_WORKLOAD
from deploy.triton.stand_in.workload import WorkloadError
from shared.kafka.dead_letters import describe
from tools.cli.console import err, fail, out, quiet_clients, say
from tools.reporting import render_html, render_tables

DEMO_ERRORS: tuple[type[Exception], ...] = (*LOCAL_ERRORS, WorkloadError)


def demo(
    *,
    workload: Annotated[
        Path | None,
        typer.Option(metavar="FILE", envvar="WORKLOAD", help="JSON lines of prompts and answers, may be gzipped"),
    ] = None,
    model: Annotated[str, typer.Option(envvar="MODEL", help=f"What is served: {', '.join(MODELS)}")] = MODELS[0],
    carbon: Annotated[
        Path | None,
        typer.Option(metavar="FILE", envvar="CARBON", help="Download of Electricity Maps; default: the sample trace"),
    ] = None,
    zone: Annotated[str | None, typer.Option(envvar="ZONE", help="Default: the zone of the trace")] = None,
    start: Annotated[
        str | None,
        typer.Option(metavar="TIME", envvar="START", help="Event time, UTC; default: a week into the trace"),
    ] = None,
    hours: Annotated[float, typer.Option(min=0.1, max=168.0, help="Event hours of traffic")] = 24.0,
    requests: Annotated[int | None, typer.Option(min=1, help="Default: as many as suit the model")] = None,
    day_seconds: Annotated[
        float | None, typer.Option(min=10.0, help="Wall seconds that 24 event hours take; default: suits the model")
    ] = None,
    seed: Annotated[int, typer.Option(help="Another seed, another day of traffic")] = 1,
    html: Annotated[Path, typer.Option(metavar="FILE", help="Where the page with plots goes")] = Path(
        "demo-report.html"
    ),
    json_file: Annotated[Path, typer.Option("--json", metavar="FILE", help="Where the figures go")] = Path(
        "demo-report.json"
    ),
) -> None:
    """Play a day through a local stack of its own, print and write what was saved, stop everything.

    Exit codes: 0 all is well, 1 something failed or a figure does not hold (it says which), 2 wrong usage.
    """
    try:
        trace = carbon if carbon is not None else shipped_trace(zone or SAMPLE_ZONE)
        chosen = _model_named(model)
        pace = PACES[chosen] if day_seconds is None else replace(PACES[chosen], wall_s=day_seconds)
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
        )
        config = stack_config(day, StackConfig())
    except ValidationError as error:
        fail(describe(error))
    except ValueError as error:  # a trace's, a time's, the environment's
        fail(str(error))
    quiet_clients()
    try:
        run = asyncio.run(run_demo(day, config, TritonModels(), console=err, say=say))
    except DEMO_ERRORS as error:
        fail(str(error))
    except KeyboardInterrupt:
        fail("interrupted; everything that was started has been stopped")
    outcome = outcome_of(
        planned=day.requests,
        sent=run.sent,
        tally=run.tally,
        report=run.report,
        broker=run.broker,
        seconds=run.seconds,
    )
    title = f"Sprout: {day.hours:g} hours on {day.zone}, from {day.start:%Y-%m-%d %H:%M} UTC"
    json_file.write_text(json.dumps(outcome.figures, indent=2) + "\n", encoding="utf-8")
    html.write_text(render_html(run.report, title=title), encoding="utf-8")
    render_tables(run.report, out)
    out.print(f"wrote {html} and {json_file} after {run.seconds:.0f} s")
    if outcome.problems:
        fail("the demo did not hold:", remedy="\n".join(f"- {problem}" for problem in outcome.problems))
    out.print("every request answered once, every joule accounted for", style="green")


def _existing(workload: Path) -> Path:
    if not workload.is_file():
        raise ValueError(f"there is no file {workload}; give --workload a file of JSON lines, may be gzipped")
    return workload


def _model_named(name: str) -> ModelName:
    for known in MODELS:
        if name == known:
            return known
    raise ValueError(f"there is no local model {name!r}; there are {', '.join(MODELS)}")
