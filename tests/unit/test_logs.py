"""Log lines cannot control the terminal, and are not repeated while Kafka is unavailable."""

import logging
import time
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


def test_what_aiokafka_repeats_is_logged_once(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("test", LogSettings(format="json"))
    for _ in range(100):
        for node in (1, 2):
            logging.getLogger("aiokafka").error("Unable connect to node with id %s", node)
        get_logger("services.router").warning("of a service")
    printed = capsys.readouterr().out
    assert [printed.count(f"node with id {node}") for node in (1, 2)] == [1, 1]
    assert printed.count("of a service") == 100


def test_a_repeated_message_is_logged_again_later(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = iter((100.0, 104.0, 106.0))
    monkeypatch.setattr(time, "monotonic", lambda: next(now))
    configure_logging("test", LogSettings(format="json"))
    for _ in range(3):
        logging.getLogger("aiokafka.consumer.fetcher").error("Failed fetch messages")
    assert capsys.readouterr().out.count("Failed fetch") == 2
