"""The stand-in model as Triton's Python backend loads it; everything it decides is decided elsewhere."""

import importlib
import json
from collections.abc import Sequence
from typing import Any

from deploy.triton.backend import EnergyMeter, Reply, send_error, tensors_of
from deploy.triton.energy import EnergyAccount
from deploy.triton.lifeline import end_with_server
from deploy.triton.llm_api import LlmApiReply, read_llm_api_request
from deploy.triton.request import GenerationRequest, InvalidRequestError, read_request
from deploy.triton.stand_in.answers import AnswerBook
from deploy.triton.stand_in.batching import InFlightBatch
from deploy.triton.stand_in.engine import Outlet, StandInEngine
from deploy.triton.stand_in.faults import FailingOutlet, FaultDraws
from deploy.triton.stand_in.judge import Judge
from deploy.triton.stand_in.parameters import StandInParameters
from deploy.triton.stand_in.workload import load_workload
from shared.runtime.clock import Clock


class TritonPythonModel:
    """Answers requests of either contract from a workload, in event time."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the workload and begin to keep time.

        Raises:
            ParameterError, WorkloadError, ClockConfigurationError: Triton then refuses to load the model, and says why.
        """
        end_with_server()
        self._backend = importlib.import_module("triton_python_backend_utils")
        configured = json.loads(args["model_config"])["parameters"]
        parameters = StandInParameters.from_texts({name: one["string_value"] for name, one in configured.items()})
        self._parameters = parameters
        workload = load_workload(parameters.workload)
        log = self._backend.Logger
        for problem in workload.problems:
            log.log_warn(f"{args['model_name']}: left out {problem}")
        if workload.skipped > len(workload.problems):
            log.log_warn(f"{args['model_name']}: {workload.skipped} lines of {parameters.workload} left out in all")
        self._planner: AnswerBook | Judge = (
            Judge(workload, parameters.judge)
            if parameters.role == "judge"
            else AnswerBook(workload, model=parameters.model, catalogue=parameters.directives)
        )
        self._faults = FaultDraws(parameters.faults)
        clock = Clock.from_environment()
        now_s = clock.now_s()
        account = EnergyAccount(idle_power_w=parameters.idle_power_w, now_s=now_s)
        self._engine = StandInEngine(
            InFlightBatch(parameters.batch, now_s=now_s),
            clock=clock,
            meter=EnergyMeter(self._backend, account, gpu_uuid=parameters.gpu_uuid),
            tick_s=parameters.tick_ms / 1_000,
            report=log.log_error,
        )
        self._engine.start()

    def execute(self, requests: Sequence[Any]) -> None:
        """Accept requests; their responses follow from the engine's thread."""
        for request in requests:
            sender = request.get_response_sender()
            try:
                wanted = self._read(request)
            except InvalidRequestError as error:
                # TensorRT-LLM's LLM-API model has one status for all errors.
                invalid = self._parameters.contract == "ensemble"
                send_error(self._backend, sender, str(error), invalid=invalid)
                continue
            generation = self._planner.plan(wanted)
            outlet = self._outlet(sender, wanted, input_tokens=generation.input_tokens)
            share = self._faults.fails_after(request.request_id())
            if share is not None:
                generation = generation.truncated(max(1, int(share * generation.tokens)))
                outlet = FailingOutlet(outlet)
            self._engine.submit(generation, outlet)

    def _outlet(self, sender: Any, wanted: GenerationRequest, *, input_tokens: int) -> Outlet:  # noqa: ANN401
        if self._parameters.contract == "llm-api":
            return LlmApiReply(self._backend, sender, wanted)
        return Reply(self._backend, sender, wanted, input_tokens=input_tokens)

    def _read(self, request: Any) -> GenerationRequest:  # noqa: ANN401 - the backend's request
        tensors = tensors_of(request)
        if self._parameters.contract == "llm-api":
            return read_llm_api_request(tensors, decoupled=self._parameters.decoupled)
        return read_request(tensors)

    def finalize(self) -> None:
        """Stop keeping time."""
        self._engine.stop()
