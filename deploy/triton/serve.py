"""Writes a model repository and serves it with tritonserver: `python -m deploy.triton.serve --help`.

It is the entry point of the container image, and of model servers without the rest of Sprout. It needs only the
environment that has Triton's wheel (`requirements/triton.lock`).
"""

import argparse
import os
import sys
import tempfile
import zlib
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
from deploy.triton.stand_in.batching import BatchRules, CurveRules, RecordedRules
from deploy.triton.stand_in.faults import FaultRules
from deploy.triton.stand_in.judge import JudgeRules
from deploy.triton.stand_in.parameters import DEFAULT_DIRECTIVES, named_curve, read_directives
from deploy.triton.watchdog import run_as_init
from shared.batch_curve import MEASURED
from shared.runtime.clock import Clock

SMOLLM2_MODEL = "smollm2"

RECORDED = "recorded"
"""In place of the name of a curve: the recorded energy and time of each request."""

DEFAULT_CURVE = "qwen3-14b-h100"


def arguments(given: Sequence[str], environment: Mapping[str, str]) -> argparse.Namespace:
    """Read the command line; options that are not given come from the environment, otherwise from the defaults."""
    parser = argparse.ArgumentParser(
        prog="python -m deploy.triton.serve",
        description="Serve stand-in models, or SmolLM2, behind TensorRT-LLM's contracts.",
    )

    def option(flag: str, variable: str, default: str, text: str) -> None:
        shown = f"{variable}: {default}" if default else variable
        parser.add_argument(flag, default=environment.get(variable) or default, help=f"{text} [{shown}]")

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
    option(
        "--gpu-uuid",
        "SPROUT_TRITON_GPU_UUID",
        "",
        "label of the model's energy counters, for a single model; servers of one fleet need different labels; "
        "default: stand-in-MODEL",
    )
    option(
        "--curve",
        "SPROUT_TRITON_CURVE",
        DEFAULT_CURVE,
        f"power and speed of the stand-ins by batch size: {', '.join(MEASURED)}; "
        f"or {RECORDED}: each request's recorded energy and time",
    )
    option("--tick-ms", "SPROUT_TRITON_TICK_MS", "5", "least wall time between two parts of an answer after the first")
    option("--stretch", "SPROUT_TRITON_STRETCH", "1", "with a curve: steps take this many times as long, at its power")
    option(
        "--slots", "SPROUT_TRITON_SLOTS", "", "most requests of a stand-in that run at once; default: 256, recorded 64"
    )
    option("--idle-power-w", "SPROUT_TRITON_IDLE_POWER_W", "", "recorded: idle power of each GPU; default: 55")
    option(
        "--slowdown",
        "SPROUT_TRITON_SLOWDOWN",
        "",
        "recorded: share by which each further request slows all of them; default: 0.02",
    )
    option(
        "--position-bias", "SPROUT_TRITON_POSITION_BIAS", "0.15", "probability that the judge names the first answer"
    )
    option("--unparseable", "SPROUT_TRITON_UNPARSEABLE", "0", "probability that the judge names no answer")
    option("--error-share", "SPROUT_TRITON_ERROR_SHARE", "0", "probability that a stand-in's generation fails")
    option(
        "--model-control",
        "SPROUT_TRITON_MODEL_CONTROL",
        "none",
        "explicit: clients may unload and load models, also models of their own; none: they may not",
    )
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
    batch = _batch_rules(options)
    idle_power_w = float(options.idle_power_w) if options.idle_power_w else None
    gpu_uuid = str(options.gpu_uuid) or None
    if gpu_uuid is not None and len(bindings) > 1:
        raise ParameterError(f"--gpu-uuid is for a single model, and --models names {len(bindings)}; leave it out")
    # With a label of its own, a server fails on other requests than the other servers.
    seed = zlib.crc32(gpu_uuid.encode()) if gpu_uuid is not None else 0
    faults = FaultRules(error_share=float(options.error_share), seed=seed)
    models = [
        smollm2(name=name, gpu_uuid=gpu_uuid)
        if model == SMOLLM2_MODEL
        else stand_in_llm(
            workload,
            model=model,
            name=name,
            gpu_uuid=gpu_uuid,
            tick_ms=float(options.tick_ms),
            idle_power_w=idle_power_w,
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


def _batch_rules(options: argparse.Namespace) -> BatchRules:
    stretch = float(options.stretch)
    if options.curve == RECORDED:
        if stretch != 1:
            raise ParameterError(f"--stretch is for a curve; leave it out, or choose --curve {DEFAULT_CURVE}")
        return RecordedRules(slots=int(options.slots or 64), slowdown=float(options.slowdown or 0.02))
    for flag, given in (("--slowdown", options.slowdown), ("--idle-power-w", options.idle_power_w)):
        if given:
            raise ParameterError(f"{flag} is for recorded energy; leave it out, or choose --curve {RECORDED}")
    if options.curve not in MEASURED:
        raise ParameterError(f"--curve must be {RECORDED} or one of {', '.join(MEASURED)}; got {options.curve!r}")
    return CurveRules(curve=named_curve(str(options.curve), stretch=stretch), slots=int(options.slots or 256))


def main() -> None:
    """Write the repository, then serve."""
    options = arguments(sys.argv[1:], os.environ)
    folder = Path(options.folder or tempfile.mkdtemp(prefix="sprout-triton-"))
    try:
        Clock.from_environment()
        models = chosen_models(options, say=_say)
        write_repository(folder / "models", models)
        server = assemble_here(folder / "backends")
        model_control = _model_control(str(options.model_control))
        ports = TritonPorts(int(options.grpc_port), int(options.http_port), int(options.metrics_port))
    except (ServerError, ValueError) as error:  # the others are all kinds of ValueError
        _say(f"cannot serve: {error}")
        raise SystemExit(2) from error
    for model in models:
        _say(f"serving {model.name}; its energy counters have gpu_uuid {model.gpu_uuid!r}")
    command = server.command(folder / "models", ports, address=str(options.address), model_control=model_control)
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


def _model_control(mode: str) -> bool:
    if mode not in ("explicit", "none"):
        raise ParameterError(f"--model-control must be explicit or none; got {mode!r}")
    return mode == "explicit"


def _say(message: str) -> None:
    sys.stderr.write(f"{message}\n")


if __name__ == "__main__":
    main()
