"""Reads the energy counters of every server, over and over: one request serves all endpoints on the same URL."""

import asyncio
from collections import defaultdict
from collections.abc import Mapping, Sequence
from datetime import timedelta

import httpx

from services.ledger.metering import MeteringError, counters_of, parse_meters
from services.ledger.metrics import LedgerMetrics
from services.ledger.storage import AWAY_ERRORS, Storage
from shared.fleet import Fleet, TlsFields, tls_context
from shared.runtime.clock import Clock
from shared.runtime.logs import get_logger

_log = get_logger(__name__)


class Scraper:
    """Reads one server's counters."""

    def __init__(
        self,
        url: str,
        gpus: Mapping[str, Sequence[str]],
        *,
        security: TlsFields,
        storage: Storage,
        clock: Clock,
        metrics: LedgerMetrics,
        interval_s: float,
        timeout_s: float,
    ) -> None:
        """Nothing is read yet.

        Args:
            gpus: of each endpoint behind the URL, one at least; empty for all that the server reports.
            security: of an https URL.
            interval_s: wall seconds from one reading to the next.
            timeout_s: wall seconds for one.

        Raises:
            FleetError: a file of `security` cannot be used.
        """
        self._url = url
        self._gpus = gpus
        self._storage = storage
        self._clock = clock
        self._metrics = metrics
        self._interval_s = interval_s
        self._timeout_s = timeout_s
        self._complaints = dict.fromkeys(gpus, "not read yet")
        secure = httpx.URL(url).scheme == "https"
        self._tls = tls_context(security, endpoint=next(iter(gpus))) if secure else None
        name = security.tls_server_name
        self._extensions = {} if name is None else {"sni_hostname": name}

    def problem(self) -> str | None:
        """Which endpoints are unmetered, and why."""
        found = [
            f"endpoint {name} is unmetered: {complaint}" for name, complaint in self._complaints.items() if complaint
        ]
        return "; ".join(found) or None

    async def run(self) -> None:
        """Read for ever."""
        loop = asyncio.get_running_loop()
        async with self.client() as client:
            due = loop.time()
            while True:
                await self.turn(client)
                due = max(due + self._interval_s, loop.time())
                await asyncio.sleep(due - loop.time())

    def client(self) -> httpx.AsyncClient:
        """To read with."""
        return httpx.AsyncClient(timeout=self._timeout_s, verify=True if self._tls is None else self._tls)

    async def turn(self, client: httpx.AsyncClient) -> None:
        """Read once; a failure is noted, and makes a longer interval of the next success."""
        before = self._clock.now()
        try:
            async with asyncio.timeout(self._timeout_s):
                answer = await client.get(self._url, extensions=self._extensions)
                answer.raise_for_status()
            after = self._clock.now()
            meters = parse_meters(answer.text)
        except (httpx.HTTPError, TimeoutError, MeteringError) as error:
            for endpoint in self._gpus:
                self._complain(endpoint, f"{self._url}: {type(error).__name__} {error}".rstrip())
            return
        counters: dict[str, dict[str, float]] = {}
        for endpoint, gpus in self._gpus.items():
            try:
                counters[endpoint] = counters_of(gpus, meters)
            except MeteringError as error:
                self._complain(endpoint, str(error))
        try:
            await self._storage.add_readings(
                counters,
                at=before + (after - before) / 2,
                spacing=timedelta(seconds=self._interval_s * self._clock.rate / 2),
            )
        except AWAY_ERRORS as error:
            self._storage.note(error)
            return
        for endpoint in counters:
            self._complain(endpoint, "")

    def _complain(self, endpoint: str, complaint: str) -> None:
        if complaint:
            self._metrics.scrape_errors.labels(endpoint).inc()
        if complaint and self._complaints[endpoint] != complaint:
            _log.warning("endpoint is unmetered", endpoint=endpoint, reason=complaint)
        self._complaints[endpoint] = complaint


def scrapers_of(
    fleet: Fleet, *, storage: Storage, clock: Clock, metrics: LedgerMetrics, interval_s: float, timeout_s: float
) -> list[Scraper]:
    """One scraper for every metrics URL of the fleet, and way to secure it.

    Raises:
        FleetError: a file for TLS cannot be used.
    """
    by_url: dict[tuple[str, TlsFields], dict[str, Sequence[str]]] = defaultdict(dict)
    for pool in fleet.pools:
        for endpoint in pool.endpoints:
            if endpoint.metrics is None:
                _log.warning("endpoint has no metrics URL: its calls get no footprint", endpoint=endpoint.name)
            else:
                by_url[str(endpoint.metrics), endpoint.over(pool)][endpoint.name] = endpoint.gpus
    return [
        Scraper(
            url,
            gpus,
            security=security,
            storage=storage,
            clock=clock,
            metrics=metrics,
            interval_s=interval_s,
            timeout_s=timeout_s,
        )
        for (url, security), gpus in by_url.items()
    ]
