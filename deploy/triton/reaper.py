"""Runs a command as the first process of a container should: it hands on signals, and buries orphans.

The kernel lets nobody inside a container kill its first process, so a server that is the first itself could not be
ended once it has crashed and stays (`lifeline.py`).
"""

import os
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import Final

HANDED_ON: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)


def run(command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run until the command ends.

    Returns:
        Its exit status; 128 and the signal's number if a signal ended it, as a shell has it.
    """
    # What arrives between the start and the handlers waits.
    signal.pthread_sigmask(signal.SIG_BLOCK, HANDED_ON)
    child = subprocess.Popen(command, env=environment, preexec_fn=_unblock)  # noqa: PLW1509 - no threads yet

    def hand_on(number: int, _: FrameType | None) -> None:
        # Not `child.send_signal`, which may bury the child itself.
        os.kill(child.pid, number)

    _handle(hand_on)
    _unblock()
    while True:
        ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT)
        if ended is not None and ended.si_pid == child.pid:
            # Before it is buried: afterwards its number may be another's.
            _handle(signal.SIG_IGN)
            code = os.waitstatus_to_exitcode(os.waitpid(child.pid, 0)[1])
            return code if code >= 0 else 128 - code
        if ended is not None:
            os.waitpid(ended.si_pid, 0)


def _handle(handler: Callable[[int, FrameType | None], None] | signal.Handlers) -> None:
    for number in HANDED_ON:
        signal.signal(number, handler)


def _unblock() -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, HANDED_ON)
