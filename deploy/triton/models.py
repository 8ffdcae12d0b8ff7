"""The models that a repository may contain, with their names, energy labels and parameters."""

from collections.abc import Callable, Sequence
from pathlib import Path

from deploy.triton.contract import ContractName
from deploy.triton.repository import SMOLLM2, STAND_IN, ParameterError, RepositoryModel
from deploy.triton.smollm2.parameters import EnergySource, SmolLm2Parameters
from deploy.triton.smollm2.power import available_source, energy_label
from deploy.triton.stand_in.batching import BatchRules, CurveRules, RecordedRules
from deploy.triton.stand_in.faults import FaultRules
from deploy.triton.stand_in.judge import JudgeRules
from deploy.triton.stand_in.parameters import DEFAULT_DIRECTIVES, StandInParameters
from deploy.triton.stand_in.prompt import Directive
from deploy.triton.stand_in.workload import Workload, load_workload

SHIPPED_WORKLOAD = Path(__file__).parent / "workload" / "shipped.jsonl.gz"
"""The workload written for this project."""

LLM_NAME = "ensemble"
"""The name of the client-facing model in TensorRT-LLM's examples."""

JUDGE_NAME = "judge"


def stand_in_llm(
    workload: Path,
    *,
    model: str = "llama-2-13b-chat",
    name: str = LLM_NAME,
    gpu_uuid: str | None = None,
    idle_power_w: float | None = None,
    directives: Sequence[Directive] = DEFAULT_DIRECTIVES,
    batch: BatchRules | None = None,
    tick_ms: float = 5.0,
    contract: ContractName = "ensemble",
    decoupled: bool = True,
    faults: FaultRules | None = None,
) -> RepositoryModel:
    """A stand-in for one language model of a workload.

    Args:
        model: the model of the workload whose recorded answers it gives.
        name: in Triton's repository; several stand-ins in one repository need different names.
        gpu_uuid: label of its energy counters; servers of one fleet need different ones; default: `stand-in-` and the
            model.
        idle_power_w: default: 55 W, as an idle A100; with a curve it is the curve's.
        batch: how the batch size acts on speed and energy: recorded ones (the default), or a curve.
        contract: which of TensorRT-LLM's contracts it has.
        decoupled: it can stream; TensorRT-LLM's `llm-api` model cannot by default.
        faults: how often a generation fails; default: never.

    Raises:
        ParameterError: a parameter is invalid, or `idle_power_w` is given beside a curve.
    """
    rules = batch or RecordedRules()
    curve = rules.curve if isinstance(rules, CurveRules) else None
    if curve is not None and idle_power_w is not None:
        raise ParameterError("'idle_power_w' has no effect with a curve, which has an idle power; remove it")
    own_idle_w = 0.0 if curve is not None else 55.0 if idle_power_w is None else idle_power_w
    parameters = StandInParameters(
        workload=workload.resolve(),
        model=model,
        gpu_uuid=gpu_uuid or f"stand-in-{model}",
        idle_power_w=own_idle_w,
        directives=tuple(directives),
        tick_ms=tick_ms,
        batch=rules,
        contract=contract,
        decoupled=decoupled,
        faults=faults or FaultRules(),
    )
    return RepositoryModel(
        name,
        STAND_IN,
        parameters.to_texts(),
        gpu_uuid=parameters.gpu_uuid,
        idle_power_w=own_idle_w if curve is None else curve.idle_w,
        asleep_power_w=None if curve is None else curve.asleep_w,
        contract=contract,
        decoupled=decoupled,
    )


def stand_in_judge(
    workload: Path,
    *,
    name: str = JUDGE_NAME,
    gpu_uuid: str = "stand-in-judge",
    idle_power_w: float = 0.0,
    rules: JudgeRules | None = None,
) -> RepositoryModel:
    """A stand-in for the judge of answers.

    Args:
        idle_power_w: 0, assuming that the judge is a service shared with other users.
    """
    parameters = StandInParameters(
        role="judge",
        workload=workload.resolve(),
        gpu_uuid=gpu_uuid,
        idle_power_w=idle_power_w,
        judge=rules or JudgeRules(),
    )
    return RepositoryModel(name, STAND_IN, parameters.to_texts(), gpu_uuid=gpu_uuid, idle_power_w=idle_power_w)


def smollm2(
    *, name: str = LLM_NAME, energy_source: EnergySource | None = None, gpu_uuid: str | None = None
) -> RepositoryModel:
    """SmolLM2 on this machine's processor.

    Args:
        energy_source: default: measured (RAPL) where the machine allows it, otherwise modelled from CPU time.
        gpu_uuid: label of its energy counters; default: a label that names the energy source.
    """
    source = energy_source or available_source()
    parameters = SmolLm2Parameters(gpu_uuid=gpu_uuid or energy_label(source), energy_source=source)
    return RepositoryModel(
        name,
        SMOLLM2,
        parameters.to_texts(),
        gpu_uuid=parameters.gpu_uuid,
        # The ledger learns the idle power that RAPL measures; the model of CPU time has no idle power.
        idle_power_w=None if source == "rapl" else 0.0,
    )


def checked_workload(path: Path, *, models: Sequence[str], say: Callable[[str], None]) -> Workload:
    """Read a workload as the models will, before they are started.

    Args:
        models: that must have answers in it.
        say: called with a message about lines that are skipped.

    Raises:
        WorkloadError: it cannot be used, or has no answers of one of the models.
    """
    workload = load_workload(path)
    for problem in workload.problems:
        say(f"workload: skipped {problem}")
    if workload.skipped > len(workload.problems):
        say(f"workload: {workload.skipped} lines of {path} skipped in total")
    for model in models:
        workload.means_of(model)
    return workload
