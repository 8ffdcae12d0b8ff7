"""The model servers of the local stack: one Triton with the model, stand-in or real, and the stand-in judge."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field

from deploy.local.config import StackConfig
from deploy.local.fleet import DIRECTIVES, LocalFleet
from deploy.local.java import Say
from deploy.local.models import MODEL_TIER, ModelServerError, PreparedModels
from deploy.local.ports import LOOPBACK
from deploy.local.processes import ProcessSpec
from deploy.local.triton import TritonInstallation, free_triton_ports, install, metrics_url, ready_probe
from deploy.triton.models import JUDGE_NAME, LLM_NAME, SHIPPED_WORKLOAD
from deploy.triton.repository import RepositoryModel, write_repository
from deploy.triton.serve import SMOLLM2_MODEL, arguments, chosen_models

PROCESS_NAME = "triton"
"""Also the name under which a stack's configuration has settings for it (`SPROUT_TRITON_*`)."""


@dataclass(slots=True)
class TritonModels:
    """Implements `deploy.local.models.ModelServers`."""

    _installation: TritonInstallation | None = field(default=None, init=False)
    _say: Say = field(default=lambda _: None, init=False)

    def install(self, config: StackConfig, say: Say) -> None:
        """Make Triton's environment, once.

        Raises:
            ModelServerError: it could not be made.
        """
        self._say = say
        self._installation = install(config.install_dir, smollm2=config.model == SMOLLM2_MODEL, say=say)

    def prepare(self, config: StackConfig, clock: Mapping[str, str]) -> PreparedModels:
        """Write the model repository, choose ports, and say how to run the server under this clock.

        Raises:
            ModelServerError: it is not installed, or the workload or a setting does not do.
        """
        if self._installation is None:
            raise ModelServerError("Triton is installed before it is prepared")
        settings = config.settings.get(PROCESS_NAME, {})
        model, judge = self._models(config, settings)
        repository = config.state_dir / "models"
        write_repository(repository, [model, judge])
        ports = free_triton_ports()
        process = ProcessSpec(
            name=PROCESS_NAME,
            command=tuple(self._installation.command(repository, ports)),
            environment=self._installation.environment({**clock, **settings}),
            ready=ready_probe(ports),
            ready_timeout_s=120.0,
            stop_grace_s=15.0,
            tier=MODEL_TIER,
            port=ports.grpc,
            url=metrics_url(ports),
        )
        fleet = LocalFleet(
            model=config.model,
            zone=config.zone,
            grpc=f"{LOOPBACK}:{ports.grpc}",
            metrics=metrics_url(ports),
            gpu=model.gpu_uuid,
            judge_gpu=judge.gpu_uuid,
            idle_power_w=model.idle_power_w,
            judge_idle_power_w=judge.idle_power_w,
        )
        return PreparedModels(process=process, fleet=fleet, description=_description(config, model))

    def _models(self, config: StackConfig, settings: Mapping[str, str]) -> tuple[RepositoryModel, RepositoryModel]:
        catalogue = [{"level": level, "text": text} for level, text in DIRECTIVES if text]
        options = arguments(
            [
                f"--workload={config.workload or SHIPPED_WORKLOAD}",
                f"--models={LLM_NAME}={config.model}",
                f"--judge={JUDGE_NAME}",
                f"--directives={json.dumps(catalogue)}",
            ],
            {**os.environ, **settings},
        )
        try:
            model, judge = chosen_models(options, say=self._say)
        except ValueError as error:
            raise ModelServerError(str(error)) from error
        return model, judge


def _description(config: StackConfig, model: RepositoryModel) -> str:
    if config.model == SMOLLM2_MODEL:
        source = "measured by RAPL" if model.idle_power_w is None else "modelled from CPU time"
        return f"SmolLM2-135M-Instruct on the CPU, its energy {source}, and a stand-in judge"
    return (
        f"a stand-in for {config.model} (recorded answers and energy of "
        f"{(config.workload or SHIPPED_WORKLOAD).name}) and a stand-in judge"
    )
