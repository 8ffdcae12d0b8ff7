"""Log lines cannot control the terminal."""

import logging
from collections.abc import Iterator

import pytest
import structlog

from shared.runtime.logs import configure_logging, get_logger
from shared.runtime.settings import LogSettings


@pytest.fixture(autouse=True)
def restored_logging() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()


@pytest.mark.parametrize("format_", ["json", "console"])
def test_control_characters_in_values_and_errors_are_not_printed(
    format_: str, capsys: pytest.CaptureFixture[str]
) -> None:
    configure_logging("test", LogSettings(format=format_))
    hostile = "\x1b]0;owned\x07"
    get_logger("one").warning(f"bad {hostile}", model=hostile, all=[hostile])
    logging.getLogger("two").warning("of a library: %s", hostile)
    try:
        raise OSError(hostile)  # noqa: TRY301 - some errors quote messages
    except OSError:
        get_logger("three").exception("failed")
    printed = capsys.readouterr().out
    assert printed.count("owned") >= 5
    assert "\x1b]" not in printed
    assert "\x07" not in printed
