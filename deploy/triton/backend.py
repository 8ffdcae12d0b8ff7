"""What models need of Triton's Python backend: inputs read, responses sent, energy metrics exported.

The backend's own module exists only inside the server, so it is handed in.
"""

import time
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from deploy.triton.energy import EnergyAccount
from deploy.triton.request import GenerationRequest

Backend = Any
"""The module `triton_python_backend_utils`."""

POWER_INTERVAL_S: Final = 0.05
"""Wall seconds between two readings of the power; the energy is also brought up to date before an answer ends."""

PLACEHOLDER_LOG_PROB: Final = -1.0
"""For models that have no probabilities."""


def tensors_of(request: Any) -> dict[str, NDArray[Any]]:  # noqa: ANN401 - the backend's request
    """The inputs that a request carries, by name."""
    return {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}


class Reply:
    """The answer to one request, sent in one or several responses; not for use by two threads at once.

    Attributes:
        input_tokens: length of the prompt; a model that learns it later may set it before the last response.
    """

    __slots__ = ("_backend", "_log_probs", "_request", "_sender", "input_tokens")

    def __init__(self, backend: Backend, sender: Any, request: GenerationRequest, *, input_tokens: int) -> None:  # noqa: ANN401
        self._backend = backend
        self._sender = sender
        self._request = request
        self.input_tokens = input_tokens
        self._log_probs: list[float] = []

    @property
    def streams(self) -> bool:
        """Whether the client wants every step's tokens as they come."""
        return self._request.stream

    def send(self, text: str, *, tokens: int, final: bool, log_probs: list[float] | None = None) -> None:
        """Send the newest part of the answer.

        As in TensorRT-LLM, `num_output_tokens` counts this response's tokens, and `output_log_probs` covers all
        tokens so far; an answer that is not streamed begins with the prompt unless the client excluded it, and its
        token count then includes the prompt's.

        Args:
            tokens: how many tokens `text` is.
            log_probs: of these tokens; null where the model has none.
        """
        backend, request = self._backend, self._request
        if request.echoes_input:
            text, tokens = request.text + text, tokens + self.input_tokens
        tensors = [backend.Tensor("text_output", np.array([text.encode("utf-8")], dtype=np.object_))]
        if request.return_log_probs:
            fresh = tokens - (self.input_tokens if request.echoes_input else 0)
            self._log_probs += log_probs if log_probs is not None else [PLACEHOLDER_LOG_PROB] * fresh
            tensors += [
                backend.Tensor("cum_log_probs", np.array([[sum(self._log_probs)]], dtype=np.float32)),
                backend.Tensor("output_log_probs", np.array([[self._log_probs]], dtype=np.float32)),
            ]
        if request.return_num_input_tokens:
            tensors.append(backend.Tensor("num_input_tokens", np.array([[self.input_tokens]], dtype=np.int32)))
        if request.return_num_output_tokens:
            tensors.append(backend.Tensor("num_output_tokens", np.array([[tokens]], dtype=np.int32)))
        self._sender.send(backend.InferenceResponse(output_tensors=tensors), flags=self._flags(final=final))

    def fail(self, message: str, *, invalid: bool = False) -> None:
        """End the answer with an error; `invalid` if the request is at fault."""
        send_error(self._backend, self._sender, message, invalid=invalid)

    def end_cancelled(self) -> None:
        """End an answer that its client no longer waits for."""
        error = self._backend.TritonError("the client cancelled the request", self._backend.TritonError.CANCELLED)
        self._sender.send(self._backend.InferenceResponse(error=error), flags=self._flags(final=True))

    def is_cancelled(self) -> bool:
        """Whether the client no longer waits."""
        return bool(self._sender.is_cancelled())

    def _flags(self, *, final: bool) -> int:
        return int(self._backend.TRITONSERVER_RESPONSE_COMPLETE_FINAL) if final else 0


def send_error(backend: Backend, sender: Any, message: str, *, invalid: bool = False) -> None:  # noqa: ANN401
    """Answer a request with an error.

    Args:
        invalid: the request itself is at fault.
    """
    code = backend.TritonError.INVALID_ARG if invalid else backend.TritonError.INTERNAL
    sender.send(
        backend.InferenceResponse(error=backend.TritonError(message, code)),
        flags=backend.TRITONSERVER_RESPONSE_COMPLETE_FINAL,
    )


class EnergyMeter:
    """Exports an energy account under the names of Triton's GPU metrics; for one thread.

    Every model lives in a process of its own, and the server merges metric families of one name: models differ by the
    label. A model that is unloaded leaves its counter where it is, and goes on from there when it is loaded again.
    """

    def __init__(self, backend: Backend, account: EnergyAccount, *, gpu_uuid: str) -> None:
        families = backend.MetricFamily
        self._account = account
        # The families must live as long as their metrics.
        self._families = (
            families(
                name="nv_energy_consumption",
                description="GPU energy consumption in joules since the Triton Server started",
                kind=families.COUNTER,
            ),
            families(name="nv_gpu_power_usage", description="GPU power usage in watts", kind=families.GAUGE),
        )
        self._energy, self._power = (family.Metric(labels={"gpu_uuid": gpu_uuid}) for family in self._families)
        self._next_power = 0.0
        self._interval_start_s: float | None = None
        self._interval_j = 0.0

    def update(self, now_s: float, used_j: float, *, at_once: bool) -> None:
        """Bring the metrics up to date, at most every 50 ms unless `at_once`.

        Args:
            now_s: event time.
            used_j: energy of all requests since the model was loaded, J.
        """
        wall = time.monotonic()
        if not at_once and wall < self._next_power:
            return
        increment_j = self._account.read(now_s, used_j)
        if increment_j > 0:
            self._energy.increment(increment_j)
        if self._interval_start_s is None:
            self._interval_start_s = now_s
            return
        self._interval_j += increment_j
        if wall >= self._next_power and now_s > self._interval_start_s:
            self._power.set(self._interval_j / (now_s - self._interval_start_s))
            self._interval_start_s, self._interval_j = now_s, 0.0
            self._next_power = wall + POWER_INTERVAL_S
