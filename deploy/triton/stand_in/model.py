"""The stand-in model as Triton's Python backend loads it: wires the parts together."""

import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deploy.triton.energy import POWER_INTERVAL_S, EnergyAccount, EnergyMeter
from deploy.triton.gpu import LoadedMark
from deploy.triton.reply import LlmApiReply, Reply, send_error
from deploy.triton.request import (
    GenerationRequest,
    InvalidRequestError,
    read_llm_api_request,
    read_request,
    tensors_of,
)
from deploy.triton.stand_in.answers import RecordedAnswers
from deploy.triton.stand_in.batching import CurveRules, InFlightBatch
from deploy.triton.stand_in.engine import Outlet, StandInEngine
from deploy.triton.stand_in.faults import FailingOutlet, FaultDraws
from deploy.triton.stand_in.judge import Judge
from deploy.triton.stand_in.parameters import StandInParameters
from deploy.triton.stand_in.workload import load_workload
from deploy.triton.watchdog import start_parent_watchdog
from shared.runtime.clock import Clock


class TritonPythonModel:
    """Answers requests of either contract from a workload, in event time."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the workload and start the engine.

        Raises:
            ParameterError, WorkloadError, ClockConfigurationError: Triton reports it and does not load the model.
        """
        start_parent_watchdog()
        self._backend = importlib.import_module("triton_python_backend_utils")
        configured = json.loads(args["model_config"])["parameters"]
        parameters = StandInParameters.from_texts({name: one["string_value"] for name, one in configured.items()})
        self._parameters = parameters
        # With a curve, the companion meters the idle power and exports the power.
        by_companion = isinstance(parameters.batch, CurveRules)
        self._mark = LoadedMark(Path(args["model_repository"])) if by_companion else None
        workload = load_workload(parameters.workload)
        log = self._backend.Logger
        for problem in workload.problems:
            log.log_warn(f"{args['model_name']}: skipped {problem}")
        if workload.skipped > len(workload.problems):
            log.log_warn(f"{args['model_name']}: {workload.skipped} lines of {parameters.workload} skipped in total")
        self._planner: RecordedAnswers | Judge = (
            Judge(workload, parameters.judge)
            if parameters.role == "judge"
            else RecordedAnswers(workload, model=parameters.model, catalogue=parameters.directives)
        )
        self._faults = FaultDraws(parameters.faults)
        clock = Clock.from_environment()
        now_s = clock.now_s()
        account = EnergyAccount(idle_power_w=parameters.idle_power_w, now_s=now_s)
        self._engine = StandInEngine(
            InFlightBatch(parameters.batch, now_s=now_s),
            clock=clock,
            meter=EnergyMeter(
                self._backend,
                account,
                gpu_uuid=parameters.gpu_uuid,
                power_interval_s=None if by_companion else POWER_INTERVAL_S,
            ),
            tick_s=parameters.tick_ms / 1_000,
            report=log.log_error,
        )
        self._engine.start()

    def execute(self, requests: Sequence[Any]) -> None:
        """Accept requests; the engine's thread sends the responses."""
        for request in requests:
            sender = request.get_response_sender()
            try:
                parsed = self._read(request)
            except InvalidRequestError as error:
                # TensorRT-LLM's LLM API model uses the same status for all errors.
                invalid = self._parameters.contract == "ensemble"
                send_error(self._backend, sender, str(error), invalid=invalid)
                continue
            generation = self._planner.plan(parsed)
            outlet = self._outlet(sender, parsed, input_tokens=generation.input_tokens)
            share = self._faults.fails_after(request.request_id())
            if share is not None:
                generation = generation.truncated(max(1, int(share * generation.tokens)))
                outlet = FailingOutlet(outlet)
            self._engine.submit(generation, outlet)

    def _outlet(self, sender: Any, request: GenerationRequest, *, input_tokens: int) -> Outlet:  # noqa: ANN401
        if self._parameters.contract == "llm-api":
            return LlmApiReply(self._backend, sender, request)
        return Reply(self._backend, sender, request, input_tokens=input_tokens)

    def _read(self, request: Any) -> GenerationRequest:  # noqa: ANN401 - the backend's request
        tensors = tensors_of(request)
        if self._parameters.contract == "llm-api":
            return read_llm_api_request(tensors, decoupled=self._parameters.decoupled)
        return read_request(tensors)

    def finalize(self) -> None:
        """Stop the engine."""
        self._engine.stop()
        if self._mark is not None:
            self._mark.close()
