"""Energy counters of a model server: read from its Prometheus text, and what was used between two readings."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

ENERGY = "nv_energy_consumption"
"""Joules since the server's start, by GPU (Triton, docs/user_guide/metrics.md, "GPU metrics")."""
POWER = "nv_gpu_power_usage"
"""Watts now, by GPU."""
GPU_LABEL = "gpu_uuid"


class MeteringError(ValueError):
    """A server's metrics do not tell an endpoint's energy; the message says what is missing and what to do."""


@dataclass(frozen=True, slots=True)
class ServerMeters:
    """What a server reported at once: joules since its start and watts now, by GPU uuid."""

    energy_j: Mapping[str, float]
    power_w: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Reading:
    """An endpoint's counters at an instant; seconds since the Unix epoch, joules by GPU uuid."""

    at_s: float
    energy_j: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Interval:
    """The time between two readings of an endpoint, and the joules that were counted in it.

    Attributes:
        restarted: a counter began anew: what it had counted after the first reading and before that is lost.
    """

    started_s: float
    finished_s: float
    metered_j: float
    restarted: bool = False

    @property
    def length_s(self) -> float:
        """Event seconds, > 0."""
        return self.finished_s - self.started_s


def parse_meters(text: str) -> ServerMeters:
    """The energy counters in Prometheus' text format.

    Raises:
        MeteringError: it is no such text, or a counter is negative or not a number.
    """
    wanted = "\n".join(line for line in text.splitlines() if line.startswith((ENERGY, POWER))) + "\n"
    found: dict[str, dict[str, float]] = {ENERGY: {}, POWER: {}}
    try:
        for family in text_string_to_metric_families(wanted):
            for sample in family.samples:
                if sample.name in found and GPU_LABEL in sample.labels:
                    found[sample.name][sample.labels[GPU_LABEL]] = float(sample.value)
    except ValueError as error:
        raise MeteringError(f"the metrics are not in Prometheus' text format: {error}") from error
    for gpu, energy_j in found[ENERGY].items():
        if not (math.isfinite(energy_j) and energy_j >= 0):
            raise MeteringError(f"{ENERGY} of GPU {gpu!r} must be a number of joules >= 0, got {energy_j}")
    return ServerMeters(energy_j=found[ENERGY], power_w=found[POWER])


def counters_of(gpus: Sequence[str], meters: ServerMeters) -> dict[str, float]:
    """The counters of an endpoint's GPUs, J; of all that the server reports where `gpus` is empty.

    Raises:
        MeteringError: the server does not report one of them, or none at all.
    """
    reported = ", ".join(sorted(meters.energy_j)) or "none"
    missing = [gpu for gpu in gpus if gpu not in meters.energy_j]
    if missing:
        raise MeteringError(
            f"the server reports no {ENERGY} of GPU {', '.join(missing)} (it reports: {reported}); correct 'gpus' of "
            "the endpoint in the fleet file"
        )
    if not meters.energy_j:
        raise MeteringError(f"the server reports no {ENERGY}: are its GPU metrics enabled?")
    return {gpu: meters.energy_j[gpu] for gpu in gpus or sorted(meters.energy_j)}


def intervals_between(readings: Iterable[Reading]) -> list[Interval]:
    """The intervals between readings in order of time; a scrape that failed merely makes a longer one.

    A counter that is lower than before began anew with its server: the new value was counted since. A GPU that was not
    reported before adds nothing until it is read again, for when it counted what it shows is unknown.
    """
    intervals: list[Interval] = []
    known: dict[str, float] = {}
    previous_s: float | None = None
    for reading in readings:
        if previous_s is not None and reading.at_s > previous_s:
            used_j: list[float] = []
            restarted = False
            for gpu, energy_j in reading.energy_j.items():
                before_j = known.get(gpu, energy_j)
                restarted |= energy_j < before_j
                used_j.append(energy_j if energy_j < before_j else energy_j - before_j)
            intervals.append(Interval(previous_s, reading.at_s, math.fsum(used_j), restarted))
        known |= reading.energy_j
        previous_s = reading.at_s
    return intervals
