"""What other services report: calls that are running, and endpoints that are kept awake."""

import time
from bisect import bisect_right, insort
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from services.ledger.settings import LedgerSettings
from shared.fleet import Fleet
from shared.messages import LoadReport, PoolCapacity
from shared.pools import Pool
from shared.runtime.clock import Clock
from shared.runtime.logs import get_logger

LISTEN_S = 3.0
"""Wall seconds after the first settlement is wanted, in which all instances report at least once."""

_WHOLE = 0.999
"""Share of the partitions of `requests` from which on no router is missing."""
_KEPT_MESSAGES = 1_000

_log = get_logger(__name__)


@dataclass(slots=True)
class _Instance:
    """A router or evaluator: its reports in order of time, and the wall time at which the last one arrived."""

    reports: list[LoadReport] = field(default_factory=list)
    received_s: float = 0.0


class RunningCalls:
    """Limits the settlement of every endpoint to the time before the calls that are still running.

    A report says: at the time t, no call on this endpoint was running that had started before s. Once the messages of
    all calls that had ended by t are in PostgreSQL, every call that started before min(s, t) is known. A message may
    reach Kafka `settle_margin_s` after the end of its call, so a report counts from that age on.

    The instances that report must be all that there are: as long as the shares of the routers do not add up to the
    whole topic `requests`, an endpoint is also settled no sooner than `settle_delay_s`.
    """

    def __init__(
        self,
        fleet: Fleet,
        *,
        settings: LedgerSettings,
        clock: Clock,
        wall_s: Callable[[], float] = time.monotonic,
    ) -> None:
        """Nothing is reported yet.

        Args:
            wall_s: wall clock, for tests.
        """
        self._pools: dict[str, Pool] = {endpoint.name: pool for pool in fleet.pools for endpoint in pool.endpoints}
        self._settings = settings
        self._rate = clock.rate
        self._wall_s = wall_s
        self._asked_s: float | None = None
        self._instances: dict[str, _Instance] = {}
        self._capped: set[str] = set()

    def update(self, reports: Iterable[LoadReport]) -> None:
        """Take note of reports."""
        for report in reports:
            instance = self._instances.setdefault(report.instance, _Instance())
            insort(instance.reports, report, key=lambda one: one.at)
            # Any of them may be left out: an older one only limits more.
            del instance.reports[1:-_KEPT_MESSAGES]
            instance.received_s = self._wall_s()

    def limits(self, watermark: datetime) -> dict[str, datetime]:
        """The time up to which each endpoint can be settled.

        Args:
            watermark: time up to which every published call is in PostgreSQL.

        Returns:
            By endpoint. One is missing while a new instance has not reported for long enough; all are shortly after the
            start.
        """
        now_s = self._wall_s()
        if self._asked_s is None:
            self._asked_s = now_s
        if now_s - self._asked_s < LISTEN_S:
            return {}
        known_until = watermark - self._event(self._settings.settle_margin_s)
        self._forget(known_until)
        latest = watermark - timedelta(seconds=self._settings.settle_delay_s)
        earliest = watermark - self._event(self._settings.settle_max_wait_s)
        limits = {}
        for endpoint, pool in self._pools.items():
            reports = self._reports(endpoint)
            if not reports:
                limits[endpoint] = latest
                continue
            if any(report.at > known_until for report, _ in reports):
                continue  # calls that ended just before an instance's first report may still be on their way
            starts = [oldest for _, oldest in reports if oldest is not None]
            limit = min([known_until, *(report.at for report, _ in reports), *starts])
            self._report_cap(endpoint, capped=limit < earliest)
            limit = max(limit, earliest)
            limits[endpoint] = limit if self._all_report(pool) else min(limit, latest)
        return limits

    def _event(self, wall_s: float) -> timedelta:
        return timedelta(seconds=wall_s * self._rate)

    def _forget(self, known_until: datetime) -> None:
        """Remove reports that a later one replaces, and instances that have stopped or do not report any more."""
        for name, instance in list(self._instances.items()):
            usable = [index for index, report in enumerate(instance.reports) if report.at <= known_until]
            if usable:
                del instance.reports[: usable[-1]]
            if usable and instance.reports[0].final:
                del self._instances[name]
            elif self._wall_s() - instance.received_s > self._settings.report_timeout_s:
                del self._instances[name]
                if not instance.reports[-1].final:
                    _log.warning("an instance has stopped reporting; its calls are not waited for", instance=name)

    def _reports(self, endpoint: str) -> list[tuple[LoadReport, datetime | None]]:
        """The reports to go by, one of each instance, with the start of the oldest call on an endpoint."""
        return [
            (instance.reports[0], load.endpoints[endpoint].oldest_started_at)
            for instance in self._instances.values()
            for load in instance.reports[0].pools
            if endpoint in load.endpoints
        ]

    def _all_report(self, pool: Pool) -> bool:
        """Whether all routers report, or for the judge's pool an evaluator."""
        latest = [one.reports[-1] for one in self._instances.values()]
        if pool.model is None:
            return any(report.service == "evaluator" for report in latest)
        return sum(report.share for report in latest if report.service == "router") >= _WHOLE

    def _report_cap(self, endpoint: str, *, capped: bool) -> None:
        if capped and endpoint not in self._capped:
            _log.warning(
                "a call has been running for too long; its endpoint is settled without it",
                endpoint=endpoint,
                after_s=self._settings.settle_max_wait_s,
            )
        (self._capped.add if capped else self._capped.discard)(endpoint)


class AwakeEndpoints:
    """Which endpoints were needed, from the topic `capacity`; the others may have been put to sleep."""

    def __init__(self) -> None:
        self._messages: dict[str, list[PoolCapacity]] = defaultdict(list)

    def update(self, messages: Iterable[PoolCapacity]) -> None:
        """Take note of messages."""
        for message in messages:
            known = self._messages[message.pool]
            insort(known, message, key=lambda one: one.at)
            del known[:-_KEPT_MESSAGES]

    def kept(self, pool: str, endpoint: str, since_s: float, until_s: float) -> bool:
        """Whether an endpoint was needed all the time between two times, seconds.

        Without any message, and after the end of a message's validity, all endpoints are. Before the first message that
        this process knows, none is known to be.
        """
        known = tuple(self._messages.get(pool, ()))  # a copy: it is asked in a thread
        if not known:
            return True
        first = bisect_right(known, since_s, key=lambda one: one.at.timestamp()) - 1
        if first < 0:
            return False
        for index in range(first, len(known)):
            message, following = known[index], known[index + 1 : index + 2]
            if message.at.timestamp() >= until_s:
                break
            end_s = min(one.timestamp() for one in (message.valid_until, *(later.at for later in following)))
            if end_s > since_s and endpoint not in message.awake:
                return False
        return True
