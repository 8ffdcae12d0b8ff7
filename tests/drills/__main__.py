"""`python -m drills`: plays fault drills, prints what they show, exits with 1 if anything was lost or doubled."""

import asyncio
import json
import logging
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from deploy.local.errors import LOCAL_ERRORS
from deploy.local.interruption import signals_as_exit
from tests.drills.play import play
from tests.drills.result import remarks, table
from tests.drills.scenarios import SCENARIOS

PLAIN_WIDTH = 160


def drill(
    *,
    seed: Annotated[int, typer.Option(help="Another seed, other moments, victims and lengths of the faults")] = 1,
    scenario: Annotated[str, typer.Option(metavar="A,B", help="Which ones, separated by commas; default: all")] = "",
    scale: Annotated[float, typer.Option(min=0.01, max=10.0, help="Share of the requests and faults")] = 1.0,
    out: Annotated[Path, typer.Option(metavar="FILE", help="Where the figures go")] = Path("build/drill.json"),
    folder: Annotated[
        Path, typer.Option(metavar="FOLDER", help="For logs and data; what is in it may be replaced")
    ] = Path("build/drill"),
) -> None:
    """Play fault drills of the router on real Kafka and real Triton servers with the stand-in model.

    Exit codes: 0 nothing was lost or doubled, 1 something was or a drill could not be played, 2 wrong usage.
    """
    chosen = [name.strip() for name in scenario.split(",") if name.strip()] or list(SCENARIOS)
    unknown = [name for name in chosen if name not in SCENARIOS]
    if unknown:
        raise typer.BadParameter(f"no scenario {', '.join(unknown)}: there are {', '.join(SCENARIOS)}")
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=PLAIN_WIDTH)
    # What the Kafka client reports is raised as well, or expected: this is a drill.
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)
    began = time.monotonic()

    def say(line: str) -> None:
        console.print(line, markup=False, soft_wrap=True)

    try:
        with signals_as_exit():
            results = asyncio.run(play(chosen, seed=seed, scale=scale, folder=folder.resolve(), say=say))
    except LOCAL_ERRORS as error:
        say(f"error: {error}")
        raise typer.Exit(1) from error
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps([result.to_json() for result in results], indent=2) + "\n", encoding="utf-8")
    console.print(table(results))
    for line in remarks(results):
        say(line)
    say(f"seed {seed}, scale {scale:g}, {time.monotonic() - began:.0f} s; figures in {out}, logs in {folder / 'logs'}")
    raise typer.Exit(0 if all(result.passed for result in results) else 1)


if __name__ == "__main__":
    typer.run(drill)
