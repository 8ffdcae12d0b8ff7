"""Runs requests on llama.cpp's server, which decodes up to its number of slots together.

`completion_body` translates a request of the `ensemble` contract into llama.cpp's, `Progress` reads the chunks of its
answer, and `SmolLm2Engine` runs requests and meters their energy.
"""

import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from deploy.triton.energy import EnergyMeter
from deploy.triton.reply import Reply
from deploy.triton.request import GenerationRequest
from deploy.triton.smollm2.parameters import SmolLm2Parameters
from shared.runtime.clock import Clock

METERING_S: Final = 0.05
"""Wall seconds between two readings of the energy."""

CANCELLATION_CHECK_S: Final = 0.1
"""Wall seconds between two checks whether a client has cancelled."""

_LLAMA_CPP_NAMES: Final = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "repetition_penalty": "repeat_penalty",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
    "seed": "seed",
}
"""llama.cpp's names of the sampling parameters; it has no `min_tokens`."""


class CompletionError(RuntimeError):
    """llama.cpp rejected a request, or failed.

    Attributes:
        invalid: the request is invalid, for example because its prompt is too long.
    """

    def __init__(self, message: str, *, invalid: bool = False) -> None:
        super().__init__(message)
        self.invalid = invalid


def completion_body(request: GenerationRequest, parameters: SmolLm2Parameters) -> dict[str, Any]:
    """Translate a request into llama.cpp's terms; always streamed, so that it can be stopped between tokens."""
    body: dict[str, Any] = {
        "prompt": request.text,
        "n_predict": request.max_tokens,
        "stream": True,
        "stop": list(request.stop_words),
        "temperature": parameters.temperature,
        "top_p": parameters.top_p,
        # A request's energy must not depend on the prompt before it.
        "cache_prompt": False,
    }
    body |= {_LLAMA_CPP_NAMES[name]: value for name, value in request.sampling.items() if name in _LLAMA_CPP_NAMES}
    if "seed" in body:
        body["seed"] %= 2**32
    if request.return_num_input_tokens:
        body["timings_per_token"] = True  # reports the number of the prompt's tokens from the first chunk on
    if request.return_log_probs:
        body["n_probs"] = 1
    return body


@dataclass(slots=True)
class Progress:
    """The part of a completion that has not been sent yet; pass its chunks to `take` in order.

    Attributes:
        text: not sent yet.
        tokens: number of tokens not sent yet.
        log_probs: of tokens not sent yet, if requested.
        finished: the last chunk has arrived.
        prompt_tokens: of the prompt; known at the end, or from the first chunk on if requested.
    """

    text: str = ""
    tokens: int = 0
    log_probs: list[float] = field(default_factory=list)
    finished: bool = False
    prompt_tokens: int = 0
    _counted: int = 0

    def take(self, chunk: Mapping[str, Any]) -> None:
        """Read one chunk.

        Raises:
            CompletionError: the chunk is an error.
        """
        error = chunk.get("error")
        if error is not None:
            if not isinstance(error, Mapping):
                raise CompletionError(str(error))
            raise CompletionError(str(error.get("message")), invalid=error.get("code") == 400)
        choice = chunk["choices"][0]
        self.text += choice.get("text") or ""
        probabilities = (choice.get("logprobs") or {}).get("content") or []
        self.log_probs += [float(one["logprob"]) for one in probabilities]
        self.prompt_tokens = self.prompt_tokens or int((chunk.get("timings") or {}).get("prompt_n") or 0)
        if choice.get("finish_reason") is None:
            self._count(1)
            return
        self.finished = True
        usage = chunk.get("usage") or {}
        self.prompt_tokens = int(usage.get("prompt_tokens") or self.prompt_tokens)
        # A chunk may hold several tokens that form one character.
        self._count(max(0, int(usage.get("completion_tokens") or 0) - self._counted))

    def sent(self) -> None:
        """The text so far has been sent."""
        self.text, self.tokens, self.log_probs = "", 0, []

    def _count(self, tokens: int) -> None:
        self._counted += tokens
        self.tokens += tokens


class Completions(Protocol):
    """The part of llama.cpp's server that is used."""

    def handle_completions(self, body: dict[str, Any], callback: Callable[[Mapping[str, Any]], bool]) -> object:
        """Run one completion; each chunk is passed to the callback, which returns whether to stop."""
        ...


class EnergyCounter(Protocol):
    """A counter of joules."""

    def read_j(self) -> float:
        """Energy so far, J; never falls."""
        ...


class SmolLm2Engine:
    """Queues and runs requests, and meters their energy.

    With an accelerated clock a wall second is `rate` seconds of event time. The power does not change, so the energy
    counter advances by power x event time, which is wall-clock joules times the rate. So power, time and energy agree
    in event time.
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
        """Start metering."""
        self._thread.start()

    def submit(self, request: GenerationRequest, reply: Reply) -> None:
        """Queue a request."""
        self._slots.submit(self._guarded, request, reply)

    def stop(self) -> None:
        """Stop; requests that are queued or running get an error."""
        self._stopping.set()
        self._slots.shutdown(wait=True)
        self._thread.join()

    def meter(self, *, at_once: bool) -> None:
        """Update the energy metrics."""
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
        except Exception as error:  # noqa: BLE001 - the backend and llama.cpp have their own error types
            self._report(f"a request failed: {type(error).__name__}: {error}")
            reply.fail(f"generation failed: {type(error).__name__}")

    def _run(self, request: GenerationRequest, reply: Reply) -> None:
        """Generate one answer; each thread is one slot."""
        listener = _Listener(reply, self._stopping)
        result = None
        if not listener.should_stop():
            result = self._server.handle_completions(completion_body(request, self._parameters), listener)
        self.meter(at_once=True)  # before the client can know that its answer has ended
        if listener.failure is not None:
            raise listener.failure
        if listener.cancelled:
            reply.end_cancelled()
            return
        progress = listener.progress
        if not progress.finished:
            error = result.get("error") if isinstance(result, Mapping) else None
            raise CompletionError(str(error or "generation was interrupted: the model is being unloaded"))
        reply.input_tokens = progress.prompt_tokens
        reply.send(progress.text, tokens=progress.tokens, final=True, log_probs=progress.log_probs)


class _Listener:
    """Receives the chunks of one completion, sends them on, and decides when to stop."""

    def __init__(self, reply: Reply, stopping: threading.Event) -> None:
        self.progress = Progress()
        self.failure: CompletionError | None = None
        self.cancelled = False
        self._reply = reply
        self._stopping = stopping
        self._next_check = 0.0

    def __call__(self, chunk: Mapping[str, Any]) -> bool:
        """Handle one chunk; returns True to stop the completion."""
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
        """Whether the client has cancelled, checked from time to time, or the engine is stopping."""
        if time.monotonic() >= self._next_check:
            self._next_check = time.monotonic() + CANCELLATION_CHECK_S
            self.cancelled = self._reply.is_cancelled()
        return self.cancelled or self._stopping.is_set()
