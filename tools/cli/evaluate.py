"""`sprout evaluate`: have a model evaluated now."""

import json
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Annotated

import typer

from deploy.local.state import TOKEN_FILE, StackState, StateError
from shared.fleet import FleetError, load_fleet
from shared.runtime.settings import FleetSettings, read_secret
from tools.cli.console import Exit, fail, local_state, print_text

TIMEOUT_S = 10.0
MAX_ANSWER_BYTES = 10_000


def evaluate(
    model: Annotated[str | None, typer.Argument(help="Model; default: the first of the fleet file")] = None,
    *,
    url: Annotated[
        str | None,
        typer.Option(metavar="URL", envvar="SPROUT_EVALUATOR_URL", help="The evaluator's; default: the local stack's"),
    ] = None,
    token_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            envvar="SPROUT_EVALUATOR_HTTP_TOKEN_FILE",
            help="File with the evaluator's token; default: the local stack's",
        ),
    ] = None,
) -> None:
    """Have a model evaluated now, whatever the carbon intensity; the evaluator says whether it will do it.

    Exit codes: 0 accepted, 1 rejected, 2 wrong usage, 3 no evaluator.
    """
    state = local_state() if url is None or token_file is None else None
    url = url or _local_url(state)
    if urllib.parse.urlsplit(url).scheme not in {"http", "https"}:
        raise typer.BadParameter("--url must begin with http:// or https://")
    file = token_file or (None if state is None else state.state_dir / TOKEN_FILE)
    if file is None:
        raise typer.BadParameter("give --token-file, or set SPROUT_EVALUATOR_HTTP_TOKEN_FILE")
    try:
        token = read_secret(file, "--token-file")
        named = model or load_fleet(_fleet_file(state)).models[0].name
    except (ValueError, FleetError) as error:
        fail(str(error))
    request = urllib.request.Request(
        f"{url.rstrip('/')}/evaluations?{urllib.parse.urlencode({'model': named})}",
        method="POST",
        headers={"Authorization": f"Bearer {token}"},
    )
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
            print_text(f"{named}: {_text(answer.read(MAX_ANSWER_BYTES), 'status')}")
    except urllib.error.HTTPError as error:
        fail(f"the evaluator answers {error.code}: {_text(error.read(MAX_ANSWER_BYTES), 'error')}")
    except OSError as error:
        fail(f"no evaluator answers at {url} ({error})", remedy="check --url", code=Exit.NOT_RUNNING)


def _local_url(state: StackState | None) -> str:
    if state is None:
        fail(
            "no local stack is running, and no other evaluator was named",
            remedy="start one with 'sprout up', or give --url",
            code=Exit.NOT_RUNNING,
        )
    try:
        return state.process("evaluator").url or ""
    except StateError as error:
        fail(str(error))


def _fleet_file(state: StackState | None) -> Path:
    return FleetSettings().file if state is None or state.fleet_file is None else state.fleet_file


def _text(body: bytes, key: str) -> str:
    try:
        return str(json.loads(body)[key])
    except (ValueError, KeyError, TypeError):
        return body.decode(errors="replace")
