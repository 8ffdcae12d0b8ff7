"""Runs a command as the first process of a container should: it hands on signals, and buries orphans.

The kernel lets nobody inside a container kill its first process, so a server that is the first itself could not be
ended once it has crashed and stays (`lifeline.py`).
"""

import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
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
        child.send_signal(number)

    for number in HANDED_ON:
        signal.signal(number, hand_on)
    _unblock()
    while True:
        pid, status = os.wait()
        if pid == child.pid:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code


def _unblock() -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, HANDED_ON)
