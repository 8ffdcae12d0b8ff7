"""Ties a model's process to its server: one that is killed, or gives up waiting for its models, leaves none behind.

A process of its own looks after both, because the model's cannot: the Python backend holds the interpreter's lock while
it waits for the server to take a metric or a message, which a dead server never does, so that no thread of it goes on.
Nor can the kernel's PR_SET_PDEATHSIG: it follows the *thread* that started the model, and the server's loading threads
end after loading.
"""

import os
import subprocess
from typing import Final

LOOK_S: Final = 1.0
"""Wall seconds between two looks."""

_WATCH: Final = """
while kill -0 "$1" && kill -0 "$2"; do sleep "$3"; done 2>/dev/null
kill -0 "$1" 2>/dev/null || kill -9 "$2" 2>/dev/null
"""
"""Ends with either of the two; ends the model where it was the server that went."""


def end_with_server() -> None:
    """End this process when the server is gone; call it once, before anything that takes time."""
    subprocess.Popen(
        ["/bin/sh", "-c", _WATCH, "end-with-server", str(os.getppid()), str(os.getpid()), str(LOOK_S)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
