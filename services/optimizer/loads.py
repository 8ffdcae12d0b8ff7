"""The load of every pool, from the load reports of routers and evaluators. No I/O."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from shared.messages import LoadReport


@dataclass(frozen=True, slots=True)
class PoolDemand:
    """What a pool has to do now, all instances together.

    Attributes:
        arrivals_per_s: requests per event second.
        in_flight: requests that run or wait.
        waiting: those of them that wait for an endpoint.
        running: those of them that run, by endpoint.
        evaluation: those of them that evaluators run, by endpoint.
    """

    arrivals_per_s: float
    in_flight: int
    waiting: int = 0
    running: Mapping[str, int] = field(default_factory=dict)
    evaluation: Mapping[str, int] = field(default_factory=dict)


@dataclass(slots=True)
class _Instance:
    """One router or evaluator.

    Attributes:
        report: the last one.
        received_s: when it was received, wall.
        arrivals: by pool, since the demand was last read.
        seconds: event seconds that `arrivals` are of.
        rates: arrivals per event second by pool, when they were last known.
    """

    report: LoadReport
    received_s: float
    arrivals: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    rates: dict[str, float] = field(default_factory=dict)


class LoadReports:
    """The last report of every instance that is alive."""

    def __init__(self, expiry_s: float) -> None:
        """Start without reports.

        Args:
            expiry_s: an instance that has not reported for so long, wall, is not counted any more.
        """
        self._expiry_s = expiry_s
        self._instances: dict[str, _Instance] = {}
        self._complete_s = math.inf

    def update(self, report: LoadReport, *, wall_s: float) -> None:
        """Take a report that was received at a wall time."""
        if report.final:
            self._instances.pop(report.instance, None)
            return
        one = self._instances.setdefault(report.instance, _Instance(report, wall_s))
        if report.at < one.report.at:
            return
        one.report, one.received_s = report, wall_s
        one.seconds += report.interval_s
        for pool in report.pools:
            one.arrivals[pool.pool] = one.arrivals.get(pool.pool, 0) + pool.arrivals

    def demand(self, *, wall_s: float) -> Mapping[str, PoolDemand] | None:
        """The demand by pool at a wall time.

        Arrivals are those since the last call; an instance that has not reported since has its last rate.

        Returns:
            None if nothing is known: no router is alive, or the first one has just reported and others have yet to.
        """
        self._instances = {
            name: one for name, one in self._instances.items() if wall_s - one.received_s <= self._expiry_s
        }
        if not any(one.report.service == "router" for one in self._instances.values()):
            self._complete_s = math.inf
            return None
        # An instance that does not report for so long is gone, so by then all others have reported.
        self._complete_s = min(self._complete_s, wall_s + self._expiry_s)
        if wall_s < self._complete_s:
            return None
        rates: dict[str, list[float]] = {}
        waiting: Counter[str] = Counter()
        running: dict[str, Counter[str]] = {}
        evaluation: dict[str, Counter[str]] = {}
        for one in self._instances.values():
            if one.seconds > 0.0:
                one.rates = {pool: number / one.seconds for pool, number in one.arrivals.items()}
                one.arrivals, one.seconds = {}, 0.0
            for load in one.report.pools:
                rates.setdefault(load.pool, []).append(one.rates.get(load.pool, 0.0))
                waiting[load.pool] += load.waiting
                in_flight = {name: endpoint.in_flight for name, endpoint in load.endpoints.items()}
                running.setdefault(load.pool, Counter()).update(in_flight)
                if one.report.service == "evaluator":
                    evaluation.setdefault(load.pool, Counter()).update(in_flight)
        return {
            pool: PoolDemand(
                arrivals_per_s=math.fsum(rates[pool]),
                in_flight=waiting[pool] + endpoints.total(),
                waiting=waiting[pool],
                running=endpoints,
                evaluation=evaluation.get(pool, {}),
            )
            for pool, endpoints in running.items()
        }
