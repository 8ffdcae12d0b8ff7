"""Structured logs: one line of JSON per event, or coloured text; without prompts and secrets. No control
characters on terminals.
"""

import logging
import re
import sys
import time
import traceback
from typing import Final

import structlog

from shared.runtime.settings import LogSettings

REPEAT_S: Final = 5.0
"""Seconds (wall) for which an equal message of aiokafka is not logged again."""

MAX_REPEATS: Final = 1_000
"""Different messages that are remembered."""

_HARMFUL: Final = re.compile(
    "["
    "\x00-\x1f\x7f-\x9f"  # control characters, with ESC and CSI
    "\u2028\u2029"  # line and paragraph separators
    "\u202a-\u202e\u2066-\u2069"  # these change the direction of the text
    "\ud800-\udfff"  # lone surrogates, which cannot be encoded
    "]"
)


def configure_logging(service: str, settings: LogSettings) -> None:
    """Write the records of structlog and of the standard library to standard output in one format."""
    processors: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
    ]
    renderer: structlog.typing.Processor = (
        structlog.processors.JSONRenderer()
        if settings.format == "json"
        else structlog.dev.ConsoleRenderer(
            # The default formatter prints local variables, which may hold prompts.
            exception_formatter=structlog.dev.plain_traceback
        )
    )
    structlog.configure(
        processors=[*processors, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.stdlib.BoundLogger,
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stdout)
    handler.addFilter(_RepeatFilter())
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=processors,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.format_exc_info,
                *([] if settings.format == "json" else [_without_control_characters]),
                renderer,
            ],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(settings.level)
    # Below WARNING these log every request or reconnect attempt.
    for name in ("aiokafka", "httpx", "httpcore", "uvicorn.access", "uvicorn.error"):
        logging.getLogger(name).setLevel(max(logging.WARNING, root.level))
    # FastStream adds a handler with its own format, and warns at every start that it creates no topics.
    faststream = logging.getLogger("faststream")
    faststream.handlers.clear()
    faststream.propagate = True
    faststream.setLevel(max(logging.ERROR, root.level))
    structlog.contextvars.bind_contextvars(service=service)


class _RepeatFilter(logging.Filter):
    """Drops what aiokafka repeats: while Kafka is unavailable, every client logs each of its attempts, ten a second."""

    def __init__(self) -> None:
        super().__init__()
        self._logged: dict[tuple[str, str], float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        if not record.name.startswith("aiokafka"):
            return True
        now, message = time.monotonic(), (record.name, record.getMessage())
        if now - self._logged.get(message, -REPEAT_S) < REPEAT_S:
            return False
        if len(self._logged) >= MAX_REPEATS:
            self._logged.clear()
        self._logged[message] = now
        return True


def _without_control_characters(
    _logger: object, _method: str, event: structlog.typing.EventDict
) -> structlog.typing.EventDict:
    """Replace control characters, which JSON would escape: values may come from messages, and a terminal obeys them."""
    return {key: printable(value, keep="\n\t") if isinstance(value, str) else value for key, value in event.items()}


def get_logger(name: str) -> structlog.stdlib.BoundLogger:
    """The logger of a module."""
    logger: structlog.stdlib.BoundLogger = structlog.stdlib.get_logger(name)
    return logger


def where(error: BaseException) -> list[str]:
    """The last frames of an error's traceback, innermost last, without its message: that may quote a prompt."""
    return [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in traceback.extract_tb(error.__traceback__)[-6:]]


def printable(text: str, *, keep: str = "") -> str:
    """The text with every control character replaced: they could move the cursor, or hide or forge output.

    Whatever comes from messages, logs or files passes through this before it is printed.

    Args:
        keep: control characters to keep, such as newlines.
    """
    return _HARMFUL.sub(lambda match: match.group() if match.group() in keep else "\N{REPLACEMENT CHARACTER}", text)
