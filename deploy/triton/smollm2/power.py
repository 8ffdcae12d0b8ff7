"""Energy of the processor: measured by RAPL where the machine allows it, otherwise modelled from CPU time."""

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from deploy.triton.smollm2.parameters import EnergySource

POWERCAP = Path("/sys/class/powercap")

_PACKAGE = re.compile(r"(intel|amd)-rapl:\d+")
"""Whole packages; the zones inside a package (cores, memory controller) are included in it."""


class RaplError(RuntimeError):
    """The processor's energy counters cannot be read."""


@dataclass(slots=True)
class _Package:
    counter: Path
    range_uj: int
    last_uj: int


class RaplCounter:
    """Energy of all packages since this counter was created."""

    def __init__(self, powercap: Path = POWERCAP) -> None:
        """Find the packages.

        Raises:
            RaplError: there is none, or reading it is not permitted.
        """
        try:
            self._packages = [
                _Package(
                    folder / "energy_uj",
                    int((folder / "max_energy_range_uj").read_text()),
                    int((folder / "energy_uj").read_text()),
                )
                for folder in sorted(powercap.iterdir())
                if _PACKAGE.fullmatch(folder.name)
            ]
        except (OSError, ValueError) as error:
            raise RaplError(f"RAPL cannot be read: {error}") from error
        if not self._packages:
            raise RaplError(f"{powercap} has no RAPL package")
        self._total_uj = 0

    def read_j(self) -> float:
        """Energy so far, J.

        Raises:
            RaplError: a counter can no longer be read.
        """
        for package in self._packages:
            try:
                now_uj = int(package.counter.read_text())
            except (OSError, ValueError) as error:
                raise RaplError(f"RAPL cannot be read: {error}") from error
            # The counter wraps to 0 after its range.
            self._total_uj += (now_uj - package.last_uj) % (package.range_uj + 1)
            package.last_uj = now_uj
        return self._total_uj / 1e6


class CpuTimeModel:
    """CPU time of all threads of this process, times the power of a busy core."""

    def __init__(self, core_power_w: float, *, cpu_time_s: Callable[[], float] = time.process_time) -> None:
        self._core_power_w = core_power_w
        self._cpu_time_s = cpu_time_s
        self._start_s = cpu_time_s()

    def read_j(self) -> float:
        """Energy so far, J."""
        return (self._cpu_time_s() - self._start_s) * self._core_power_w


def available_source(powercap: Path = POWERCAP) -> EnergySource:
    """`rapl` where this process may read it, otherwise `modelled`."""
    try:
        RaplCounter(powercap)
    except RaplError:
        return "modelled"
    return "rapl"


def energy_label(source: EnergySource) -> str:
    """Label of the energy counters, which names their source."""
    return f"cpu-{source}"


def open_source(source: EnergySource, *, core_power_w: float) -> RaplCounter | CpuTimeModel:
    """Create the counter of an energy source.

    Raises:
        RaplError: the source is RAPL and it cannot be read.
    """
    return RaplCounter() if source == "rapl" else CpuTimeModel(core_power_w)
