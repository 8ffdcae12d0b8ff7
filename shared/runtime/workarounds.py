"""Workaround for a fault of asyncpg (0.32.0): a cancelled query of a pool does not end while the server hangs.

The pool waits until PostgreSQL confirms the cancellation, at most for the timeout of the command. Reported:
https://github.com/MagicStack/asyncpg/issues/431. `tests/integration/test_library_faults.py` fails when a cancelled
query ends at once: then `asyncio.timeout` can take the place of `within`.
"""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


async def within(seconds: float, operation: Coroutine[Any, Any, T]) -> T:
    """Await an operation for a limited time. Unlike with `asyncio.timeout`, its cancellation is not waited for.

    Raises:
        TimeoutError: it takes longer, wall; it is cancelled in the background.
    """
    task = asyncio.create_task(operation)
    try:
        done, _ = await asyncio.wait({task}, timeout=seconds)
    finally:
        if not task.done():
            task.add_done_callback(lambda ended: ended.cancelled() or ended.exception())  # nobody else looks at it
            task.cancel()
    if not done:
        raise TimeoutError
    return task.result()
