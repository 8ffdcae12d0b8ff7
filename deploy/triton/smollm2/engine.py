"""Runs requests on llama.cpp's server engine, which decodes up to its number of slots together."""

import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

from deploy.triton.backend import EnergyMeter, Reply
from deploy.triton.request import GenerationRequest
from deploy.triton.smollm2.completion import CompletionError, Progress, completion_body
from deploy.triton.smollm2.parameters import SmolLm2Parameters
from shared.runtime.clock import Clock

METERING_S = 0.05
"""Wall seconds between two readings of the energy."""

CANCELLATION_CHECK_S = 0.1
"""Wall seconds between two questions whether a client still waits."""


class Completions(Protocol):
    """What is used of llama.cpp's server."""

    def handle_completions(self, body: dict[str, Any], callback: Callable[[Mapping[str, Any]], bool]) -> object:
        """Run one completion; every chunk goes to the callback, which answers whether to stop."""
        ...


class EnergyCounter(Protocol):
    """A count of joules that never falls."""

    def read_j(self) -> float:
        """Energy so far, J."""
        ...


class SmolLm2Engine:
    """Requests in line and in progress, and the energy that they take.

    Under a scaled clock a wall second is `rate` seconds of event time. The power is what it is, so the energy counter
    advances by power x event time: joules of the wall clock, times the rate. That way power, time and energy agree on
    the clock that everything else uses.
    """

    def __init__(
        self,
        server: Completions,
        *,
        parameters: SmolLm2Parameters,
        clock: Clock,
        counter: EnergyCounter,
        meter: EnergyMeter,
        report: Callable[[str], None],
    ) -> None:
        self._server = server
        self._parameters = parameters
        self._clock = clock
        self._counter = counter
        self._meter = meter
        self._metering = threading.Lock()
        self._report = report
        self._stopping = threading.Event()
        self._slots = ThreadPoolExecutor(parameters.slots, thread_name_prefix="slot")
        self._thread = threading.Thread(target=self._meter_regularly, name="metering", daemon=True)

    def start(self) -> None:
        """Begin to meter."""
        self._thread.start()

    def submit(self, request: GenerationRequest, reply: Reply) -> None:
        """Put a request in line."""
        self._slots.submit(self._guarded, request, reply)

    def stop(self) -> None:
        """End; requests in line or in progress get an error."""
        self._stopping.set()
        self._slots.shutdown(wait=True)
        self._thread.join()

    def meter(self, *, at_once: bool) -> None:
        """Bring the energy metrics up to date."""
        with self._metering:
            self._meter.update(self._clock.now_s(), self._counter.read_j() * self._clock.rate, at_once=at_once)

    def _meter_regularly(self) -> None:
        while not self._stopping.wait(METERING_S):
            self.meter(at_once=False)

    def _guarded(self, request: GenerationRequest, reply: Reply) -> None:
        try:
            self._run(request, reply)
        except CompletionError as error:
            self.meter(at_once=True)
            reply.fail(str(error), invalid=error.invalid)
        except Exception as error:  # noqa: BLE001 - the backend and llama.cpp raise types of their own
            self._report(f"a request failed: {type(error).__name__}: {error}")
            reply.fail(f"generation failed: {type(error).__name__}")

    def _run(self, request: GenerationRequest, reply: Reply) -> None:
        """Generate one answer; the thread is its slot."""
        listener = _Listener(reply, self._stopping)
        result = None
        if not listener.should_stop():
            result = self._server.handle_completions(completion_body(request, self._parameters), listener)
        self.meter(at_once=True)  # before the client can know that its answer ended
        if listener.failure is not None:
            raise listener.failure
        if listener.cancelled:
            reply.end_cancelled()
            return
        progress = listener.progress
        if not progress.finished:
            said = result.get("error") if isinstance(result, Mapping) else None
            raise CompletionError(str(said or "generation was broken off; the model is being unloaded"))
        reply.input_tokens = progress.prompt_tokens
        reply.send(progress.text, tokens=progress.tokens, final=True, log_probs=progress.log_probs)


class _Listener:
    """Takes the chunks of one completion, passes parts on, and says when to stop."""

    def __init__(self, reply: Reply, stopping: threading.Event) -> None:
        self.progress = Progress()
        self.failure: CompletionError | None = None
        self.cancelled = False
        self._reply = reply
        self._stopping = stopping
        self._next_check = 0.0

    def __call__(self, chunk: Mapping[str, Any]) -> bool:
        """Take one chunk; true stops the completion."""
        progress, reply = self.progress, self._reply
        try:
            progress.take(chunk)
        except CompletionError as error:
            self.failure = error
            return True
        if self.should_stop():
            return True
        if reply.streams and progress.text and not progress.finished:
            reply.input_tokens = progress.prompt_tokens
            reply.send(progress.text, tokens=progress.tokens, final=False, log_probs=progress.log_probs)
            progress.sent()
        return False

    def should_stop(self) -> bool:
        """Whether nobody waits any more; the client is asked now and then."""
        if time.monotonic() >= self._next_check:
            self._next_check = time.monotonic() + CANCELLATION_CHECK_S
            self.cancelled = self._reply.is_cancelled()
        return self.cancelled or self._stopping.is_set()
