"""Processes found again after their starter has gone: what identifies one, and how to stop it without harming others.

A pid alone proves nothing, since it may have been given to a stranger; a pid and its start time together do.
"""

import os
import signal
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil
from pydantic import BaseModel, ConfigDict, Field

START_TIME_TOLERANCE_S = 1.0


class ProcessRecord(BaseModel):
    """One running process, as written to the state file."""

    model_config = ConfigDict(frozen=True)

    name: str
    pid: int = Field(description="Also the id of its process group and session")
    started_at_s: float = Field(description="Start time as the kernel tells it, seconds since the Unix epoch")
    log: Path
    port: int | None = None
    url: str | None = Field(default=None, description="Base URL of its HTTP side, where it has one")
    stop_signal: int = int(signal.SIGTERM)
    tier: int = Field(default=0, description="Higher tiers are stopped before lower ones")

    def process(self) -> psutil.Process | None:
        """The process, if it still runs and is the one that was recorded."""
        try:
            found = psutil.Process(self.pid)
            started_at_s = found.create_time()
            zombie = found.status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return None
        if zombie or abs(started_at_s - self.started_at_s) > START_TIME_TOLERANCE_S:
            return None
        return found

    @property
    def alive(self) -> bool:
        """Whether the recorded process still runs."""
        return self.process() is not None


def record_of(
    pid: int, *, name: str, log: Path, port: int | None, url: str | None, stop_signal: signal.Signals, tier: int
) -> ProcessRecord:
    """The record of a child that was started just now.

    Raises:
        psutil.NoSuchProcess: it was reaped already.
    """
    return ProcessRecord(
        name=name,
        pid=pid,
        started_at_s=psutil.Process(pid).create_time(),
        log=log,
        port=port,
        url=url,
        stop_signal=int(stop_signal),
        tier=tier,
    )


def stop_recorded(records: Sequence[ProcessRecord], *, grace_s: float = 15.0) -> list[ProcessRecord]:
    """Stop recorded processes in good order: tier by tier, the last started first, killing what outstays its grace.

    Returns:
        Those that were running; a pid that now belongs to another process is left alone.
    """
    stopped: list[ProcessRecord] = []
    for tier in sorted({record.tier for record in records}, reverse=True):
        leaving = [
            (record, found)
            for record in reversed(records)
            if record.tier == tier and (found := record.process()) is not None
        ]
        for record, found in leaving:
            with suppress(psutil.NoSuchProcess):
                found.send_signal(record.stop_signal)
        _, staying = psutil.wait_procs([found for _, found in leaving], timeout=grace_s)
        for found in staying:
            with suppress(psutil.NoSuchProcess):
                found.kill()
        for record, _ in leaving:
            # Its group's id is its pid, which the kernel gives to nobody else while the group has members.
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(record.pid, signal.SIGKILL)
            stopped.append(record)
    return stopped
