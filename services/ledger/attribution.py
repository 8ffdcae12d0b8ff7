"""Who used the joules of an interval: idle power, the calls that ran in it, or nobody that is known.

metered = sum of the calls' shares + idle + unattributed, always (docs/decisions/0006).
"""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from services.ledger.metering import Interval


@dataclass(frozen=True, slots=True)
class Call:
    """A call on a model server; instants in seconds since the Unix epoch."""

    id: str
    started_s: float
    first_token_s: float | None
    finished_s: float
    prompt_tokens: int
    completion_tokens: int

    def runs_in(self, started_s: float, finished_s: float) -> bool:
        """Whether some of it lies in a span; a call without length lies where it ends."""
        if self.finished_s <= self.started_s:
            return started_s < self.finished_s <= finished_s
        return self.started_s < finished_s and self.finished_s > started_s


@dataclass(frozen=True, slots=True)
class Attribution:
    """An interval's joules by who used them. `shares_j` is by call id, and sums to `attributed_j`."""

    interval: Interval
    idle_j: float
    attributed_j: float
    unattributed_j: float
    shares_j: Mapping[str, float] = field(default_factory=dict)


def attribute(
    intervals: Sequence[Interval], calls: Sequence[Call], *, idle_power_w: float, prefill_weight: float
) -> list[Attribution]:
    """Attribute every interval.

    idle = idle power x length, at most what was metered. The rest is shared in proportion to the work that each call
    did in the interval: tokens generated, plus `prefill_weight` times the prompt's tokens. Where calls ran and none of
    them did any countable work, it is shared by the time that they ran. Without a call it is unattributed.

    Args:
        intervals: in order, without overlap.
        prefill_weight: cost of a prompt's token relative to a generated one, >= 0.
    """
    starts = [interval.started_s for interval in intervals]
    ends = [interval.finished_s for interval in intervals]
    running: list[list[Call]] = [[] for _ in intervals]
    for call in sorted(calls, key=lambda call: call.id):
        # One more on either side than could matter; `runs_in` decides.
        first = max(0, bisect_left(ends, call.started_s) - 1)
        last = min(len(intervals), bisect_right(starts, call.finished_s) + 1)
        for index in range(first, last):
            if call.runs_in(starts[index], ends[index]):
                running[index].append(call)
    return [
        _attribute_one(interval, here, idle_power_w, prefill_weight)
        for interval, here in zip(intervals, running, strict=True)
    ]


def work_in(call: Call, interval: Interval, prefill_weight: float) -> float:
    """Work of a call that falls into an interval, in generated tokens.

    Tokens come evenly between the first one (the start, where it is not known) and the end; the prompt is read evenly
    between the start and the first token.
    """
    first_s = (
        call.started_s if call.first_token_s is None else _clip(call.first_token_s, call.started_s, call.finished_s)
    )
    prompt_until_s = call.finished_s if call.first_token_s is None else first_s
    generated = call.completion_tokens * _share(first_s, call.finished_s, interval)
    read = prefill_weight * call.prompt_tokens * _share(call.started_s, prompt_until_s, interval)
    return generated + read


def _attribute_one(
    interval: Interval, calls: Sequence[Call], idle_power_w: float, prefill_weight: float
) -> Attribution:
    idle_j = min(idle_power_w * interval.length_s, interval.metered_j)
    rest_j = interval.metered_j - idle_j
    if not calls:
        return Attribution(interval, idle_j, 0.0, rest_j)
    weights = [work_in(call, interval, prefill_weight) for call in calls]
    if not math.fsum(weights) > 0:
        weights = [_seconds_in(call, interval) for call in calls]
    total = math.fsum(weights)
    if not total > 0:  # calls without length or tokens
        weights, total = [1.0] * len(calls), float(len(calls))
    shares_j = {call.id: rest_j * (weight / total) for call, weight in zip(calls, weights, strict=True)}
    return Attribution(interval, idle_j, rest_j, 0.0, shares_j)


def _seconds_in(call: Call, interval: Interval) -> float:
    return max(0.0, min(call.finished_s, interval.finished_s) - max(call.started_s, interval.started_s))


def _share(started_s: float, finished_s: float, interval: Interval) -> float:
    """Share of a span that lies in an interval; a span without length lies where it ends."""
    if finished_s <= started_s:
        return 1.0 if interval.started_s < finished_s <= interval.finished_s else 0.0
    inside_s = min(finished_s, interval.finished_s) - max(started_s, interval.started_s)
    return max(0.0, inside_s) / (finished_s - started_s)


def _clip(value: float, low: float, high: float) -> float:
    return max(low, min(value, high))
