"""The energy account of one model: idle power all the time, and on top what requests take."""


class EnergyAccount:
    """Idle power x event time since the start, plus the energy that requests took."""

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
        """Energy since the previous reading, J; never negative, as a counter cannot fall.

        Args:
            now_s: event time.
            used_j: energy of all requests since the start, J.
        """
        total_j = self._idle_power_w * max(0.0, now_s - self._start_s) + used_j
        increment_j = max(0.0, total_j - self._total_j)
        self._total_j += increment_j
        return increment_j
