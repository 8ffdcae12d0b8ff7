"""`sprout up`, `sprout down`, `sprout logs`: the local stack in the background."""

import time
from pathlib import Path
from typing import Annotated

import typer
from pydantic import ValidationError

from deploy.local.config import CURVES, MAX_SERVERS, MODELS, StackConfig, event_time, state_dir_from_environment
from deploy.local.grid import default_day, shipped_trace, zone_of
from deploy.local.processes import tail
from deploy.local.state import StateError, stop_stack
from shared.kafka.records import describe
from tools.cli.console import fail, local_state, out, print_text, say

POLL_S = 0.3

Workload = Annotated[
    Path | None,
    typer.Option(metavar="FILE", envvar="WORKLOAD", help="Recorded answers, JSON lines, may be gzipped"),
]
Model = Annotated[str, typer.Option(envvar="MODEL", help=f"Model to serve: {', '.join(MODELS)}")]
Carbon = Annotated[
    Path | None,
    typer.Option(metavar="FILE", envvar="CARBON", help="Download of Electricity Maps; default: the sample trace"),
]
Servers = Annotated[int, typer.Option(min=1, max=MAX_SERVERS, help="Number of model servers, one endpoint each")]
Curve = Annotated[
    str, typer.Option(metavar="NAME", help=f"Power and speed of the stand-ins by batch size: {', '.join(CURVES)}")
]
DispatchOption = Annotated[
    str, typer.Option("--dispatch", help="pack: fill one model server before the next; or spread")
]
TargetBatch = Annotated[
    int | None,
    typer.Option(min=1, help="Requests at once on a model server, for --dispatch pack"),
]
Sleep = Annotated[bool, typer.Option("--sleep", help="Unload the model on servers that are not needed")]
Zone = Annotated[str | None, typer.Option(envvar="ZONE", help="Grid zone; default: the zone of the trace")]


def up(
    *,
    workload: Workload = None,
    model: Model = MODELS[0],
    carbon: Carbon = None,
    zone: Zone = None,
    start: Annotated[
        str | None,
        typer.Option(metavar="TIME", help="Replay from this event time; default with --rate: a week into the trace"),
    ] = None,
    rate: Annotated[
        float | None,
        typer.Option(min=0.001, help="Replay speed, event seconds per second; 720 is a day in two minutes"),
    ] = None,
    routers: Annotated[int, typer.Option(min=1, max=8, help="Number of router processes")] = 1,
    servers: Servers = 1,
    curve: Curve = CURVES[0],
    dispatch: DispatchOption = "spread",
    target_batch: TargetBatch = None,
    sleep: Sleep = False,
) -> None:
    """Start Kafka, PostgreSQL, Triton and all services in the background; they listen on loopback only.

    Missing parts are installed first, below .sprout/. Without --start and --rate the stack runs in real time and the
    trace is repeated; with them it replays the trace. Every start begins with empty topics and tables.
    """
    # Other subcommands must start without loading numpy.
    from deploy.local.model_servers import TritonModels  # noqa: PLC0415
    from deploy.local.stack import STACK_ERRORS, LocalStack  # noqa: PLC0415

    try:
        trace = carbon if carbon is not None else shipped_trace() if zone is None else shipped_trace(zone)
        replay = start is not None or rate is not None
        grid_zone = zone_of(trace, wanted=zone)
        config = StackConfig.model_validate(
            {
                "workload": workload,
                "model": model,
                "zone": grid_zone,
                "carbon": {grid_zone: trace},
                "event_start": (event_time(start) if start else default_day(trace)) if replay else None,
                "rate": rate or 1.0,
                "routers": routers,
                "servers": servers,
                "curve": curve,
                "dispatch": dispatch,
                "target_batch": target_batch,
                "sleep": sleep,
            }
        )
    except ValidationError as error:
        fail(describe(error))
    except ValueError as error:  # an invalid trace or time
        fail(str(error))
    stack = LocalStack(config, TritonModels(), say=say, detached=True)
    try:
        stack.start()
    except STACK_ERRORS as error:
        fail(str(error))
    except KeyboardInterrupt:
        fail("interrupted; every started process was stopped")
    state = stack.state
    out.print(f"Kafka      {state.bootstrap_servers}")
    if (api := state.api) is not None:
        out.print(f"API        {api[0]}, page {api[0].removesuffix('v1')}")
    if servers > 1:
        out.print(f"servers    {servers}, dispatch {dispatch}{', may sleep' if sleep else ''}")
    out.print(f"event time {state.event_clock.now():%Y-%m-%d %H:%M} UTC")
    out.print('try        sprout send "Why is the sky blue?"')
    out.print('or         eval "$(sprout endpoint)", then any OpenAI client')
    out.print("see        sprout status, sprout logs router -f")
    out.print("stop       sprout down")


def down(
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing if no stack is running")] = False,
) -> None:
    """Stop the processes that 'sprout up' started."""
    state = local_state()
    if state is None:
        if not quiet:
            out.print("no local stack is running")
        return
    try:
        stopped = stop_stack(state, say=say)
    except StateError as error:
        fail(str(error))
    out.print(f"stopped {stopped} processes" if stopped else "every process had ended already; cleaned up")


def logs(
    service: Annotated[str | None, typer.Argument(help="Process name, see 'sprout status'; default: all")] = None,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Keep printing new lines")] = False,
    lines: Annotated[int, typer.Option("-n", "--lines", min=0, help="Lines of each log")] = 20,
) -> None:
    """Print the end of the local stack's logs; they are kept after the stack has stopped."""
    folder = state_dir_from_environment() / "logs"
    found = {path.stem: path for path in sorted(folder.glob("*.log"))}
    if not found:
        fail(f"there are no logs in {folder}", remedy="start the stack: sprout up")
    if service is not None and service not in found:
        fail(f"there is no log of {service!r}", remedy=f"there are: {', '.join(found)}")
    chosen = found if service is None else {service: found[service]}
    ends = {}
    for name, path in chosen.items():
        ends[name] = path.stat().st_size
        if lines:
            _print(name, tail(path, lines), labelled=len(chosen) > 1)
    if follow:
        try:
            _follow(chosen, ends)
        except KeyboardInterrupt:
            return


def _follow(files: dict[str, Path], ends: dict[str, int]) -> None:
    """Print what is appended to the files until interrupted; a file that shrank was truncated."""
    while True:
        for name, path in files.items():
            try:
                size = path.stat().st_size
            except FileNotFoundError:
                continue
            if size < ends[name]:
                ends[name] = 0
            if size == ends[name]:
                continue
            with path.open("rb") as file:
                file.seek(ends[name])
                added = file.read(size - ends[name])
            complete = added.rfind(b"\n") + 1  # an incomplete line is printed later
            if complete:
                ends[name] += complete
                _print(name, added[:complete].decode(errors="replace").rstrip("\n"), labelled=len(files) > 1)
        time.sleep(POLL_S)


def _print(name: str, text: str, *, labelled: bool) -> None:
    for line in text.splitlines():
        print_text(f"{name:<12} {line}" if labelled else line)
