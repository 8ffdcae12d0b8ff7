"""`sprout report`: how much carbon was saved, at which quality, and how the energy was used."""

import asyncio
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import asyncpg
import typer
from pydantic import ValidationError
from pydantic_core import to_json as to_text

from shared.fleet import Fleet, FleetError, load_fleet
from shared.kafka.records import describe
from shared.runtime.settings import DatabaseSettings
from tools.cli.console import Exit, fail, local_state, out, say

if TYPE_CHECKING:
    from tools.reporting import Report

DATABASE_VARIABLE = "SPROUT_DATABASE_URL"
FLEET_VARIABLE = "SPROUT_FLEET_FILE"


def parse_time(text: str) -> datetime:
    """Parse ISO 8601 event time; UTC unless it has a zone.

    Raises:
        typer.BadParameter: the text is not a time.
    """
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        raise typer.BadParameter(f"must be a time such as 2024-02-08 or 2024-02-08T06:00, got {text!r}") from None
    return time.replace(tzinfo=UTC) if time.tzinfo is None else time.astimezone(UTC)


TIME_HELP = "ISO 8601, event time; UTC unless it has a zone"


def report(
    *,
    since: Annotated[datetime | None, typer.Option(parser=parse_time, metavar="TIME", help=TIME_HELP)] = None,
    until: Annotated[datetime | None, typer.Option(parser=parse_time, metavar="TIME", help=TIME_HELP)] = None,
    model: Annotated[str | None, typer.Option(help="Only this model's requests; energy covers all models")] = None,
    zone: Annotated[str | None, typer.Option(help="Only requests served in this grid zone")] = None,
    hours: Annotated[bool, typer.Option("--hours/--no-hours", help="Print a row for every hour")] = True,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a page with plots")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write all figures")] = None,
    csv_folder: Annotated[
        Path | None, typer.Option("--csv", metavar="FOLDER", help="Write each table as a CSV file into a folder")
    ] = None,
    metrics_file: Annotated[
        Path | None,
        typer.Option("--metrics", metavar="FILE", help="Write key figures for Prometheus' textfile collector"),
    ] = None,
    fleet_file: Annotated[
        Path | None,
        typer.Option(
            "--fleet",
            metavar="FILE",
            help=f"For the saving on the meter; default: {FLEET_VARIABLE}, else that of the local stack",
        ),
    ] = None,
    database: Annotated[
        str | None,
        typer.Option(metavar="URL", help=f"The ledger's database; default: {DATABASE_VARIABLE}, else the local stack"),
    ] = None,
) -> None:
    """Print what was saved on the meter and by request, quality lost, capacity, latency, and energy accounts.

    Both savings are net of the evaluator. The attributed one is measured against the counterfactual that the baseline
    (no directive) had served every request, the one on the meter against time in which the fleet served without Sprout.
    Exit codes: 0 printed, 1 failed, 2 wrong usage, 3 nothing to report yet or no database.
    """
    # Other subcommands must start without loading numpy and plotly.
    from tools.reporting import (  # noqa: PLC0415
        NoLedgerError,
        TooManyCallsError,
        collect_report,
        render_html,
        render_metrics,
        render_tables,
        to_csv,
    )

    if since is not None and until is not None and since >= until:
        raise typer.BadParameter("--since must be before --until")
    url = database or default_database()
    try:
        fleet = _fleet(fleet_file, local=database is None and not os.environ.get(DATABASE_VARIABLE))
        found = asyncio.run(collect_report(url, since=since, until=until, model=model, zone=zone, fleet=fleet))
    except (FleetError, TooManyCallsError) as error:
        fail(str(error))
    except NoLedgerError as error:
        fail(str(error), remedy="for the local stack: sprout up", code=Exit.NOT_RUNNING)
    except (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
        fail(
            f"cannot read from the database ({type(error).__name__}: {error})",
            remedy=f"check --database or {DATABASE_VARIABLE}, or start the local stack: sprout up",
            code=Exit.NOT_RUNNING,
        )
    if found.empty:
        selected = {"--since": since, "--until": until, "--model": model, "--zone": zone}
        options = "".join(f" {option} {value}" for option, value in selected.items() if value is not None)
        fail(
            "there is nothing to report yet: the ledger has no call" + (f" for{options}" if options else ""),
            remedy='send a request, for example sprout send "Why is the sky blue?", and try again',
            code=Exit.NOT_RUNNING,
        )
    render_tables(found, out, hours=hours)
    files = [
        (html, render_html),
        (json_file, _json_text),
        (metrics_file, render_metrics),
    ]
    for path, render in files:
        if path is not None:
            _write(path, render(found))
    _write_tables(csv_folder, {} if csv_folder is None else to_csv(found))


def _fleet(path: Path | None, *, local: bool) -> Fleet | None:
    """The fleet file of the option, of the environment, or of the local stack; None without one.

    Args:
        local: whether the database is that of the local stack.

    Raises:
        FleetError: the file cannot be used.
    """
    if path is None and os.environ.get(FLEET_VARIABLE):
        path = Path(os.environ[FLEET_VARIABLE])
    if path is None and local:
        state = local_state()
        path = None if state is None else state.fleet_file
    return None if path is None else load_fleet(path)


def default_database() -> str:
    """The database of the environment, else the local stack's; exits with an error without either."""
    if os.environ.get(DATABASE_VARIABLE):
        try:
            return DatabaseSettings().url.get_secret_value()
        except ValidationError as error:
            fail(describe(error))
    state = local_state()
    if state is None or not state.database_url:
        fail(
            "no local stack is running, and no other database was given",
            remedy=f"start one with 'sprout up', or set --database URL or {DATABASE_VARIABLE}",
            code=Exit.NOT_RUNNING,
        )
    return state.database_url


def _json_text(report: "Report") -> str:
    from tools.reporting import to_json  # noqa: PLC0415 - see `report`

    # Python's own encoder takes four times as long with an indent.
    return to_text(to_json(report), indent=2, inf_nan_mode="constants").decode() + "\n"


def _write_tables(folder: Path | None, files: dict[str, str]) -> None:
    for name, text in files.items():
        _write((folder or Path()) / name, text)


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        fail(f"cannot write {path}: {error.strerror}")
    say(f"wrote {path}")
