"""Ties a model's process and its server's together: neither outlives the other's death.

A process of its own looks after both, because the model's cannot: the Python backend holds the interpreter's lock while
it waits for the server to take a metric or a message, which a dead server never does, so that no thread of it goes on.
Nor can the kernel's PR_SET_PDEATHSIG: it follows the *thread* that started the model, and the server's loading threads
end after loading.

A server may also be dead and stay: Triton writes a backtrace where it crashes, for which it forks, which waits for ever
if the crash left the memory's lock held. Its other threads go on to say that it is healthy, and SIGTERM waits as well.
Clients that vanish in the middle of many streams can bring that about, by a race of cancelled requests
(github.com/triton-inference-server/server/issues/8034).
"""

import os
import subprocess
from typing import Final

LOOK_S: Final = 1.0
"""Wall seconds between two looks."""

LOOKS_AT_A_CRASH: Final = 5
"""In a row: a backtrace takes its time where it succeeds."""

_WATCH: Final = """
crashed() {
    # A thread is in the handler of SIGSEGV or SIGABRT (bits 10 and 5 of its mask; not if it blocks SIGUSR1 too, bit 9).
    grep -qsE '^SigBlk:.*([45cd].|[014589cd][2367abef]).$' /proc/"$1"/task/*/status
}
looks=0
while kill -0 "$1" && kill -0 "$2"; do
    if crashed "$1"; then looks=$((looks + 1)); else looks=0; fi
    if [ "$looks" -ge "$4" ]; then
        echo "the server (pid $1) crashed and did not end; it is killed" >&3
        kill -9 "$1" "$2"
        exit
    fi
    sleep "$3"
done 3>&2 2>/dev/null
kill -0 "$1" 2>/dev/null || kill -9 "$2" 2>/dev/null
"""
"""Ends with either of the two; ends the model where it was the server that went. Without /proc no crash is seen."""


def end_with_server(*, look_s: float = LOOK_S) -> None:
    """End this process when the server is gone, and a server that crashed; call it once, before what takes time.

    Args:
        look_s: wall seconds between two looks; a server that is found to have crashed `LOOKS_AT_A_CRASH` times in a row
            is killed.
    """
    server, model = os.getppid(), os.getpid()
    subprocess.Popen(
        ["/bin/sh", "-c", _WATCH, "end-with-server", str(server), str(model), str(look_s), str(LOOKS_AT_A_CRASH)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
