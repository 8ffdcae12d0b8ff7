"""`sprout logs`: what the local stack's processes wrote."""

import time
from pathlib import Path
from typing import Annotated

import typer

from deploy.local.config import state_dir_from_environment
from deploy.local.logtail import tail
from tools.cli.console import fail

POLL_S = 0.3


def logs(
    service: Annotated[str | None, typer.Argument(help="A process, as 'sprout status' names it; default: all")] = None,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on printing what is written")] = False,
    lines: Annotated[int, typer.Option("-n", "--lines", min=0, help="How many lines of each log")] = 20,
) -> None:
    """Print the end of the local stack's logs; they stay readable after the stack has stopped."""
    folder = state_dir_from_environment() / "logs"
    found = {path.stem: path for path in sorted(folder.glob("*.log"))}
    if not found:
        fail(f"there are no logs in {folder}", remedy="start the stack: sprout up")
    if service is not None and service not in found:
        fail(f"no log of {service!r}", remedy=f"there are: {', '.join(found)}")
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
    """Print what is appended to the files, for ever; a file that shrank was begun anew."""
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
            whole = added.rfind(b"\n") + 1  # a line that is still being written waits for its end
            if whole:
                ends[name] += whole
                _print(name, added[:whole].decode(errors="replace").rstrip("\n"), labelled=len(files) > 1)
        time.sleep(POLL_S)


def _print(name: str, text: str, *, labelled: bool) -> None:
    for line in text.splitlines():
        print(f"{name:<12} {line}" if labelled else line, flush=True)
