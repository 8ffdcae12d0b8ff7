"""Ties a model's process to its server: one that is killed, or gives up waiting for its models, leaves none behind.

The kernel does it (prctl, PR_SET_PDEATHSIG), because this process may be unable to: the Python backend holds the
interpreter's lock while it waits for the server to take a metric, which a dead server never does. The kernel's signal
follows the *thread* that started the process, and the server's loading threads end after loading; so it is asked for
once the process has passed to the server's main thread. Until then, and where the kernel cannot tell, a thread of this
process looks; it lives on because the kernel keeps the wish with the thread that had it.
"""

import ctypes
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Final

PR_SET_PDEATHSIG: Final = 1

CHECK_S: Final = 0.05
"""Wall seconds between two looks, until the kernel has taken over."""

KEPT_CHECK_S: Final = 5.0
"""The same, afterwards."""


def end_with_server() -> None:
    """End this process when the server is gone; call it once, when the model is loaded."""
    threading.Thread(target=_watch, args=(os.getppid(),), name="end-with-server", daemon=True).start()


def _watch(server: int) -> None:
    kept = False
    while os.getppid() == server:
        kept = kept or (_belongs_to_main_thread(server) and _die_with_parent_thread())
        # Looked at again: the server may have gone before the kernel was asked.
        if os.getppid() == server:
            time.sleep(KEPT_CHECK_S if kept else CHECK_S)
    os._exit(1)  # from a thread, and at once: there is nobody to finish for


def _belongs_to_main_thread(server: int) -> bool:
    """Whether the server's main thread is this process's parent, which ends only with the server itself."""
    try:
        children = Path(f"/proc/{server}/task/{server}/children").read_text(encoding="ascii")
    except OSError:
        return False  # not Linux, or a kernel without this file: the looks go on
    return str(os.getpid()) in children.split()


def _die_with_parent_thread() -> bool:
    if sys.platform != "linux":
        return False
    status: int = ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    return status == 0
