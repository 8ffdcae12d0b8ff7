"""Waits of the tests. A wait ends with its event; only a failure, or a busy machine, takes as long as its bound."""

import asyncio
import inspect
import time
from collections.abc import Callable
from typing import Any

DEADLINE_S = 180.0
"""For an event."""

REPLY_S = 20.0
"""For the answer to one HTTP request."""

POLL_S = 0.02
"""Between two readings of what has no event."""


async def until(read: Callable[[], Any], holds: Callable[[Any], object] = bool, *, within_s: float = DEADLINE_S) -> Any:
    """Read a log, a metric, a table or whatever has no event until a condition holds; returns what was read last.

    Args:
        read: a function, or one that returns an awaitable.

    Raises:
        AssertionError: it does not hold `within_s`; with what was read last.
    """
    found: object = "nothing"
    try:
        async with asyncio.timeout(within_s) as deadline:
            while True:
                found = await reading if inspect.isawaitable(reading := read()) else reading
                if holds(found):
                    return found
                await asyncio.sleep(POLL_S)
    except TimeoutError:
        if not deadline.expired():
            raise
        raise AssertionError(f"after {within_s} s still {found!r:.2000}") from None


def wait_until(condition: Callable[[], object], *, within_s: float = DEADLINE_S) -> None:
    """`until` for tests without an event loop.

    Raises:
        AssertionError: the condition does not hold `within_s`.
    """
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, f"not so after {within_s} s"
        time.sleep(POLL_S)
