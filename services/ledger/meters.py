"""Meters: scrapes the energy counters of model servers, and computes the energy between two readings.

The counters are Prometheus text, as Triton reports them (docs/user_guide/metrics.md, "GPU metrics"), or NVIDIA's DCGM
exporter (etc/default-counters.csv), for servers that report no energy themselves; or the JSON of trtllm-serve's
`/energy_metrics` (tensorrt_llm/serve/openai_server.py), one counter for all GPUs of the server.
"""

import asyncio
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta

import httpx
from prometheus_client.parser import text_string_to_metric_families
from pydantic import BaseModel, ValidationError

from services.ledger.metrics import LedgerMetrics
from services.ledger.settings import LedgerSettings
from services.ledger.sql import Storage
from shared.fleet import Fleet, tls_context
from shared.pools import TlsFields
from shared.runtime.clock import Clock
from shared.runtime.database import DatabaseUnavailableError
from shared.runtime.logs import get_logger

ENERGY = "nv_energy_consumption"
"""Joules since the server's start, by GPU."""
POWER = "nv_gpu_power_usage"
"""Current power, W, by GPU."""
GPU_LABEL = "gpu_uuid"
DCGM = {
    "DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION": (ENERGY, 1e-3),  # mJ since the driver was loaded
    "DCGM_FI_DEV_POWER_USAGE": (POWER, 1.0),  # W
}
"""Metrics of DCGM's exporter: the metric of Triton with the same meaning, and the factor to its unit."""
DCGM_GPU_LABEL = "UUID"
TRTLLM_GPU = "all"
"""In place of a GPU's uuid: trtllm-serve reports the sum over its GPUs."""

_log = get_logger(__name__)


class MeteringError(ValueError):
    """A server's metrics lack an endpoint's energy; the message names what is missing and the remedy."""


@dataclass(frozen=True, slots=True)
class ServerMeters:
    """One scrape of a server: energy since its start, J, and current power, W, by GPU uuid."""

    energy_j: Mapping[str, float]
    power_w: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Reading:
    """An endpoint's counters at one time.

    Attributes:
        at_s: seconds since the Unix epoch.
        energy_j: by GPU uuid.
        divided: not read but computed, to divide an interval with very many calls.
        restarted: a counter was reset in the interval that this one divides.
    """

    at_s: float
    energy_j: Mapping[str, float]
    divided: bool = False
    restarted: bool = False


@dataclass(frozen=True, slots=True)
class Interval:
    """The time between two readings of an endpoint, and the energy counted in it.

    Attributes:
        started_s, finished_s: seconds since the Unix epoch.
        metered_j: energy, J.
        restarted: a counter was reset; its energy between the first reading and the reset is lost.
        divided: a part of the time between two readings, with the energy that its work suggests.
    """

    started_s: float
    finished_s: float
    metered_j: float
    restarted: bool = False
    divided: bool = False

    @property
    def length_s(self) -> float:
        """Duration, event seconds, > 0."""
        return self.finished_s - self.started_s


class _TrtllmEnergy(BaseModel):
    """The answer of trtllm-serve's `/energy_metrics`: joules of all its GPUs since its start."""

    total_energy_j: float


def parse_meters(text: str) -> ServerMeters:
    """Parse the energy counters from Prometheus text, or from the JSON of trtllm-serve.

    Raises:
        MeteringError: the text is in neither format, or a counter is negative or not a number.
    """
    found = _parse_trtllm(text) if text.lstrip().startswith("{") else _parse_prometheus(text)
    for gpu, energy_j in found.energy_j.items():
        if not (math.isfinite(energy_j) and energy_j >= 0):
            raise MeteringError(f"{ENERGY} of GPU {gpu!r} must be a number of joules >= 0, got {energy_j}")
    return found


def _parse_trtllm(text: str) -> ServerMeters:
    try:
        answer = _TrtllmEnergy.model_validate_json(text)
    except ValidationError as error:
        raise MeteringError("the metrics are JSON, but have no 'total_energy_j' as trtllm-serve's have") from error
    return ServerMeters(energy_j={TRTLLM_GPU: answer.total_energy_j}, power_w={})


def _parse_prometheus(text: str) -> ServerMeters:
    wanted = "\n".join(line for line in text.splitlines() if line.startswith((ENERGY, POWER, *DCGM))) + "\n"
    found: dict[str, dict[str, float]] = {ENERGY: {}, POWER: {}}
    try:
        for family in text_string_to_metric_families(wanted):
            for sample in family.samples:
                name, factor = DCGM.get(sample.name, (sample.name, 1.0))
                gpu = sample.labels.get(GPU_LABEL) or sample.labels.get(DCGM_GPU_LABEL)
                if name in found and gpu:
                    found[name][gpu] = factor * float(sample.value)
    except ValueError as error:
        raise MeteringError(f"the metrics are not in Prometheus' text format: {error}") from error
    return ServerMeters(energy_j=found[ENERGY], power_w=found[POWER])


def counters_of(gpus: Sequence[str], meters: ServerMeters) -> dict[str, float]:
    """The counters of an endpoint, J by GPU.

    Args:
        gpus: the endpoint's GPUs; empty for all that the server reports.

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
    """The intervals between readings in order of time. A missed reading only makes an interval longer.

    A counter lower than before was reset with its server: its new value is what it counted since. A GPU that was not
    reported before adds nothing until its second reading, because the start of its counting is unknown.
    """
    intervals: list[Interval] = []
    known: dict[str, float] = {}
    previous: Reading | None = None
    for reading in readings:
        if previous is not None and reading.at_s > previous.at_s:
            used_j: list[float] = []
            restarted = previous.restarted or reading.restarted
            for gpu, energy_j in reading.energy_j.items():
                before_j = known.get(gpu, energy_j)
                restarted |= energy_j < before_j
                used_j.append(energy_j if energy_j < before_j else energy_j - before_j)
            divided = previous.divided or reading.divided
            intervals.append(Interval(previous.at_s, reading.at_s, math.fsum(used_j), restarted, divided))
        known |= reading.energy_j
        previous = reading
    return intervals


class Scraper:
    """Reads one server's counters periodically; one request serves all endpoints behind the same URL."""

    def __init__(
        self,
        url: str,
        gpus: Mapping[str, Sequence[str]],
        *,
        security: TlsFields,
        settings: LedgerSettings,
        storage: Storage,
        clock: Clock,
        metrics: LedgerMetrics,
    ) -> None:
        """Prepare the scraper.

        Args:
            gpus: by endpoint behind the URL, at least one; empty for all GPUs that the server reports.
            security: TLS of an https URL.

        Raises:
            FleetError: a file of `security` cannot be used.
        """
        self._url = url
        self._gpus = gpus
        self._settings = settings
        self._storage = storage
        self._clock = clock
        self._metrics = metrics
        self._problems = dict.fromkeys(gpus, "not read yet")
        secure = httpx.URL(url).scheme == "https"
        self._tls = tls_context(security, endpoint=next(iter(gpus))) if secure else None
        name = security.tls_server_name
        self._extensions = {} if name is None else {"sni_hostname": name}

    def problem(self) -> str | None:
        """Readiness check: which endpoints are unmetered, and why; None if none is."""
        found = [f"endpoint {name} is unmetered: {problem}" for name, problem in self._problems.items() if problem]
        return "; ".join(found) or None

    async def run(self) -> None:
        """Read forever, every `scrape_interval_s`."""
        loop = asyncio.get_running_loop()
        async with self.client() as client:
            due = loop.time()
            while True:
                await self.run_once(client)
                due = max(due + self._settings.scrape_interval_s, loop.time())
                await asyncio.sleep(due - loop.time())

    def client(self) -> httpx.AsyncClient:
        """An HTTP client with the server's TLS settings."""
        return httpx.AsyncClient(
            timeout=self._settings.scrape_timeout_s, verify=True if self._tls is None else self._tls
        )

    async def run_once(self, client: httpx.AsyncClient) -> None:
        """Read the counters and store them. A failure is reported; the next interval is then longer."""
        before = self._clock.now()
        try:
            async with asyncio.timeout(self._settings.scrape_timeout_s):
                response = await client.get(self._url, extensions=self._extensions)
                response.raise_for_status()
            after = self._clock.now()
            meters = parse_meters(response.text)
        except (httpx.HTTPError, TimeoutError, MeteringError) as error:
            for endpoint in self._gpus:
                self._set_problem(endpoint, f"{self._url}: {type(error).__name__} {error}".rstrip())
            return
        counters: dict[str, dict[str, float]] = {}
        for endpoint, gpus in self._gpus.items():
            try:
                counters[endpoint] = counters_of(gpus, meters)
            except MeteringError as error:
                self._set_problem(endpoint, str(error))
        at = before + (after - before) / 2
        spacing = timedelta(seconds=self._settings.scrape_interval_s * self._clock.rate / 2)
        try:
            skipped = await self._storage.add_readings(counters, at=at, spacing=spacing)
        except DatabaseUnavailableError:
            return  # logged, and reported by the readiness check
        for endpoint in counters:
            later = skipped.get(endpoint)
            self._set_problem(
                endpoint,
                ""
                if later is None
                else f"a clock was set back: the last reading is of {later.isoformat()}, readings before it are not "
                "stored; its energy is booked when the clock has passed it",
            )

    def _set_problem(self, endpoint: str, problem: str) -> None:
        if problem:
            self._metrics.scrape_errors.labels(endpoint).inc()
        if problem and self._problems[endpoint] != problem:
            _log.warning("endpoint is unmetered", endpoint=endpoint, reason=problem)
        self._problems[endpoint] = problem


def scrapers_of(
    fleet: Fleet, *, settings: LedgerSettings, storage: Storage, clock: Clock, metrics: LedgerMetrics
) -> list[Scraper]:
    """One scraper for every metrics URL and TLS configuration of the fleet.

    Raises:
        FleetError: a TLS file cannot be used.
    """
    by_url: dict[tuple[str, TlsFields], dict[str, Sequence[str]]] = defaultdict(dict)
    for pool in fleet.pools:
        for endpoint in pool.endpoints:
            if endpoint.metrics is None:
                _log.warning("endpoint has no metrics URL: its calls get no footprint", endpoint=endpoint.name)
            else:
                by_url[str(endpoint.metrics), endpoint.over(pool)][endpoint.name] = endpoint.gpus
    return [
        Scraper(url, gpus, security=security, settings=settings, storage=storage, clock=clock, metrics=metrics)
        for (url, security), gpus in by_url.items()
    ]
