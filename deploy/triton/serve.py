"""Writes a model repository and serves it with tritonserver: `python -m deploy.triton.serve --help`.

It is the entry point of the container image, and of model servers without the rest of Sprout. It needs only the
environment that has Triton's wheel (`requirements/triton.lock`).
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from deploy.triton.contract import CONTRACT_NAMES, ContractName
from deploy.triton.models import (
    JUDGE_NAME,
    LLM_NAME,
    SHIPPED_WORKLOAD,
    checked_workload,
    smollm2,
    stand_in_judge,
    stand_in_llm,
)
from deploy.triton.repository import ParameterError, RepositoryModel, write_repository
from deploy.triton.server import ServerError, TritonPorts, assemble_here
from deploy.triton.stand_in.batching import BatchRules
from deploy.triton.stand_in.faults import FaultRules
from deploy.triton.stand_in.judge import JudgeRules
from deploy.triton.stand_in.parameters import DEFAULT_DIRECTIVES, read_directives
from deploy.triton.watchdog import run_as_init
from shared.runtime.clock import Clock

SMOLLM2_MODEL = "smollm2"


def arguments(given: Sequence[str], environment: Mapping[str, str]) -> argparse.Namespace:
    """Read the command line; options that are not given come from the environment, otherwise from the defaults."""
    parser = argparse.ArgumentParser(
        prog="python -m deploy.triton.serve",
        description="Serve stand-in models, or SmolLM2, behind TensorRT-LLM's contracts.",
    )

    def option(flag: str, variable: str, default: str, text: str) -> None:
        parser.add_argument(flag, default=environment.get(variable) or default, help=f"{text} [{variable}: {default}]")

    option("--workload", "WORKLOAD", str(SHIPPED_WORKLOAD), "recorded prompts, JSON lines, may be gzipped")
    option(
        "--models",
        "SPROUT_TRITON_MODELS",
        f"{LLM_NAME}=llama-2-13b-chat",
        f"comma-separated name=model; the model is one of the workload's, or {SMOLLM2_MODEL}",
    )
    option("--contract", "SPROUT_TRITON_CONTRACT", "ensemble", "of the stand-in models: ensemble or llm-api")
    option("--judge", "SPROUT_TRITON_JUDGE", JUDGE_NAME, "name of the stand-in judge; 'none' for none")
    option("--directives", "SPROUT_TRITON_DIRECTIVES", "", 'the directives as JSON: [{"level": ..., "text": ...}]')
    option("--idle-power-w", "SPROUT_TRITON_IDLE_POWER_W", "55", "idle power of each stand-in's GPU")
    option("--slots", "SPROUT_TRITON_SLOTS", "64", "most requests of a stand-in that run at once")
    option("--slowdown", "SPROUT_TRITON_SLOWDOWN", "0.02", "share by which each further request slows all of them")
    option(
        "--position-bias", "SPROUT_TRITON_POSITION_BIAS", "0.15", "probability that the judge names the first answer"
    )
    option("--unparseable", "SPROUT_TRITON_UNPARSEABLE", "0", "probability that the judge names no answer")
    option("--error-share", "SPROUT_TRITON_ERROR_SHARE", "0", "probability that a stand-in's generation fails")
    option("--address", "SPROUT_TRITON_ADDRESS", "127.0.0.1", "address to bind; 0.0.0.0 in a container")
    option("--grpc-port", "SPROUT_TRITON_GRPC_PORT", "8001", "gRPC service")
    option("--http-port", "SPROUT_TRITON_HTTP_PORT", "8000", "HTTP service, with /v2/health/ready")
    option("--metrics-port", "SPROUT_TRITON_METRICS_PORT", "8002", "Prometheus metrics")
    option("--folder", "SPROUT_TRITON_FOLDER", "", "where to write the repository; default: a new temporary folder")
    return parser.parse_args(given)


def chosen_models(options: argparse.Namespace, *, say: Callable[[str], None]) -> list[RepositoryModel]:
    """The models that the options select.

    Args:
        say: called with a message about lines of the workload that are skipped.

    Raises:
        WorkloadError, ParameterError, RepositoryError, ValueError: an option is invalid.
    """
    workload = Path(options.workload)
    bindings = [_binding(text) for text in str(options.models).split(",") if text.strip()]
    judge = None if options.judge == "none" else str(options.judge)
    recorded = [model for _, model in bindings if model != SMOLLM2_MODEL]
    if recorded or judge is not None:
        checked_workload(workload, models=recorded, say=say)
    directives = read_directives(options.directives) if options.directives else DEFAULT_DIRECTIVES
    batch = BatchRules(slots=int(options.slots), slowdown=float(options.slowdown))
    faults = FaultRules(error_share=float(options.error_share))
    models = [
        smollm2(name=name)
        if model == SMOLLM2_MODEL
        else stand_in_llm(
            workload,
            model=model,
            name=name,
            idle_power_w=float(options.idle_power_w),
            directives=directives,
            batch=batch,
            contract=_contract(str(options.contract)),
            faults=faults,
        )
        for name, model in bindings
    ]
    if judge is not None:
        rules = JudgeRules(position_bias=float(options.position_bias), unparseable=float(options.unparseable))
        models.append(stand_in_judge(workload, name=judge, rules=rules))
    return models


def main() -> None:
    """Write the repository, then serve."""
    options = arguments(sys.argv[1:], os.environ)
    folder = Path(options.folder or tempfile.mkdtemp(prefix="sprout-triton-"))
    try:
        Clock.from_environment()
        models = chosen_models(options, say=_say)
        write_repository(folder / "models", models)
        server = assemble_here(folder / "backends")
        ports = TritonPorts(int(options.grpc_port), int(options.http_port), int(options.metrics_port))
    except (ServerError, ValueError) as error:  # the others are all kinds of ValueError
        _say(f"cannot serve: {error}")
        raise SystemExit(2) from error
    for model in models:
        _say(f"serving {model.name}; its energy counters have gpu_uuid {model.gpu_uuid!r}")
    command = server.command(folder / "models", ports, address=str(options.address))
    environment = {**os.environ, **server.environment()}
    if os.getpid() == 1:
        raise SystemExit(run_as_init(command, environment))
    os.execve(command[0], command, environment)


def _binding(text: str) -> tuple[str, str]:
    name, equals, model = text.strip().partition("=")
    if not (name and equals and model):
        raise ParameterError(f"--models must be name=model, separated by commas; got {text.strip()!r}")
    return name, model


def _contract(name: str) -> ContractName:
    for known in CONTRACT_NAMES:
        if known == name:
            return known
    raise ParameterError(f"--contract must be one of {', '.join(CONTRACT_NAMES)}; got {name!r}")


def _say(message: str) -> None:
    sys.stderr.write(f"{message}\n")


if __name__ == "__main__":
    main()
