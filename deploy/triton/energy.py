"""The energy counters of one model: the account, and the metrics under which it is exported."""

import time
from typing import Any, Final

Backend = Any
"""The module `triton_python_backend_utils`, which exists only inside the server and is therefore passed in."""

POWER_INTERVAL_S: Final = 0.05
"""Wall seconds between two updates of the metrics; the energy is also updated before an answer ends."""


class EnergyAccount:
    """Idle power x event time since the start, plus the energy of all requests."""

    def __init__(self, *, idle_power_w: float, now_s: float) -> None:
        if not idle_power_w >= 0:
            raise ValueError(f"'idle_power_w' must not be negative, got {idle_power_w}")
        self._idle_power_w = idle_power_w
        self._start_s = now_s
        self._total_j = 0.0

    @property
    def total_j(self) -> float:
        """Sum of all readings, J."""
        return self._total_j

    def read(self, now_s: float, used_j: float) -> float:
        """Energy since the previous reading, J; never negative, because a counter cannot fall.

        Args:
            now_s: event time.
            used_j: energy of all requests since the start, J.
        """
        total_j = self._idle_power_w * max(0.0, now_s - self._start_s) + used_j
        increment_j = max(0.0, total_j - self._total_j)
        self._total_j += increment_j
        return increment_j


class EnergyMeter:
    """Exports an energy account under the names of Triton's GPU metrics; for use by one thread.

    Every model runs in its own process, and the server merges metric families of the same name. The label tells GPUs
    apart; a model and its companion (`deploy.triton.gpu`) share one, and the server adds up what they count. When a
    model is unloaded its counter stays, and continues from there when the model is loaded again.
    """

    def __init__(
        self,
        backend: Backend,
        account: EnergyAccount,
        *,
        gpu_uuid: str,
        power_interval_s: float | None = POWER_INTERVAL_S,
    ) -> None:
        """Create the metrics.

        Args:
            power_interval_s: wall seconds between two updates of the power, which is that of all models with the
                label; None: another model exports it.
        """
        family = backend.MetricFamily
        self._account = account
        # The families must live as long as their metrics.
        self._families = (
            family(
                name="nv_energy_consumption",
                description="GPU energy consumption in joules since the Triton Server started",
                kind=family.COUNTER,
            ),
            family(name="nv_gpu_power_usage", description="GPU power usage in watts", kind=family.GAUGE),
        )
        self._energy, self._power = (one.Metric(labels={"gpu_uuid": gpu_uuid}) for one in self._families)
        self._power_interval_s = power_interval_s
        self._next_energy = 0.0
        self._next_power = 0.0
        self._last: tuple[float, float] | None = None  # event time and counter at the last update of the power

    def update(self, now_s: float, used_j: float, *, at_once: bool) -> None:
        """Update the metrics, at most every 50 ms unless `at_once`.

        Args:
            now_s: event time.
            used_j: energy of all requests since the model was loaded, J.
        """
        wall = time.monotonic()
        if not at_once and wall < self._next_energy:
            return
        self._next_energy = wall + POWER_INTERVAL_S
        increment_j = self._account.read(now_s, used_j)
        if increment_j > 0:
            self._energy.increment(increment_j)
        if self._power_interval_s is not None and wall >= self._next_power:
            self._next_power = wall + self._power_interval_s
            self._update_power(now_s)

    def _update_power(self, now_s: float) -> None:
        total_j = float(self._energy.value())
        if self._last is not None:
            last_s, last_j = self._last
            if now_s <= last_s:
                return
            self._power.set((total_j - last_j) / (now_s - last_s))
        self._last = now_s, total_j
