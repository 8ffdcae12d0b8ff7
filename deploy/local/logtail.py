"""The end of a log file."""

from pathlib import Path

_BLOCK_BYTES = 32_768


def tail(path: Path, lines: int = 20) -> str:
    """The last lines of a text file; a note in brackets where there is nothing to show."""
    try:
        with path.open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - _BLOCK_BYTES))
            text = file.read().decode(errors="replace")
    except FileNotFoundError:
        return "[no log]"
    shown = text.splitlines()[-lines:]
    return "\n".join(shown) if shown else "[empty]"
