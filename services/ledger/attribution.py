"""Attribution: which calls used the energy and the time of an endpoint's server, interval by interval.

For every interval between two readings of the meter:

    metered energy = idle energy + the calls' shares + unattributed energy
    length         = idle time   + the calls' shares

**Energy.** Idle energy is idle power x length, at most all of it. The rest belongs to the calls. A server with
in-flight batching generates in steps; a step takes `step_j` joules whatever the batch, and `token_j` for each sequence
in it (`shared.batch_curve`). So the shared part of a step is divided in equal parts among the sequences that decode in
it, and the other part by their tokens. The parts are scaled so that they sum to what the meter says.

**Steps are not observed.** A call's tokens are spread evenly from one token's time before its first token to its end,
because the step that ended with the first token began then. The n(t) calls that decode at t advance at the same speed
v(t), in steps per second. Once the time of a step is learned, v = 1 / (step_s + token_s n); until then v is the mean of
the calls' token rates. The server makes v dt steps, and v / n dt of them are each call's share. These functions are
constant between the calls' starts and ends; `_Timeline` integrates them in one sweep.

**Without a known curve** the rest is divided by tokens: generated ones, plus `prefill_weight` x those of the prompt,
which are spread evenly from the start to the first token. If no running call made tokens in the interval, the calls
share it by running time. Without calls it is unattributed.

**Time.** At every moment the calls that run on the endpoint share the server's time equally.

Pure arithmetic of this project (docs/decisions/0006); no library does it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from services.ledger.meters import Interval
from shared.batch_curve import BatchCurve

Floats = NDArray[np.float64]


class Call(NamedTuple):
    """A call on a model server. Times in seconds since the Unix epoch, event time."""

    id: str
    started_s: float
    first_token_s: float | None
    finished_s: float
    prompt_tokens: int
    completion_tokens: int

    def runs_in(self, started_s: float, finished_s: float) -> bool:
        """Whether the call overlaps a span. A call of zero duration belongs to the span that contains its end."""
        if self.finished_s <= self.started_s:
            return started_s < self.finished_s <= finished_s
        return self.started_s < finished_s and self.finished_s > started_s

    @property
    def reads_until_s(self) -> float:
        """Time of the first token, at which the prompt has been read; the end, if the first token is unknown."""
        if self.first_token_s is None:
            return self.finished_s
        return max(self.started_s, min(self.first_token_s, self.finished_s))

    @property
    def token_time_s(self) -> float | None:
        """Seconds per generated token, from the first one to the last; None if that is unknown."""
        if self.first_token_s is None or self.completion_tokens < 2 or self.reads_until_s >= self.finished_s:
            return None
        return (self.finished_s - self.reads_until_s) / (self.completion_tokens - 1)

    @property
    def decodes_from_s(self) -> float:
        """Begin of the step that made the first token; the end, if there is no second token."""
        if self.token_time_s is not None:
            return max(self.started_s, self.reads_until_s - self.token_time_s)
        if self.completion_tokens > 1 or self.first_token_s is None:
            return self.started_s
        return self.finished_s


@dataclass(frozen=True, slots=True)
class Speed:
    """Time of a decode step of n sequences: step_s + token_s * n, seconds; step_s > 0."""

    step_s: float
    token_s: float


class CallUse(NamedTuple):
    """A call's part of one interval.

    Attributes:
        energy_j: its share of the energy.
        server_s: its share of the server's time.
        steps: decode steps that the server made while the call decoded.
        batch_tokens: tokens that all calls generated in these steps; by steps, the mean batch.
    """

    energy_j: float = 0.0
    server_s: float = 0.0
    steps: float = 0.0
    batch_tokens: float = 0.0


@dataclass(frozen=True, slots=True)
class Work:
    """What a server did in one interval.

    Attributes:
        steps: decode steps.
        tokens: generated tokens, at the server's speed at that time.
        prompt_tokens: tokens of prompts that were read.
    """

    steps: float = 0.0
    tokens: float = 0.0
    prompt_tokens: float = 0.0


@dataclass(frozen=True, slots=True, eq=False)
class Attribution:
    """The energy and time of one interval, by user.

    Attributes:
        idle_s: time in which no call ran.
        ids: of all calls that were given.
        calls: the calls that ran in the interval, as indices of `ids`; each once.
        parts: their uses, a row each with the fields of `CallUse`.
    """

    interval: Interval
    idle_j: float
    attributed_j: float
    unattributed_j: float
    idle_s: float
    work: Work
    ids: Sequence[str]
    calls: NDArray[np.intp]
    parts: Floats

    @property
    def uses(self) -> dict[str, CallUse]:
        """By call id; every call that ran in the interval."""
        return {self.ids[call]: CallUse(*part) for call, part in zip(self.calls, self.parts.tolist(), strict=True)}

    @property
    def shares_j(self) -> dict[str, float]:
        """Energy by call id, J; sums to `attributed_j`."""
        return {name: use.energy_j for name, use in self.uses.items()}


def attribute(
    intervals: Sequence[Interval],
    calls: Sequence[Call],
    *,
    idle_power_w: float,
    prefill_weight: float,
    curve: BatchCurve | None = None,
    speed: Speed | None = None,
) -> list[Attribution]:
    """Attribute the energy and the time of every interval.

    Args:
        intervals: in order of time, not overlapping.
        idle_power_w: power of the endpoint without calls, W.
        prefill_weight: cost of a prompt token relative to a generated token, >= 0; used without a curve.
        curve: the endpoint's energy by batch size; None: by tokens.
        speed: the endpoint's speed by batch size; None: from the calls' token rates.
    """
    if not intervals:
        return []
    # In the order of their ids, so that sums do not depend on the order in which the calls are given.
    order = sorted(range(len(calls)), key=lambda index: calls[index].id)
    ordered = [calls[index] for index in order]
    starts = np.array([one.started_s for one in intervals])
    ends = np.array([one.finished_s for one in intervals])
    timeline = _Timeline(ordered, speed)
    pairs = _Pairs(timeline, starts, ends)
    steps, tokens = (
        timeline.between(name, starts - timeline.base_s, ends - timeline.base_s) for name in ("steps", "batch_tokens")
    )
    tokens += pairs.by_interval(pairs.single_tokens)
    shares = pairs.shares(_weights(pairs, prefill_weight, curve))
    prompt_tokens = pairs.by_interval(pairs.prompt_tokens)
    busy_s = pairs.by_interval(pairs.server_s)
    rest_j = [one.metered_j - min(idle_power_w * one.length_s, one.metered_j) for one in intervals]
    energy_j = np.array(rest_j)[pairs.interval] * shares
    parts = np.stack((energy_j, pairs.server_s, pairs.steps, pairs.batch_tokens), axis=1)
    users = np.array(order, dtype=np.intp)[pairs.call]
    by_interval = np.argsort(pairs.interval, kind="stable")
    bounds = np.searchsorted(pairs.interval[by_interval], np.arange(len(intervals) + 1))
    rows = [by_interval[bounds[index] : bounds[index + 1]] for index in range(len(intervals))]
    ids = [call.id for call in calls]
    return [
        Attribution(
            interval=one,
            idle_j=one.metered_j - rest_j[index],
            attributed_j=rest_j[index] if rows[index].size else 0.0,
            unattributed_j=0.0 if rows[index].size else rest_j[index],
            idle_s=max(0.0, one.length_s - float(busy_s[index])),
            work=Work(float(steps[index]), float(tokens[index]), float(prompt_tokens[index])),
            ids=ids,
            calls=users[rows[index]],
            parts=parts[rows[index]],
        )
        for index, one in enumerate(intervals)
    ]


def work_between(
    calls: Sequence[Call],
    since_s: float,
    until_s: float,
    *,
    prefill_weight: float,
    curve: BatchCurve | None = None,
    speed: Speed | None = None,
) -> tuple[float, float]:
    """What the calls used of a span, in the unit of their shares: by work, and by running time where there is none.

    An interval's energy can be divided over its parts in these proportions; each call then gets the same as from the
    whole.

    Args:
        since_s, until_s: seconds since the Unix epoch.
        prefill_weight, curve, speed: see `attribute`.
    """
    pairs = _Pairs(_Timeline(calls, speed), np.array([since_s]), np.array([until_s]))
    return float(_weights(pairs, prefill_weight, curve).sum()), float(pairs.running_s.sum())


def _weights(pairs: "_Pairs", prefill_weight: float, curve: BatchCurve | None) -> Floats:
    """The weight of every call in every interval: its share is this divided by the interval's sum."""
    if curve is None:
        return pairs.tokens + prefill_weight * pairs.prompt_tokens
    return curve.step_j * pairs.shared_steps + curve.token_j * pairs.tokens + curve.prompt_token_j * pairs.prompt_tokens


_SHORTEST_DECODE_S = 1e-6
"""A call that decodes for a shorter time has no speed: times are exact to the microsecond."""


class _Timeline:
    """Load of an endpoint over time: functions that are constant between the calls' starts and ends, integrated.

    O(n log n) for n calls. Times are relative to `base_s`, which keeps their precision.
    """

    def __init__(self, calls: Sequence[Call], speed: Speed | None) -> None:
        self.base_s = min((call.started_s for call in calls), default=0.0)
        started = np.array([call.started_s for call in calls], dtype=np.float64)
        finished = np.array([call.finished_s for call in calls], dtype=np.float64)
        first = np.array([call.first_token_s for call in calls], dtype=np.float64)  # None becomes NaN
        self.tokens = np.array([call.completion_tokens for call in calls], dtype=np.float64)
        self.prompt_tokens = np.array([call.prompt_tokens for call in calls], dtype=np.float64)
        # As the properties of `Call`.
        reads_until = np.where(np.isnan(first), finished, np.maximum(started, np.minimum(first, finished)))
        timed = ~np.isnan(first) & (self.tokens >= 2) & (reads_until < finished)
        token_time = (finished - reads_until) / np.maximum(self.tokens - 1, 1.0)
        untimed = np.where((self.tokens > 1) | np.isnan(first), started, finished)
        decodes_from = np.where(timed, np.maximum(started, reads_until - token_time), untimed)
        self.started_s, self.finished_s = started - self.base_s, finished - self.base_s
        self.reads_until_s, self.decodes_from_s = reads_until - self.base_s, decodes_from - self.base_s
        decoding_s = self.finished_s - self.decodes_from_s
        decodes = (decoding_s >= _SHORTEST_DECODE_S) & (self.tokens > 0)
        rates = np.divide(self.tokens, decoding_s, out=np.zeros_like(self.tokens), where=decodes)
        times = np.unique(np.concatenate((self.started_s, self.decodes_from_s, self.finished_s)))
        self._times_s = times if times.size else np.zeros(1)
        lengths = np.diff(self._times_s)
        runs = self._level(self.started_s, self.finished_s, np.ones_like(self.tokens))
        batch = self._level(self.decodes_from_s[decodes], self.finished_s[decodes], np.ones(int(decodes.sum())))
        size, running = np.maximum(batch, 1.0), np.maximum(runs, 1.0)
        if speed is None:
            rate = self._level(self.decodes_from_s[decodes], self.finished_s[decodes], rates[decodes]) / size
        else:
            rate = 1.0 / (speed.step_s + speed.token_s * size)
        steps_per_s = np.where(batch > 0, rate, 0.0)
        self._integrals = {
            "server_s": self._integral(lengths, (runs > 0) / running),
            "steps": self._integral(lengths, steps_per_s),
            "shared_steps": self._integral(lengths, steps_per_s / size),
            "batch_tokens": self._integral(lengths, steps_per_s * batch),
        }

    def _level(self, since: Floats, until: Floats, heights: Floats) -> Floats:
        """Sum of the heights of the spans that cover each piece of time."""
        changes = np.zeros(self._times_s.size)
        np.add.at(changes, np.searchsorted(self._times_s, since), heights)
        np.subtract.at(changes, np.searchsorted(self._times_s, until), heights)
        return np.maximum(np.cumsum(changes)[:-1], 0.0)

    @staticmethod
    def _integral(lengths: Floats, values: Floats) -> Floats:
        return np.concatenate((np.zeros(1), np.cumsum(lengths * values)))

    def between(self, name: str, since: Floats, until: Floats) -> Floats:
        """The integral of a function over spans; 0 for one that ends before it starts."""
        integral = self._integrals[name]
        found: Floats = np.interp(until, self._times_s, integral) - np.interp(since, self._times_s, integral)
        between: Floats = np.where(until > since, np.maximum(found, 0.0), 0.0)
        return between


class _Pairs:
    """Every call with every interval that it overlaps, and the call's quantities in that interval."""

    def __init__(self, timeline: _Timeline, starts: Floats, ends: Floats) -> None:
        starts, ends = starts - timeline.base_s, ends - timeline.base_s
        self._intervals = starts.size
        momentary = timeline.finished_s <= timeline.started_s
        first = np.where(
            momentary,
            np.searchsorted(ends, timeline.finished_s, "left"),
            np.searchsorted(ends, timeline.started_s, "right"),
        )
        last = np.searchsorted(starts, timeline.finished_s, "left")
        count = np.maximum(last - first, 0)
        self.call = np.repeat(np.arange(count.size), count)
        offset = np.arange(self.call.size) - np.repeat(np.cumsum(count) - count, count)
        self.interval = first[self.call] + offset
        since, until = starts[self.interval], ends[self.interval]

        def within(begin: Floats, end: Floats) -> tuple[Floats, Floats]:
            return np.maximum(begin[self.call], since), np.minimum(end[self.call], until)

        def part(begin: Floats, end: Floats) -> Floats:
            """Share of a span within the interval. A span of zero duration belongs to the interval with its end."""
            low, high = within(begin, end)
            length, moment = (end - begin)[self.call], end[self.call]
            inside = ((since < moment) & (moment <= until)).astype(np.float64)
            found: Floats = np.divide(np.maximum(high - low, 0.0), length, out=inside, where=length > 0)
            return found

        running = within(timeline.started_s, timeline.finished_s)
        self.running_s = np.maximum(running[1] - running[0], 0.0)
        self.server_s = timeline.between("server_s", *running)
        decoding = within(timeline.decodes_from_s, timeline.finished_s)
        decodes = (timeline.tokens > 0)[self.call]
        self.steps, self.shared_steps, self.batch_tokens = (
            np.where(decodes, timeline.between(name, *decoding), 0.0)
            for name in ("steps", "shared_steps", "batch_tokens")
        )
        self.tokens = timeline.tokens[self.call] * part(timeline.decodes_from_s, timeline.finished_s)
        single = (timeline.finished_s <= timeline.decodes_from_s)[self.call]
        self.single_tokens = np.where(single, self.tokens, 0.0)
        self.prompt_tokens = timeline.prompt_tokens[self.call] * part(timeline.started_s, timeline.reads_until_s)

    def by_interval(self, values: Floats) -> Floats:
        """Sums over the calls of each interval."""
        return np.bincount(self.interval, weights=values, minlength=self._intervals).astype(np.float64)

    def shares(self, weights: Floats) -> Floats:
        """Shares of the calls in an interval; they sum to 1. By running time where no call has a weight."""
        for fallback in (self.running_s, np.ones_like(weights)):
            without = ~(self.by_interval(weights) > 0)
            weights = np.where(without[self.interval], fallback, weights)
        shares: Floats = weights / self.by_interval(weights)[self.interval]
        return shares
