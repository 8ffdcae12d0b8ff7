"""Limits processes to a share of one core, with control groups of Linux (version 1, controller `cpu`).

In every period the kernel lets the processes of a group run for their share, and stops them for the rest of it.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

CONTROLLER: Final = Path("/sys/fs/cgroup/cpu")

PERIOD_US: Final = 20_000
"""Short, so that others wait little for a process that is stopped."""

ENTER: Final = 'echo $$ > "$0/cgroup.procs" && exec "$@"'
"""A shell enters the group and then becomes the program, so that this is limited from the beginning."""


@contextmanager
def limits(count: int, share: float | None) -> Iterator[list[tuple[str, ...]]]:
    """Prefixes for the commands of some processes, each of which then gets at most a share of one core.

    The processes, with their children, must have ended before the context is left.

    Args:
        share: None: they are not limited, and the prefixes are empty.

    Raises:
        OSError: there is no such controller, or this user may not write to it.
    """
    if share is None:
        yield [()] * count
        return
    folders = [CONTROLLER / f"sprout-{os.getpid()}-{number}" for number in range(count)]
    try:
        for folder in folders:
            folder.mkdir()
            (folder / "cpu.cfs_period_us").write_text(str(PERIOD_US), encoding="ascii")
            (folder / "cpu.cfs_quota_us").write_text(str(round(PERIOD_US * share)), encoding="ascii")
        yield [("/bin/sh", "-c", ENTER, str(folder)) for folder in folders]
    finally:
        for folder in folders:
            if folder.exists():
                folder.rmdir()
