"""`python -m tests.drills`: runs fault drills; exits with 1 if anything was lost or doubled."""

import asyncio
import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from deploy.local.java import Say
from deploy.local.signals import signals_as_exit
from deploy.local.stack import STACK_ERRORS
from tests.drills.accounting import Result, remarks, table
from tests.drills.run import ScenarioRun, drill_environment
from tests.drills.scenarios import SCENARIOS, SERVICE_SCENARIOS

PLAIN_WIDTH = 160


def drill(
    *,
    seed: Annotated[int, typer.Option(help="Seed of the times, victims and durations of the faults")] = 1,
    scenario: Annotated[str, typer.Option(metavar="A,B", help="Scenarios, separated by commas; default: all")] = "",
    scale: Annotated[float, typer.Option(min=0.01, max=10.0, help="Share of the requests and faults")] = 1.0,
    out: Annotated[Path, typer.Option(metavar="FILE", help="Output file for the figures")] = Path("build/drill.json"),
    folder: Annotated[
        Path, typer.Option(metavar="FOLDER", help="Folder for logs and data; its contents may be replaced")
    ] = Path("build/drill"),
) -> None:
    """Run fault drills of all services on real Kafka, PostgreSQL and Triton servers with the stand-in model.

    Exit codes: 0 every scenario passed, 1 a scenario failed or could not be run, 2 wrong usage.
    """
    chosen = [name.strip() for name in scenario.split(",") if name.strip()] or list(SCENARIOS)
    unknown = [name for name in chosen if name not in SCENARIOS]
    if unknown:
        raise typer.BadParameter(f"no scenario {', '.join(unknown)}; choose from {', '.join(SCENARIOS)}")
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=PLAIN_WIDTH)
    # Connection errors are expected during a drill.
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)
    began = time.monotonic()

    def say(line: str) -> None:
        console.print(line, markup=False, soft_wrap=True)

    try:
        with signals_as_exit():
            results = asyncio.run(run_scenarios(chosen, seed=seed, scale=scale, folder=folder.resolve(), say=say))
    except STACK_ERRORS as error:
        say(f"error: {error}")
        raise typer.Exit(1) from error
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps([result.to_json() for result in results], indent=2) + "\n", encoding="utf-8")
    console.print(table(results))
    for line in remarks(results):
        say(line)
    say(f"seed {seed}, scale {scale:g}, {time.monotonic() - began:.0f} s; figures in {out}, logs in {folder / 'logs'}")
    raise typer.Exit(0 if all(result.passed for result in results) else 1)


async def run_scenarios(names: Sequence[str], *, seed: int, scale: float, folder: Path, say: Say) -> list[Result]:
    """Run scenarios of `SCENARIOS` one after the other in one environment.

    Args:
        scale: share of the full number of requests and faults.
        folder: for logs and data; its contents may be replaced.

    Raises:
        KafkaInstallationError, ModelServerError, ProcessFailedError: the environment could not be started.
    """
    results = []
    # The scenarios of the services have model servers of their own.
    model_servers = 0 if SERVICE_SCENARIOS.issuperset(names) else 2
    async with drill_environment(folder, say=say, model_servers=model_servers) as environment:
        for number, name in enumerate(names, start=1):
            summary = (SCENARIOS[name].__doc__ or "").partition("\n")[0]
            say(f"== {name} ({number} of {len(names)}): {summary}")
            result = await _run_scenario(ScenarioRun(environment, name, seed, scale, say))
            say(f"   {'passed' if result.passed else 'FAILED: ' + '; '.join(result.problems)}, {result.seconds:.0f} s")
            results.append(result)
    return results


async def _run_scenario(run: ScenarioRun) -> Result:
    try:
        try:
            await SCENARIOS[run.scenario](run)
        except Exception as error:  # noqa: BLE001 - the other scenarios are run in any case
            run.failed(error)
        return await run.result()
    finally:
        await run.close()


if __name__ == "__main__":
    typer.run(drill)
