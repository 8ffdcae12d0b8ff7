"""Simulates in-flight batching in event time: each sequence's progress, and the energy of all.

The simulation is exact and does not loop over tokens. All running sequences have the same speed, which falls as more of
them run, so one virtual clock serves them all: `progress`, in seconds of work of a sequence that runs alone. A sequence
that would take `time_s` seconds alone ends when the clock has advanced by `time_s` since its admission. Between two
arrivals or endings the speed is constant, and the state follows in closed form, whatever the caller's step size.

`BatchRules` is the only place that knows how batch size acts on speed and energy (`slots`, `speed`, `energy_factor`). A
measured power curve (joules and seconds per decode step as functions of the batch size) replaces that class alone.
"""

import heapq
import itertools
import math
from collections import deque
from dataclasses import dataclass, field

from deploy.triton.stand_in.answers import PlannedAnswer

_ROUNDING = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchRules:
    """How the batch size acts on speed and energy.

    Attributes:
        slots: sequences that run at once; further ones wait in a queue, first in, first out.
        slowdown: each further sequence lengthens the time per token by this share:
            speed = 1 / (1 + slowdown * (n - 1)).
        shared_energy: share of a sequence's energy that all running sequences have in common (reading the weights):
            its energy is multiplied by (1 - shared_energy) + shared_energy / n. With 0, each request takes the same
            energy at any batch size.
    """

    slots: int = 64
    slowdown: float = 0.02
    shared_energy: float = 0.0

    def __post_init__(self) -> None:
        if self.slots < 1:
            raise ValueError(f"'slots' must be at least 1, got {self.slots}")
        if not self.slowdown >= 0:
            raise ValueError(f"'slowdown' must not be negative, got {self.slowdown}")
        if not 0 <= self.shared_energy <= 1:
            raise ValueError(f"'shared_energy' must lie between 0 and 1, got {self.shared_energy}")

    def speed(self, running: int) -> float:
        """Progress per second of event time, for each of `running` sequences; 1 for one that runs alone."""
        return 1.0 / (1.0 + self.slowdown * (running - 1))

    def energy_factor(self, running: int) -> float:
        """Factor on each sequence's energy while `running` of them run."""
        return 1.0 - self.shared_energy + self.shared_energy / running


@dataclass(slots=True, eq=False)
class Sequence:
    """One generation in the batch.

    Attributes:
        arrived_s: event time of its arrival.
        finished_s: event time of its last token; None before it, and for a sequence that was cancelled.
        cancelled: removed before its end.
    """

    generation: PlannedAnswer
    arrived_s: float
    finished_s: float | None = None
    cancelled: bool = False
    started_at: float | None = field(default=None, repr=False)
    """Progress at admission; None while it waits."""

    @property
    def running(self) -> bool:
        """Whether it holds a slot."""
        return self.started_at is not None and self.finished_s is None and not self.cancelled


class InFlightBatch:
    """The sequences of one GPU."""

    def __init__(self, rules: BatchRules, *, now_s: float) -> None:
        self._rules = rules
        self._now_s = now_s
        self._progress_s = 0.0
        self._energy_j = 0.0
        self._power_w = 0.0  # of all running sequences, at full speed and before `energy_factor`
        self._running: set[Sequence] = set()
        self._ends: list[tuple[float, int, Sequence]] = []
        self._waiting: deque[Sequence] = deque()
        self._arrivals: deque[Sequence] = deque()
        self._order = itertools.count()

    @property
    def now_s(self) -> float:
        """Event time up to which the batch is simulated."""
        return self._now_s

    @property
    def energy_j(self) -> float:
        """Energy of all sequences so far, J; never falls."""
        return self._energy_j

    @property
    def running(self) -> frozenset[Sequence]:
        """Sequences that hold a slot."""
        return frozenset(self._running)

    @property
    def busy(self) -> bool:
        """Whether a sequence runs, waits, or is about to arrive."""
        return bool(self._running or self._waiting or self._arrivals)

    def submit(self, sequence: Sequence) -> None:
        """Add a sequence; an arrival before the simulated time counts as an arrival now."""
        latest = self._arrivals[-1].arrived_s if self._arrivals else self._now_s
        sequence.arrived_s = max(sequence.arrived_s, latest)
        self._arrivals.append(sequence)

    def cancel(self, sequence: Sequence) -> None:
        """Remove a sequence; it takes no further energy. No effect if it has finished."""
        if sequence.finished_s is not None or sequence.cancelled:
            return
        sequence.cancelled = True
        if sequence in self._running:
            self._leave(sequence)
            self._admit_waiting()

    def advance(self, to_s: float) -> list[Sequence]:
        """Simulate up to event time `to_s`; no effect if that is in the past.

        Returns:
            The sequences that finished, in order.
        """
        finished: list[Sequence] = []
        while True:
            end_s = self.next_end_s()
            arrival_s = self._arrivals[0].arrived_s if self._arrivals else math.inf
            moment = min(end_s, arrival_s, to_s)
            if moment == end_s and end_s <= to_s:
                finished.append(self._finish(end_s))
            elif moment == arrival_s and arrival_s <= to_s:
                self._flow(arrival_s)
                self._waiting.append(self._arrivals.popleft())
                self._admit_waiting()
            else:
                self._flow(to_s)
                return finished

    def produced(self, sequence: Sequence) -> int:
        """Number of tokens that a sequence has generated so far."""
        generation = sequence.generation
        if sequence.finished_s is not None:
            return generation.tokens
        if sequence.started_at is None:
            return 0
        share = (self._progress_s - sequence.started_at) / generation.time_s
        return min(generation.tokens, int(share * generation.tokens + _ROUNDING))

    def next_token_s(self, sequence: Sequence, *, after: int) -> float:
        """Event time of token number `after` + 1 of a running sequence, if no sequence arrives or ends before."""
        if not sequence.running or sequence.started_at is None:
            return math.inf
        generation = sequence.generation
        due = sequence.started_at + (after + 1) * generation.time_s / generation.tokens
        return self._now_s + max(0.0, due - self._progress_s) / self._rules.speed(len(self._running))

    def next_end_s(self) -> float:
        """Event time at which the next sequence ends, if none arrives before; infinite if none runs."""
        while self._ends and self._ends[0][2].cancelled:
            heapq.heappop(self._ends)
        if not self._ends:
            return math.inf
        remaining_s = max(0.0, self._ends[0][0] - self._progress_s)
        return self._now_s + remaining_s / self._rules.speed(len(self._running))

    def _flow(self, to_s: float) -> None:
        """Advance over a time in which no sequence arrives or ends."""
        elapsed_s = to_s - self._now_s
        if elapsed_s <= 0:
            return
        count = len(self._running)
        if count:
            self._move(elapsed_s * self._rules.speed(count))
        self._now_s = to_s

    def _move(self, progress_s: float) -> None:
        self._progress_s += progress_s
        self._energy_j += self._power_w * progress_s * self._rules.energy_factor(len(self._running))

    def _finish(self, end_s: float) -> Sequence:
        end, _, sequence = heapq.heappop(self._ends)
        # Advance exactly to the end, so that rounding errors do not accumulate.
        if end > self._progress_s:
            self._move(end - self._progress_s)
        self._now_s = max(self._now_s, end_s)
        sequence.finished_s = self._now_s
        self._leave(sequence)
        self._admit_waiting()
        return sequence

    def _leave(self, sequence: Sequence) -> None:
        self._running.discard(sequence)
        self._power_w = math.fsum(one.generation.energy_j / one.generation.time_s for one in self._running)

    def _admit_waiting(self) -> None:
        while self._waiting and len(self._running) < self._rules.slots:
            sequence = self._waiting.popleft()
            if sequence.cancelled:
                continue
            sequence.started_at = self._progress_s
            self._running.add(sequence)
            self._power_w += sequence.generation.energy_j / sequence.generation.time_s
            end = self._progress_s + sequence.generation.time_s
            heapq.heappush(self._ends, (end, next(self._order), sequence))
