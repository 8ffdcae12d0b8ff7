"""Runs a stand-in model in event time: sends responses when they are due, and meters the energy.

One thread serves the whole model and sleeps until the next response is due. The first token and the end of an answer
are sent when they are due. The parts between them are sent in rounds, at least one tick of wall time apart, each with
all tokens that are due by then: one token per response in real time, many in an accelerated replay.
"""

import math
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

from deploy.triton.stand_in.answers import PlannedAnswer, text_end
from deploy.triton.stand_in.batching import InFlightBatch, Sequence
from shared.runtime.clock import Clock

LONGEST_SLEEP_S = 0.05
"""Wall seconds; the energy counter is updated at least this often."""

SHORTEST_SLEEP_S = 0.001
"""Wall seconds; responses that become due within it are sent together."""

CANCELLATION_CHECK_S = 0.1
"""Wall seconds between two checks whether clients have cancelled; newer answers than this are not checked."""


class Outlet(Protocol):
    """Sends one answer to its client."""

    @property
    def streams(self) -> bool:
        """Whether the client wants the answer in parts."""
        ...

    def send(self, text: str, *, tokens: int, final: bool) -> None:
        """Send the next part of the answer; `final` for the last."""
        ...

    def fail(self, message: str) -> None:
        """End the answer with an error."""
        ...

    def end_cancelled(self) -> None:
        """End the answer because its client cancelled it."""
        ...

    def is_cancelled(self) -> bool:
        """Whether the client has cancelled the request."""
        ...


class Meter(Protocol):
    """Exports the energy."""

    def update(self, now_s: float, used_j: float, *, at_once: bool) -> None:
        """Report the energy of all requests up to an event time."""
        ...


class _Delivery:
    """An answer that is being sent."""

    __slots__ = ("accepted", "outlet", "sent_tokens", "sequence")

    def __init__(self, sequence: Sequence, outlet: Outlet) -> None:
        self.sequence = sequence
        self.outlet = outlet
        self.sent_tokens = 0
        self.accepted = time.monotonic()


class StandInEngine:
    """Generates the answers of one model, from arrival to last token."""

    def __init__(
        self,
        batch: InFlightBatch,
        *,
        clock: Clock,
        meter: Meter,
        tick_s: float,
        report: Callable[[str], None],
    ) -> None:
        """Configure the engine; nothing runs before `start`.

        Args:
            tick_s: least wall time between two rounds of parts, seconds.
            report: called with an error message when sending fails, which ends only that answer.
        """
        self._batch = batch
        self._clock = clock
        self._meter = meter
        self._tick_s = tick_s
        self._report = report
        self._incoming: deque[_Delivery] = deque()
        self._deliveries: dict[Sequence, _Delivery] = {}
        self._wake = threading.Event()
        self._stopping = False
        self._next_cancellation_check = 0.0
        self._next_parts = 0.0  # wall time
        self._first_due_s = math.inf  # event time of the next first token
        self._part_due_s = math.inf  # event time of the next other token
        self._thread = threading.Thread(target=self._run, name="stand-in-pacing", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def submit(self, generation: PlannedAnswer, outlet: Outlet) -> None:
        """Start an answer now; thread-safe."""
        self._incoming.append(_Delivery(Sequence(generation, self._clock.now_s()), outlet))
        self._wake.set()

    def stop(self) -> None:
        """Stop; answers that are not finished get an error."""
        self._stopping = True
        self._wake.set()
        self._thread.join()
        for delivery in [*self._incoming, *self._deliveries.values()]:
            self._guarded(delivery, lambda one: one.outlet.fail("the model is being unloaded"))

    def step(self) -> float:
        """One round: accept new answers, advance to now, meter the energy, send what is due.

        Returns:
            Wall seconds until the next response is due.
        """
        now_s = self._clock.now_s()
        changed = self._take_in()
        finished = self._batch.advance(now_s)
        self._drop_cancelled()
        # The counter includes an answer's energy before its client can know that the answer has ended.
        self._meter.update(now_s, self._batch.energy_j, at_once=bool(finished))
        for sequence in finished:
            delivery = self._deliveries.pop(sequence, None)
            if delivery is not None:
                self._guarded(delivery, self._send_rest)
        if changed or finished or now_s >= min(self._first_due_s, self._part_due_s):
            self._parts_round(now_s)
        if not self._batch.busy:
            return LONGEST_SLEEP_S
        parts_wait_s = max(self._next_parts - time.monotonic(), self._clock.wall_seconds(self._part_due_s - now_s))
        next_s = min(self._first_due_s, self._batch.next_change_s())
        return min(parts_wait_s, self._clock.wall_seconds(next_s - now_s))

    def _run(self) -> None:
        while not self._stopping:
            began = time.monotonic()
            self._wake.clear()
            wait_s = min(self.step(), LONGEST_SLEEP_S)
            if self._wake.wait(max(wait_s, SHORTEST_SLEEP_S)):
                # A request arrived; others may arrive at the same time.
                pause_s = began + SHORTEST_SLEEP_S - time.monotonic()
                if pause_s > 0:
                    time.sleep(pause_s)

    def _take_in(self) -> bool:
        taken = False
        while self._incoming:
            delivery = self._incoming.popleft()
            self._deliveries[delivery.sequence] = delivery
            self._batch.submit(delivery.sequence)
            taken = True
        return taken

    def _parts_round(self, now_s: float) -> None:
        """Send first tokens and, unless it is too early, others, and compute when the next ones are due."""
        wall = time.monotonic()
        all_parts = wall >= self._next_parts and now_s >= self._part_due_s
        if all_parts:
            self._next_parts = wall + self._tick_s
        for delivery in self._streaming():
            if all_parts or delivery.sent_tokens == 0:
                self._guarded(delivery, self._send_new)
        self._first_due_s = self._part_due_s = math.inf
        for delivery in self._streaming():
            due_s = self._batch.next_token_s(delivery.sequence, after=delivery.sent_tokens)
            if delivery.sent_tokens == 0:
                self._first_due_s = min(self._first_due_s, due_s)
            else:
                self._part_due_s = min(self._part_due_s, due_s)

    def _streaming(self) -> list[_Delivery]:
        deliveries = (self._deliveries[sequence] for sequence in self._batch.running)
        return [delivery for delivery in deliveries if delivery.outlet.streams]

    def _send_new(self, delivery: _Delivery) -> None:
        produced = self._batch.produced(delivery.sequence)
        # The last token is sent with the end of the answer.
        if delivery.sent_tokens < produced < delivery.sequence.generation.tokens:
            self._send(delivery, produced, final=False)

    def _send_rest(self, delivery: _Delivery) -> None:
        self._send(delivery, delivery.sequence.generation.tokens, final=True)

    @staticmethod
    def _send(delivery: _Delivery, produced: int, *, final: bool) -> None:
        generation, sent = delivery.sequence.generation, delivery.sent_tokens
        begin = text_end(generation.text, sent, generation.tokens) if sent else 0
        end = text_end(generation.text, produced, generation.tokens)
        delivery.sent_tokens = produced
        delivery.outlet.send(generation.text[begin:end], tokens=produced - sent, final=final)

    def _drop_cancelled(self) -> None:
        wall = time.monotonic()
        if wall < self._next_cancellation_check:
            return
        self._next_cancellation_check = wall + CANCELLATION_CHECK_S
        for sequence, delivery in list(self._deliveries.items()):
            if wall - delivery.accepted < CANCELLATION_CHECK_S or sequence.finished_s is not None:
                continue
            self._guarded(delivery, self._end_if_cancelled)

    def _end_if_cancelled(self, delivery: _Delivery) -> None:
        if delivery.outlet.is_cancelled():
            self._batch.cancel(delivery.sequence)
            del self._deliveries[delivery.sequence]
            delivery.outlet.end_cancelled()

    def _guarded(self, delivery: _Delivery, act: Callable[[_Delivery], None]) -> None:
        """Run a step of one answer; if sending fails, only that answer ends."""
        try:
            act(delivery)
        except Exception as error:  # noqa: BLE001 - the backend's error types exist only inside the server
            self._report(f"an answer could not be sent: {type(error).__name__}: {error}")
            self._batch.cancel(delivery.sequence)
            self._deliveries.pop(delivery.sequence, None)
