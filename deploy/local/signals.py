"""An orderly end on signals, and an end with the parent process.

As a program, `signals.py PARENT_PID SIGNAL COMMAND...` runs a command that ends when its parent process ends. The
kernel is asked (prctl, PR_SET_PDEATHSIG) to send the signal when the parent is gone, even after SIGKILL; then the
command replaces this process, so it keeps the pid that the parent knows. It is a separate program and not a hook
between fork and exec, because such hooks are unsafe in a process with threads. Only Linux has this call; elsewhere the
command runs without it.
"""

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

PR_SET_PDEATHSIG = 1
TERMINATING = (signal.SIGTERM, signal.SIGHUP)

Handler = Callable[[int, FrameType | None], NoReturn] | signal.Handlers


@contextmanager
def signals_as_exit() -> Iterator[None]:
    """Within the block SIGTERM and SIGHUP raise SystemExit(128 + number), as Ctrl-C raises KeyboardInterrupt.

    Python sets signal handlers in the main thread only; in another thread this does nothing.
    """

    def leave(number: int, _frame: FrameType | None) -> NoReturn:
        raise SystemExit(128 + number)

    with _handlers(dict.fromkeys(TERMINATING, leave)):
        yield


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Within the block Ctrl-C, SIGTERM and SIGHUP are ignored, so that a second Ctrl-C does not leave processes behind.

    Python sets signal handlers in the main thread only; in another thread this does nothing.
    """
    with _handlers(dict.fromkeys((signal.SIGINT, *TERMINATING), signal.SIG_IGN)):
        yield


@contextmanager
def _handlers(handlers: Mapping[signal.Signals, Handler]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main(arguments: list[str]) -> None:
    """Ask for a signal at the parent's death, then become the command."""
    parent_pid, signal_number, command = int(arguments[0]), int(arguments[1]), arguments[2:]
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(PR_SET_PDEATHSIG, signal_number, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
        if os.getppid() != parent_pid:
            sys.exit(1)  # the parent ended before the call
    os.execvp(command[0], command)


if __name__ == "__main__":
    main(sys.argv[1:])
