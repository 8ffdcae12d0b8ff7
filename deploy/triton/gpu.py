"""The companion of a model: meters the power that a GPU takes regardless of requests, also while its model is unloaded.

It shares the label of its model's energy counter. Triton adds up what models count under the same name and label, so
the counter grows by the idle power while the model is loaded, by the asleep power while it is not, and by the energy of
the steps, which the model itself counts. The companion is always loaded, so the counter never falls.

A loaded model holds a lock on its folder in the repository. The kernel releases it when the model's process ends,
however it ends. Triton may run two processes of a model for a while, when it is loaded again before its last answers
have ended: the lock is a shared one, and idle power is metered once.
"""

import fcntl
import importlib
import json
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from deploy.triton.energy import POWER_INTERVAL_S, EnergyAccount, EnergyMeter
from deploy.triton.watchdog import start_parent_watchdog
from shared.runtime.clock import Clock

POWER_METRIC_INTERVAL_S: Final = 1.0
"""Wall seconds between two updates of the power; long, because the model counts its energy in portions."""


class LoadedMark:
    """Marks a model as loaded until it is closed, or the process ends.

    Args:
        folder: of the model in the repository.
    """

    def __init__(self, folder: Path) -> None:
        self._descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        fcntl.flock(self._descriptor, fcntl.LOCK_SH)

    def close(self) -> None:
        """Remove the mark."""
        os.close(self._descriptor)


def is_loaded(folder: Path) -> bool:
    """Whether a process has marked the model in this folder as loaded."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


class StandingEnergy:
    """Energy that a GPU takes regardless of requests.

    Attributes:
        total_j: since the start, J.
    """

    def __init__(self, *, idle_power_w: float, asleep_power_w: float, now_s: float) -> None:
        self._idle_power_w = idle_power_w
        self._asleep_power_w = asleep_power_w
        self._at_s = now_s
        self.total_j = 0.0

    def advance(self, now_s: float, *, loaded: bool) -> None:
        """Add the time since the last call.

        Args:
            now_s: event time; no effect if it is in the past.
            loaded: whether the model was loaded during that time.
        """
        power_w = self._idle_power_w if loaded else self._asleep_power_w
        self.total_j += power_w * max(0.0, now_s - self._at_s)
        self._at_s = max(self._at_s, now_s)


class TritonPythonModel:
    """Meters the standing power of a GPU; takes no requests."""

    def initialize(self, args: dict[str, str]) -> None:
        """Start the meter."""
        start_parent_watchdog()
        self._backend = importlib.import_module("triton_python_backend_utils")
        configured = json.loads(args["model_config"])["parameters"]
        texts = {name: one["string_value"] for name, one in configured.items()}
        self._model_folder = Path(args["model_repository"]).parent / texts["model"]
        self._clock = Clock.from_environment()
        now_s = self._clock.now_s()
        self._energy = StandingEnergy(
            idle_power_w=float(texts["idle_power_w"]), asleep_power_w=float(texts["asleep_power_w"]), now_s=now_s
        )
        self._meter = EnergyMeter(
            self._backend,
            EnergyAccount(idle_power_w=0.0, now_s=now_s),
            gpu_uuid=texts["gpu_uuid"],
            power_interval_s=POWER_METRIC_INTERVAL_S,
        )
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="standing-power", daemon=True)
        self._thread.start()

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Reject requests."""
        error = self._backend.TritonError("this model only meters the power of a GPU; it takes no requests")
        return [self._backend.InferenceResponse(error=error) for _ in requests]

    def finalize(self) -> None:
        """Stop the meter."""
        self._stopping.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopping.wait(POWER_INTERVAL_S):
            now_s = self._clock.now_s()
            self._energy.advance(now_s, loaded=is_loaded(self._model_folder))
            self._meter.update(now_s, self._energy.total_j, at_once=True)
