"""Process supervision: a parent watchdog in each model's process, and an init process for containers.

**Parent watchdog.** Neither a model's process nor its server outlives the other. A third process watches both, because
the model's process cannot: Triton's Python backend holds the interpreter's lock while it waits for the server to accept
a metric or a message, which a dead server never does, so no thread of the model makes progress. The kernel's
PR_SET_PDEATHSIG does not help either: it follows the *thread* that started the model, and the server's loading threads
end after loading.

A server can also crash without ending. Triton writes a backtrace when it crashes, and the fork for it waits forever if
the crash left malloc's lock held. Its other threads still report the server as healthy, and SIGTERM waits as well.
Clients that disconnect during many streams can cause this, by a race of cancelled requests
(github.com/triton-inference-server/server/issues/8034).

**Init process.** Inside a container nothing can kill process 1, so a server that is process 1 could not be killed after
such a crash. `run_as_init` therefore runs the server as a child, forwards signals, and reaps orphans.

Everything here uses the standard library only. An init program such as tini would serve for the second part, but the
images are built without further system packages.
"""

import os
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import Final

CHECK_INTERVAL_S: Final = 1.0
"""Wall seconds between two checks."""

CHECKS_BEFORE_KILL: Final = 5
"""Checks in a row that must find the server crashed: where a backtrace succeeds, writing it takes time."""

FORWARDED_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)

_WATCHDOG: Final = """
crashed() {
    # A thread is in the handler of SIGSEGV or SIGABRT (bits 10 and 5 of its mask; not if it blocks SIGUSR1 too, bit 9).
    grep -qsE '^SigBlk:.*([45cd].|[014589cd][2367abef]).$' /proc/"$1"/task/*/status
}
crashes=0
while kill -0 "$1" && kill -0 "$2"; do
    if crashed "$1"; then crashes=$((crashes + 1)); else crashes=0; fi
    if [ "$crashes" -ge "$4" ]; then
        echo "the server (pid $1) crashed without ending; killing it" >&3
        kill -9 "$1" "$2"
        exit
    fi
    sleep "$3"
done 3>&2 2>/dev/null
kill -0 "$1" 2>/dev/null || kill -9 "$2" 2>/dev/null
"""
"""Ends when either process ends, and kills the model if the server ended first. Without /proc it detects no crash."""


def start_parent_watchdog(*, check_interval_s: float = CHECK_INTERVAL_S) -> None:
    """Have this process killed when its server ends, and both when the server has crashed without ending.

    Call it once, before anything that takes time.

    Args:
        check_interval_s: wall seconds between two checks; a server that `CHECKS_BEFORE_KILL` checks in a row find
            crashed is killed.
    """
    server, model = os.getppid(), os.getpid()
    subprocess.Popen(
        ["/bin/sh", "-c", _WATCHDOG, "parent-watchdog",
         str(server), str(model), str(check_interval_s), str(CHECKS_BEFORE_KILL)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )  # fmt: skip


def run_as_init(command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run a command as process 1 of a container should: forward signals to it and reap orphans until it ends.

    Returns:
        Its exit status; as in a shell, 128 plus the signal's number if a signal ended it.
    """
    # Signals that arrive before the handlers are installed wait.
    signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED_SIGNALS)
    child = subprocess.Popen(command, env=environment, preexec_fn=_unblock)  # noqa: PLW1509 - there are no threads yet

    def forward(number: int, _: FrameType | None) -> None:
        # Not `child.send_signal`, which may reap the child itself.
        os.kill(child.pid, number)

    _handle(forward)
    _unblock()
    while True:
        ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT)
        if ended is not None and ended.si_pid == child.pid:
            # Before the child is reaped: afterwards its pid may belong to another process.
            _handle(signal.SIG_IGN)
            code = os.waitstatus_to_exitcode(os.waitpid(child.pid, 0)[1])
            return code if code >= 0 else 128 - code
        if ended is not None:
            os.waitpid(ended.si_pid, 0)


def _handle(handler: Callable[[int, FrameType | None], None] | signal.Handlers) -> None:
    for number in FORWARDED_SIGNALS:
        signal.signal(number, handler)


def _unblock() -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED_SIGNALS)
