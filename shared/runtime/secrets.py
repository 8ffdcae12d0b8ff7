"""Secrets that orchestrators mount as files."""

from pathlib import Path


def read_secret(file: Path, variable: str) -> str:
    """The content of a file, without the line's end.

    Args:
        variable: that named the file, for the error.

    Raises:
        ValueError: it cannot be read, or is empty.
    """
    try:
        secret = file.read_text(encoding="utf-8").rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{variable} cannot be read: {error}") from error
    if not secret:
        raise ValueError(f"{variable} {file} is empty")
    return secret
