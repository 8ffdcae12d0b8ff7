"""The meter of a trial: the energy counters of a pool's endpoints, read before and after each directive."""

import math
from collections.abc import Sequence
from datetime import datetime

import httpx

from services.ledger.meters import MeteringError, Reading, counters_of, intervals_between, parse_meters
from shared.fleet import tls_context
from shared.pools import Pool


class PoolMeter:
    """Energy of a pool's endpoints, idle energy and that of other requests included.

    Attributes:
        problem: why the pool is unmetered; None: every reading so far succeeded.
    """

    def __init__(self, pool: Pool, *, timeout_s: float) -> None:
        """Create; nothing connects yet.

        Args:
            timeout_s: of reading one endpoint, wall.
        """
        self._pool = pool
        self._timeout_s = timeout_s
        without = [endpoint.name for endpoint in pool.endpoints if endpoint.metrics is None]
        self.problem = f"endpoint {without[0]} has no 'metrics' in the fleet file" if without else None

    async def read(self, at: datetime) -> list[Reading]:
        """The counters of every endpoint; empty if the pool is unmetered."""
        found: list[Reading] = []
        for endpoint in self._pool.endpoints if self.problem is None else ():
            security = endpoint.over(self._pool)
            secure = endpoint.metrics is not None and endpoint.metrics.scheme == "https"
            verify = tls_context(security, endpoint=endpoint.name) if secure else True
            extensions = {} if security.tls_server_name is None else {"sni_hostname": security.tls_server_name}
            try:
                async with httpx.AsyncClient(timeout=self._timeout_s, verify=verify) as client:
                    response = await client.get(str(endpoint.metrics), extensions=extensions)
                response.raise_for_status()
                counters = counters_of(endpoint.gpus, parse_meters(response.text))
            except (httpx.HTTPError, MeteringError) as error:
                self.problem = f"the meter of endpoint {endpoint.name} cannot be read: {error or type(error).__name__}"
                return []
            found.append(Reading(at.timestamp(), counters))
        return found

    def joules(self, before: Sequence[Reading], after: Sequence[Reading]) -> float | None:
        """Energy between two readings, J; None if the pool is unmetered or a counter was reset."""
        if self.problem is not None:
            return None
        intervals = [one for pair in zip(before, after, strict=True) for one in intervals_between(pair)]
        if any(one.restarted for one in intervals):
            self.problem = "a model server was restarted during the trial"
            return None
        return math.fsum(one.metered_j for one in intervals)
