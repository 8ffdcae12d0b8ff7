"""Moves a stand-in model through event time: what is due is sent, what is used is metered.

One thread for the whole model. It sleeps until something is due. The end of an answer is sent when it is due; parts of
streamed answers are sent in rounds that lie a tick of wall time apart at least, each with all tokens that are due by
then: one token a response in real time, many in an accelerated replay.
"""

import math
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

from deploy.triton.stand_in.answers import Generation, text_end
from deploy.triton.stand_in.batching import InFlightBatch, Sequence
from shared.runtime.clock import Clock

LONGEST_SLEEP_S = 0.05
"""Wall seconds; the energy counter moves at least this often."""

SHORTEST_SLEEP_S = 0.001
"""Wall seconds; what falls due within it goes out together."""

CANCELLATION_CHECK_S = 0.1
"""Wall seconds between two questions whether a client still waits; an answer younger than this is not asked for."""


class Outlet(Protocol):
    """Where an answer goes."""

    @property
    def streams(self) -> bool:
        """Whether parts of the answer are wanted."""
        ...

    def send(self, text: str, *, tokens: int, final: bool) -> None:
        """The newest part of the answer, and whether it is the last."""
        ...

    def fail(self, message: str) -> None:
        """The answer ends with an error."""
        ...

    def end_cancelled(self) -> None:
        """The answer ends because its client left."""
        ...

    def is_cancelled(self) -> bool:
        """Whether the client left."""
        ...


class Meter(Protocol):
    """Where energy is shown."""

    def update(self, now_s: float, used_j: float, *, at_once: bool) -> None:
        """Energy of all requests up to an event time."""
        ...


class _Delivery:
    """An answer on its way."""

    __slots__ = ("accepted", "outlet", "sent_tokens", "sequence")

    def __init__(self, sequence: Sequence, outlet: Outlet) -> None:
        self.sequence = sequence
        self.outlet = outlet
        self.sent_tokens = 0
        self.accepted = time.monotonic()


class StandInEngine:
    """One model's answers, from their arrival to their last token."""

    def __init__(
        self,
        batch: InFlightBatch,
        *,
        clock: Clock,
        meter: Meter,
        tick_s: float,
        report: Callable[[str], None],
    ) -> None:
        """Set up; nothing runs before `start`.

        Args:
            tick_s: wall seconds between two rounds of parts, at least.
            report: told about failures of the transport, which end the one answer concerned.
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
        self._part_due_s = math.inf  # event time
        self._thread = threading.Thread(target=self._run, name="stand-in-pacing", daemon=True)

    def start(self) -> None:
        """Begin to keep time."""
        self._thread.start()

    def submit(self, generation: Generation, outlet: Outlet) -> None:
        """Accept an answer; its time begins now. From any thread."""
        self._incoming.append(_Delivery(Sequence(generation, self._clock.now_s()), outlet))
        self._wake.set()

    def stop(self) -> None:
        """End; answers still on their way get an error."""
        self._stopping = True
        self._wake.set()
        self._thread.join()
        for delivery in [*self._incoming, *self._deliveries.values()]:
            self._guarded(delivery, lambda one: one.outlet.fail("the model is being unloaded"))

    def step(self) -> float:
        """One round: take in what arrived, advance to now, meter, send.

        Returns:
            Wall seconds until something is due.
        """
        now_s = self._clock.now_s()
        changed = self._take_in()
        finished = self._batch.advance(now_s)
        self._drop_cancelled()
        # The energy of an answer is on the counter before its client can know that it ended.
        self._meter.update(now_s, self._batch.energy_j, at_once=bool(finished))
        for sequence in finished:
            delivery = self._deliveries.pop(sequence, None)
            if delivery is not None:
                self._guarded(delivery, self._send_rest)
        if changed or finished or now_s >= self._part_due_s:
            self._parts_round(now_s)
        if not self._batch.busy:
            return LONGEST_SLEEP_S
        parts_wait_s = max(self._next_parts - time.monotonic(), self._clock.wall_seconds(self._part_due_s - now_s))
        return min(parts_wait_s, self._clock.wall_seconds(self._batch.next_end_s() - now_s))

    def _run(self) -> None:
        while not self._stopping:
            began = time.monotonic()
            self._wake.clear()
            wait_s = min(self.step(), LONGEST_SLEEP_S)
            if self._wake.wait(max(wait_s, SHORTEST_SLEEP_S)):
                # Something arrived; others may arrive with it.
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
        """Send new tokens of streamed answers, unless it is too early, and work out when the next one is due."""
        wall = time.monotonic()
        if wall >= self._next_parts and now_s >= self._part_due_s:
            self._next_parts = wall + self._tick_s
            for delivery in self._streaming():
                self._guarded(delivery, self._send_new)
        self._part_due_s = min(
            (self._batch.next_token_s(delivery.sequence, after=delivery.sent_tokens) for delivery in self._streaming()),
            default=math.inf,
        )

    def _streaming(self) -> list[_Delivery]:
        deliveries = (self._deliveries[sequence] for sequence in self._batch.running)
        return [delivery for delivery in deliveries if delivery.outlet.streams]

    def _send_new(self, delivery: _Delivery) -> None:
        produced = self._batch.produced(delivery.sequence)
        # The last token goes with the end of the answer.
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
        """One answer whose transport fails must not hold up the others."""
        try:
            act(delivery)
        except Exception as error:  # noqa: BLE001 - the backend raises its own types, which only exist in the server
            self._report(f"an answer could not be sent: {type(error).__name__}: {error}")
            self._batch.cancel(delivery.sequence)
            self._deliveries.pop(delivery.sequence, None)
