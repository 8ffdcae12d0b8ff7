"""Simulates in-flight batching in event time: each sequence's progress, and the energy of all.

The simulation is exact and does not loop over tokens. All decoding sequences have the same speed, which falls as more
of them decode, so one virtual clock serves them all: `progress`. A sequence ends when the clock has advanced by the
sequence's work since it began to decode. Between two arrivals or endings the speed is constant, and the state follows
in closed form, whatever the caller's step size.

Two kinds of rules say how the batch size acts on speed and energy, and in which unit progress is counted:

- `RecordedRules`: recorded seconds and joules of each request; progress counts seconds of a sequence that runs alone.
- `CurveRules`: a measured curve of power and speed by batch size; progress counts decode steps, each of which gives
  every sequence one token. Before its first step a sequence reads its prompt: it holds a slot and takes the curve's
  time and energy per token of the prompt, but no part in steps, which are as fast as without it.
"""

import heapq
import itertools
import math
from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

from deploy.triton.stand_in.answers import PlannedAnswer
from shared.batch_curve import BatchCurve

_ROUNDING = 1e-9


class Work(NamedTuple):
    """What one sequence takes of the GPU.

    Attributes:
        progress: from the beginning of its first token to the end of its last one.
        progress_j: its own energy per unit of progress, J.
        prompt_s: time to read the prompt before that, seconds.
        prompt_j: energy to read the prompt, J.
    """

    progress: float
    progress_j: float
    prompt_s: float = 0.0
    prompt_j: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedRules:
    """Each request takes its recorded time and energy; progress counts seconds of a sequence that runs alone.

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
        _check_slots(self.slots)
        if not self.slowdown >= 0:
            raise ValueError(f"'slowdown' must not be negative, got {self.slowdown}")
        if not 0 <= self.shared_energy <= 1:
            raise ValueError(f"'shared_energy' must lie between 0 and 1, got {self.shared_energy}")

    def work(self, generation: PlannedAnswer) -> Work:
        """The work of a sequence; its recorded time and energy include the prompt."""
        return Work(progress=generation.time_s, progress_j=generation.energy_j / generation.time_s)

    def speed(self, decoding: int) -> float:
        """Progress per second of event time, for each of `decoding` sequences."""
        return 1.0 / (1.0 + self.slowdown * (decoding - 1))

    def energy_j(self, decoding: int, progress_j: float) -> float:
        """Energy of all sequences per unit of progress, J.

        Args:
            decoding: their number, at least 1.
            progress_j: sum of their `progress_j`.
        """
        return progress_j * (1.0 - self.shared_energy + self.shared_energy / decoding)


@dataclass(frozen=True, slots=True, kw_only=True)
class CurveRules:
    """Steps take the time and energy of a curve; progress counts steps.

    Attributes:
        curve: power and speed by batch size; the batch does not use its idle power.
        slots: sequences that run at once; further ones wait in a queue, first in, first out.
    """

    curve: BatchCurve
    slots: int = 256

    def __post_init__(self) -> None:
        _check_slots(self.slots)

    def work(self, generation: PlannedAnswer) -> Work:
        """The work of a sequence: to read its prompt, and a step for each token."""
        return Work(
            progress=float(generation.tokens),
            progress_j=self.curve.token_j,
            prompt_s=generation.input_tokens * self.curve.prompt_token_s,
            prompt_j=generation.input_tokens * self.curve.prompt_token_j,
        )

    def speed(self, decoding: int) -> float:
        """Steps per second of event time."""
        return 1.0 / self.curve.step_time_s(decoding)

    def energy_j(self, decoding: int, progress_j: float) -> float:  # noqa: ARG002 - as `RecordedRules` has it
        """Energy of a step, J.

        Args:
            decoding: the number of its sequences, at least 1.
            progress_j: sum of their `progress_j`.
        """
        return self.curve.step_j + progress_j


BatchRules = RecordedRules | CurveRules
"""How the batch size acts on speed and energy."""


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
    work: Work = field(init=False, repr=False)
    """Set when it is submitted."""
    prompt_read_s: float | None = field(default=None, repr=False)
    """Event time at which its prompt is read; None while it waits for a slot."""
    started_at: float | None = field(default=None, repr=False)
    """Progress at the beginning of its first token; None before."""


class InFlightBatch:
    """The sequences of one GPU."""

    def __init__(self, rules: BatchRules, *, now_s: float) -> None:
        self._rules = rules
        self._now_s = now_s
        self._progress = 0.0
        self._energy_j = 0.0
        self._reading: set[Sequence] = set()
        self._decoding: set[Sequence] = set()
        self._reading_w = 0.0  # of all sequences that read their prompts
        self._progress_j = 0.0  # of all sequences that decode, per unit of progress
        self._prompt_ends: list[tuple[float, int, Sequence]] = []  # by event time
        self._ends: list[tuple[float, int, Sequence]] = []  # by progress
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
        return frozenset(self._reading | self._decoding)

    @property
    def busy(self) -> bool:
        """Whether a sequence runs, waits, or is about to arrive."""
        return bool(self._reading or self._decoding or self._waiting or self._arrivals)

    def submit(self, sequence: Sequence) -> None:
        """Add a sequence; an arrival before the simulated time counts as an arrival now."""
        latest = self._arrivals[-1].arrived_s if self._arrivals else self._now_s
        sequence.arrived_s = max(sequence.arrived_s, latest)
        sequence.work = self._rules.work(sequence.generation)
        self._arrivals.append(sequence)

    def cancel(self, sequence: Sequence) -> None:
        """Remove a sequence; it takes no further energy. No effect if it has finished."""
        if sequence.finished_s is not None or sequence.cancelled:
            return
        sequence.cancelled = True
        if sequence in self._reading or sequence in self._decoding:
            self._leave(sequence)
            self._admit_waiting()

    def advance(self, to_s: float) -> list[Sequence]:
        """Simulate up to event time `to_s`; no effect if that is in the past.

        Returns:
            The sequences that finished, in order.
        """
        finished: list[Sequence] = []
        while True:
            end_s, prompt_end_s = self.next_end_s(), self._next_prompt_end_s()
            arrival_s = self._arrivals[0].arrived_s if self._arrivals else math.inf
            moment = min(end_s, prompt_end_s, arrival_s)
            if moment > to_s:
                self._flow(to_s)
                return finished
            if moment == end_s:
                finished.append(self._finish(end_s))
            elif moment == prompt_end_s:
                self._flow(prompt_end_s)
                sequence = heapq.heappop(self._prompt_ends)[2]
                self._leave(sequence)
                self._decode(sequence)
            else:
                self._flow(arrival_s)
                self._waiting.append(self._arrivals.popleft())
                self._admit_waiting()

    def produced(self, sequence: Sequence) -> int:
        """Number of tokens that a sequence has generated so far."""
        generation = sequence.generation
        if sequence.finished_s is not None:
            return generation.tokens
        if sequence.started_at is None:
            return 0
        share = (self._progress - sequence.started_at) / sequence.work.progress
        return min(generation.tokens, int(share * generation.tokens + _ROUNDING))

    def first_token_s(self, sequence: Sequence) -> float:
        """Event time of a running sequence's first token, if no other begins or ends before; never in the past."""
        needed = sequence.work.progress / sequence.generation.tokens
        if sequence in self._decoding and sequence.started_at is not None:
            due = sequence.started_at + needed
            return self._now_s + max(0.0, due - self._progress) / self._rules.speed(len(self._decoding))
        if sequence in self._reading and sequence.prompt_read_s is not None:
            return sequence.prompt_read_s + needed / self._rules.speed(len(self._decoding) + 1)
        return math.inf

    def next_end_s(self) -> float:
        """Event time at which the next sequence ends, if none begins to decode before; infinite if none decodes."""
        end = _first(self._ends)
        if math.isinf(end):
            return math.inf
        return self._now_s + max(0.0, end - self._progress) / self._rules.speed(len(self._decoding))

    def next_change_s(self) -> float:
        """Event time at which the next sequence ends or begins to decode, if none arrives before."""
        return min(self.next_end_s(), self._next_prompt_end_s())

    def _next_prompt_end_s(self) -> float:
        return max(self._now_s, _first(self._prompt_ends))

    def _flow(self, to_s: float) -> None:
        """Advance over a time in which nothing arrives, ends, or begins to decode."""
        elapsed_s = to_s - self._now_s
        if elapsed_s <= 0:
            return
        self._energy_j += self._reading_w * elapsed_s
        if self._decoding:
            self._move(elapsed_s * self._rules.speed(len(self._decoding)))
        self._now_s = to_s

    def _move(self, progress: float) -> None:
        self._progress += progress
        self._energy_j += self._rules.energy_j(len(self._decoding), self._progress_j) * progress

    def _finish(self, end_s: float) -> Sequence:
        end, _, sequence = heapq.heappop(self._ends)
        self._energy_j += self._reading_w * max(0.0, end_s - self._now_s)
        # Advance exactly to the end, so that rounding errors do not accumulate.
        if end > self._progress:
            self._move(end - self._progress)
        self._now_s = max(self._now_s, end_s)
        sequence.finished_s = self._now_s
        self._leave(sequence)
        self._admit_waiting()
        return sequence

    def _leave(self, sequence: Sequence) -> None:
        # Summed again, so that rounding errors do not accumulate.
        if sequence in self._decoding:
            self._decoding.remove(sequence)
            self._progress_j = math.fsum(one.work.progress_j for one in self._decoding)
        else:
            self._reading.remove(sequence)
            self._reading_w = math.fsum(one.work.prompt_j / one.work.prompt_s for one in self._reading)

    def _admit_waiting(self) -> None:
        while self._waiting and len(self._reading) + len(self._decoding) < self._rules.slots:
            sequence = self._waiting.popleft()
            if sequence.cancelled:
                continue
            work = sequence.work
            sequence.prompt_read_s = self._now_s + work.prompt_s
            if work.prompt_s > 0:
                self._reading.add(sequence)
                self._reading_w += work.prompt_j / work.prompt_s
                heapq.heappush(self._prompt_ends, (sequence.prompt_read_s, next(self._order), sequence))
            else:
                self._energy_j += work.prompt_j
                self._decode(sequence)

    def _decode(self, sequence: Sequence) -> None:
        """Begin to decode a sequence whose prompt is read."""
        self._decoding.add(sequence)
        self._progress_j += sequence.work.progress_j
        sequence.started_at = self._progress
        end = self._progress + sequence.work.progress
        heapq.heappush(self._ends, (end, next(self._order), sequence))


def _first(ends: list[tuple[float, int, Sequence]]) -> float:
    """The first key of a heap whose sequence is not cancelled; infinite if there is none."""
    while ends and ends[0][2].cancelled:
        heapq.heappop(ends)
    return ends[0][0] if ends else math.inf


def _check_slots(slots: int) -> None:
    if slots < 1:
        raise ValueError(f"'slots' must be at least 1, got {slots}")
