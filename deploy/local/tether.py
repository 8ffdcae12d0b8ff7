"""Runs a command that dies with the process that started it: `tether.py PARENT_PID SIGNAL COMMAND...`.

The kernel is asked (prctl, PR_SET_PDEATHSIG) to send the signal when the parent is gone, even if it was killed with
SIGKILL; then the command replaces this process, so its pid is the one that the parent knows. A separate program
rather than a hook between fork and exec, because such hooks are unsafe in a process that has threads. Only Linux has
this call; elsewhere the command simply runs.
"""

import ctypes
import os
import sys

PR_SET_PDEATHSIG = 1


def main(arguments: list[str]) -> None:
    """Tether this process to its parent, then become the command."""
    parent_pid, signal_number, command = int(arguments[0]), int(arguments[1]), arguments[2:]
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(PR_SET_PDEATHSIG, signal_number, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
        if os.getppid() != parent_pid:
            sys.exit(1)  # the parent died before the call: nobody is left to run for
    os.execvp(command[0], command)


if __name__ == "__main__":
    main(sys.argv[1:])
