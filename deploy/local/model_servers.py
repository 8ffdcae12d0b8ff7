"""The model servers of a local stack: Triton servers with the model (stand-in or SmolLM2).

The first server also has the stand-in judge, which is always loaded.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Final, Protocol

from deploy.local.config import StackConfig
from deploy.local.fleet import DIRECTIVES, SMALL_MODEL, LocalFleet, LocalServer
from deploy.local.java import Say
from deploy.local.processes import LOOPBACK, ProcessSpec
from deploy.local.triton import (
    ModelServerError,
    TritonInstallation,
    install,
    metrics_url,
    ports_of_servers,
    ready_probe,
)
from deploy.triton.models import JUDGE_NAME, LLM_NAME, SHIPPED_WORKLOAD
from deploy.triton.repository import RepositoryModel, write_repository
from deploy.triton.serve import RECORDED, SMOLLM2_MODEL, arguments, chosen_models
from deploy.triton.stand_in.workload import WorkloadError, load_workload

MODEL_TIER: Final = 1
"""The tier of model servers: stopped after the services, before Kafka."""

PROCESS_NAME: Final = "triton"
"""Name of the process, if there is one server; several are `triton-0`, `triton-1`, ... Also the key of the servers'
settings (`SPROUT_TRITON_*`) in `StackConfig.settings`."""

SMALL_PROCESS_NAME: Final = "triton-small"

SMALL_CURVE: Final = "llama-3.1-8b-h100"
"""Curve of the smaller variant, where the model has one."""

Directives = tuple[tuple[str, str], ...]
"""Level and text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedModels:
    """Model servers that are ready to be started.

    Attributes:
        processes: one per server, in packing order.
        description: the models, for people.
    """

    processes: tuple[ProcessSpec, ...]
    fleet: LocalFleet
    description: str


class ModelServers(Protocol):
    """Installs and prepares the servers of the model and the judge."""

    def install(self, config: StackConfig, say: Say) -> None:
        """Install the servers, once, below the installation folder.

        Raises:
            ModelServerError: they could not be installed.
        """
        ...

    def prepare(self, config: StackConfig, clock: Mapping[str, str]) -> PreparedModels:
        """Write the model repositories and choose the ports.

        Args:
            clock: `SPROUT_CLOCK_*` variables.

        Raises:
            ModelServerError: the workload or a setting is invalid.
        """
        ...


@dataclass(slots=True)
class TritonModels:
    """`ModelServers` as Triton servers."""

    _installation: TritonInstallation | None = field(default=None, init=False)
    _say: Say = field(default=lambda _: None, init=False)

    def install(self, config: StackConfig, say: Say) -> None:
        """Install Triton's environment, once.

        Raises:
            ModelServerError: it could not be installed.
        """
        self._say = say
        self._installation = install(config.install_dir, smollm2=config.model == SMOLLM2_MODEL, say=say)

    def prepare(self, config: StackConfig, clock: Mapping[str, str]) -> PreparedModels:
        """Write the model repositories and choose the ports.

        Raises:
            ModelServerError: `install` was not called, or the workload or a setting is invalid.
        """
        if self._installation is None:
            raise ModelServerError("call install before prepare")
        settings = config.settings.get(PROCESS_NAME, {})
        directives = _directives(config)
        repositories = [self._models(config, settings, number, directives) for number in range(config.servers)]
        names = [
            PROCESS_NAME if config.servers == 1 else f"{PROCESS_NAME}-{number}" for number in range(config.servers)
        ]
        if config.small:
            repositories.append(self._models(config, settings, config.servers, directives, small=True))
            names.append(SMALL_PROCESS_NAME)
        processes, servers = [], []
        for number, ports in enumerate(ports_of_servers(len(names))):
            name = names[number]
            repository = config.state_dir / "models" / name
            write_repository(repository, repositories[number])
            process = ProcessSpec(
                name=name,
                # With model control other users of this machine could run code in the server.
                command=tuple(self._installation.command(repository, ports, model_control=config.sleep)),
                environment=self._installation.environment({**clock, **settings}),
                ready=ready_probe(ports),
                ready_timeout_s=120.0,
                stop_grace_s=15.0,
                tier=MODEL_TIER,
                port=ports.grpc,
                url=f"http://{LOOPBACK}:{ports.http}",
            )
            processes.append(process)
            gpu = repositories[number][0].gpu_uuid
            servers.append(LocalServer(grpc=f"{LOOPBACK}:{ports.grpc}", metrics=metrics_url(ports), gpu=gpu))
        model, judge = repositories[0]
        fleet = LocalFleet(
            config=config,
            servers=tuple(servers[: config.servers]),
            small_server=servers[-1] if config.small else None,
            directives=directives,
            judge=replace(servers[0], gpu=judge.gpu_uuid),
            idle_power_w=model.idle_power_w,
            judge_idle_power_w=judge.idle_power_w,
        )
        return PreparedModels(processes=tuple(processes), fleet=fleet, description=_description(config, model))

    def _models(
        self,
        config: StackConfig,
        settings: Mapping[str, str],
        number: int,
        directives: Directives,
        *,
        small: bool = False,
    ) -> list[RepositoryModel]:
        """The models of a server: the model or its smaller variant, and on the first server the judge."""
        catalogue = [{"level": level, "text": text} for level, text in directives if text]
        model = SMALL_MODEL if small else config.model
        curve = SMALL_CURVE if small and config.curve != RECORDED else config.curve
        options = arguments(
            [
                f"--workload={config.workload or SHIPPED_WORKLOAD}",
                f"--models={LLM_NAME}={model}",
                f"--judge={JUDGE_NAME if number == 0 else 'none'}",
                f"--directives={json.dumps(catalogue)}",
                f"--curve={curve}",
                f"--stretch={config.stretch}",
                *([f"--gpu-uuid=stand-in-{model}-{number}"] if config.servers > 1 or small else []),
            ],
            {**os.environ, **settings},
        )
        try:
            # The workload is the same on all servers.
            return chosen_models(options, say=self._say if number == 0 else lambda _: None)
        except ValueError as error:
            raise ModelServerError(str(error)) from error


def _directives(config: StackConfig) -> Directives:
    """The model's directives; of a workload of one's own, those that it records.

    Raises:
        ModelServerError: the workload cannot be used.
    """
    known = DIRECTIVES[config.model]
    if config.workload is None or config.workload == SHIPPED_WORKLOAD or config.model == SMOLLM2_MODEL:
        return known
    try:
        recorded = load_workload(config.workload).levels_of(config.model)
    except WorkloadError as error:
        raise ModelServerError(str(error)) from error
    return tuple((level, text) for level, text in known if level in recorded or not text)


def _description(config: StackConfig, model: RepositoryModel) -> str:
    if config.model == SMOLLM2_MODEL:
        source = "measured by RAPL" if model.idle_power_w is None else "modelled from CPU time"
        return f"SmolLM2-135M-Instruct on the CPU, its energy {source}, and a stand-in judge"
    count = "a stand-in" if config.servers == 1 else f"{config.servers} stand-ins"
    variant = f", one for {SMALL_MODEL}" if config.small else ""
    workload = (config.workload or SHIPPED_WORKLOAD).name
    if config.curve == RECORDED:
        source = f"recorded answers and energy of {workload}"
    else:
        stretched = "" if config.stretch == 1 else f", steps {config.stretch:g} times as long"
        source = f"recorded answers of {workload}, power and speed of {config.curve}{stretched}"
    return f"{count} for {config.model} ({source}){variant} and a stand-in judge"
