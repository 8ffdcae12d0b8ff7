"""A simulation of routers that dispatch requests to the same endpoints, without real time."""

import heapq
import math
import random
from collections.abc import Callable
from dataclasses import dataclass

from shared.inference.balancer import Balancer, CircuitBreakerSettings
from shared.pools import Dispatch

LOW, HIGH = 0.1, 0.85
"""Load at night and at the peak, as shares of what all endpoints carry at their targets."""


def exponential(rng: random.Random) -> float:
    """Call times, mean 1."""
    return rng.expovariate(1.0)


def long_tailed(rng: random.Random) -> float:
    """Call times as of chat answers: lognormal, mean 1."""
    return rng.lognormvariate(-0.32, 0.8)


@dataclass(frozen=True, slots=True)
class Day:
    """What happened; shares and means are of the time.

    Attributes:
        close: share of the time with at most one endpoint in use more than the fewest that could carry the load.
        in_use: mean number of endpoints with a request in flight, of any router.
        fewest: mean number of the fewest endpoints that could carry the load at their targets.
        filled: how often an endpoint that was empty got a request.
        above_target: share of the requests that were sent to an endpoint with a tenth more than its target.
    """

    close: float
    in_use: float
    fewest: float
    filled: int
    above_target: float


def simulate(
    *,
    endpoints: int,
    target: int,
    routers: int,
    dispatch: Dispatch,
    seed: int,
    call_time: Callable[[random.Random], float] = exponential,
    day: float,
) -> Day:
    """A day with a diurnal load; every request goes to a random router, which knows only its own requests.

    Args:
        target: requests that an endpoint is to have at once.
        day: its length in mean call times; a day of calls of 20 s is 4,320 of them.
    """
    rng = random.Random(seed)
    names = [f"e{number}" for number in range(endpoints)]
    balancers = [Balancer(dict.fromkeys(names), CircuitBreakerSettings(), dispatch=dispatch) for _ in range(routers)]
    for balancer in balancers:
        balancer.set_targets(dict.fromkeys(names, target), share=1.0 / routers)
    in_flight = dict.fromkeys(names, 0)
    ends: list[tuple[float, int, str]] = []
    peak = HIGH * endpoints * target
    now = measured = close = in_use_time = fewest_time = 0.0
    total = in_use = filled = arrivals = above = 0
    arrival = rng.expovariate(peak)
    while now < day:
        then = min(arrival, ends[0][0] if ends else math.inf)
        span, fewest = then - now, math.ceil(total / target)
        measured += span
        close += span * (in_use <= fewest + 1)
        in_use_time += span * in_use
        fewest_time += span * fewest
        now = then
        if then == arrival:
            arrival = now + rng.expovariate(peak)
            load = LOW + (HIGH - LOW) * (0.5 - 0.5 * math.cos(2 * math.pi * now / day))
            if rng.random() * HIGH >= load:
                continue
            router = rng.randrange(routers)
            name = balancers[router].choose(now)
            assert name is not None
            balancers[router].began(name)
            arrivals += 1
            above += in_flight[name] > 1.1 * target
            filled += in_flight[name] == 0
            in_use += in_flight[name] == 0
            in_flight[name] += 1
            total += 1
            heapq.heappush(ends, (now + call_time(rng), router, name))
        else:
            _, router, name = heapq.heappop(ends)
            balancers[router].ended(name, probe=False)
            in_flight[name] -= 1
            in_use -= in_flight[name] == 0
            total -= 1
    return Day(close / measured, in_use_time / measured, fewest_time / measured, filled, above / arrivals)
