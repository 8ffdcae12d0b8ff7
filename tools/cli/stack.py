"""`sprout up` and `sprout down`: the local stack, left running in the background."""

from pathlib import Path
from typing import Annotated

import typer
from pydantic import ValidationError

from deploy.local.config import StackConfig, event_time
from deploy.local.errors import LOCAL_ERRORS
from deploy.local.fleet import MODELS
from deploy.local.grid import default_day, shipped_trace, zone_of
from deploy.local.model_servers import TritonModels
from deploy.local.running import stop_stack
from deploy.local.stack import LocalStack
from deploy.local.state import StateError
from shared.kafka.dead_letters import describe
from tools.cli.console import Exit, fail, out, say
from tools.cli.target import local_state


def up(
    *,
    workload: Annotated[
        Path | None,
        typer.Option(metavar="FILE", envvar="WORKLOAD", help="JSON lines of prompts and answers"),
    ] = None,
    model: Annotated[str, typer.Option(envvar="MODEL", help=f"What is served: {', '.join(MODELS)}")] = MODELS[0],
    carbon: Annotated[
        Path | None,
        typer.Option(metavar="FILE", envvar="CARBON", help="Download of Electricity Maps; default: the sample trace"),
    ] = None,
    zone: Annotated[str | None, typer.Option(envvar="ZONE", help="Grid zone; default: the trace's")] = None,
    start: Annotated[
        str | None,
        typer.Option(metavar="TIME", help="Replay from this event time; with --rate alone: a week into the trace"),
    ] = None,
    rate: Annotated[
        float | None,
        typer.Option(min=0.001, help="Replay so fast: event seconds per second; 720 is a day in two minutes"),
    ] = None,
    routers: Annotated[int, typer.Option(min=1, max=8, help="How many routers share the requests")] = 1,
) -> None:
    """Start Kafka, PostgreSQL, Triton and every service, and leave them running; nothing listens beyond loopback.

    What is missing is installed first, below .sprout/. The stack lives in real time, with the trace played over and
    over; --start or --rate make it a replay. Every start begins with empty topics and tables.
    """
    try:
        trace = carbon if carbon is not None else shipped_trace() if zone is None else shipped_trace(zone)
        replayed = start is not None or rate is not None
        grid_zone = zone_of(trace, wanted=zone)
        config = StackConfig.model_validate(
            {
                "workload": workload,
                "model": model,
                "zone": grid_zone,
                "carbon": {grid_zone: trace},
                "event_start": (event_time(start) if start else default_day(trace)) if replayed else None,
                "rate": rate or 1.0,
                "routers": routers,
            }
        )
    except ValidationError as error:
        fail(describe(error))
    except ValueError as error:  # a trace's, a time's, or the environment's
        fail(str(error))
    stack = LocalStack(config, TritonModels(), say=say, detached=True)
    try:
        stack.start()
    except LOCAL_ERRORS as error:
        fail(str(error))
    except KeyboardInterrupt:
        fail("interrupted; everything that was started has been stopped")
    state = stack.state
    out.print(f"Kafka      {state.bootstrap_servers}" + ("" if state.broker == "kafka" else "  (IN-MEMORY, not Kafka)"))
    out.print(f"event time {state.event_clock.now():%Y-%m-%d %H:%M} UTC")
    out.print('try        sprout send "Why is the sky blue?"')
    out.print("see        sprout status, sprout logs router -f")
    out.print("stop       sprout down")


def down(
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing where nothing runs")] = False,
) -> None:
    """Stop everything that 'sprout up' started; only processes that are still the recorded ones are touched."""
    state = local_state()
    if state is None:
        if not quiet:
            out.print("no local stack is running")
        return
    try:
        stopped = stop_stack(state, say=say)
    except StateError as error:
        fail(str(error), code=Exit.FAILED)
    out.print(f"stopped {stopped} processes" if stopped else "nothing was running any more; cleared up")
