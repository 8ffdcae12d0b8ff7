"""Writes a Triton model repository: for each model a folder with its configuration and a `model.py`."""

import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from deploy.triton.contract import CONTRACTS, ContractName, TensorSpec

STAND_IN = "deploy.triton.stand_in.model"
SMOLLM2 = "deploy.triton.smollm2.model"
GPU = "deploy.triton.gpu"

_SOURCE = '''"""Loaded by Triton."""

from {module} import TritonPythonModel

__all__ = ["TritonPythonModel"]
'''

_INSTANCE = "instance_group [ { count: 1 kind: KIND_CPU } ]"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class ParameterError(ValueError):
    """A parameter of a model is unknown, or its value is invalid; the message names it."""


class RepositoryError(ValueError):
    """The models cannot be combined in one repository."""


@dataclass(frozen=True, slots=True)
class RepositoryModel:
    """One model of a repository.

    A model with an asleep power gets a companion (`deploy.triton.gpu`), which meters its idle and asleep power.

    Attributes:
        name: in Triton's repository, for example `ensemble`.
        module: Python module that has its `TritonPythonModel`.
        parameters: string parameters, as the module reads them.
        gpu_uuid: label of its energy counters.
        idle_power_w: power while no request runs, W; None where it is not known in advance.
        asleep_power_w: power while it is unloaded, W; None: not metered.
        contract: which tensors it has.
        decoupled: it can answer a request in several responses.
    """

    name: str
    module: str
    parameters: Mapping[str, str]
    gpu_uuid: str
    idle_power_w: float | None
    asleep_power_w: float | None = None
    contract: ContractName = "ensemble"
    decoupled: bool = True

    @property
    def companion_name(self) -> str:
        """The name of its companion."""
        return f"{self.name}-gpu"


def write_repository(folder: Path, models: Sequence[RepositoryModel]) -> None:
    """Write the models and their companions; replaces the content of the folder.

    Raises:
        RepositoryError: there is no model, a name cannot be a folder's, or two have the same name or energy label.
    """
    _check(models)
    shutil.rmtree(folder, ignore_errors=True)
    for model in models:
        _write(folder / model.name, _configuration(model), module=model.module)
        if model.asleep_power_w is not None:
            _write(folder / model.companion_name, _companion_configuration(model), module=GPU)


def _write(folder: Path, configuration: str, *, module: str) -> None:
    version = folder / "1"
    version.mkdir(parents=True)
    (folder / "config.pbtxt").write_text(configuration, encoding="utf-8")
    (version / "model.py").write_text(_SOURCE.format(module=module), encoding="utf-8")


def _check(models: Sequence[RepositoryModel]) -> None:
    if not models:
        raise RepositoryError("a model repository needs at least one model")
    names = [model.name for model in models]
    names += [model.companion_name for model in models if model.asleep_power_w is not None]
    for name in names:
        if not _NAME.fullmatch(name):
            raise RepositoryError(f"{name!r} is not a model name: use letters, digits, '.', '_' and '-'")
    labels = [model.gpu_uuid for model in models]
    for what, given in (("model name", names), ("'gpu_uuid'", labels)):
        doubled = sorted({one for one in given if given.count(one) > 1})
        if doubled:
            raise RepositoryError(
                f"{what} used twice in one repository: {', '.join(doubled)}; each model needs its own"
            )


def _configuration(model: RepositoryModel) -> str:
    contract = CONTRACTS[model.contract]
    lines = [
        f"name: {_quoted(model.name)}",
        'backend: "python"',
        f"max_batch_size: {contract.max_batch_size}",
        f"model_transaction_policy {{ decoupled: {str(model.decoupled).lower()} }}",
        _INSTANCE,
        *(_tensor("input", tensor) for tensor in contract.inputs),
        *(_tensor("output", tensor) for tensor in contract.outputs),
        *_parameters(model.parameters),
    ]
    return "\n".join(lines) + "\n"


def _companion_configuration(model: RepositoryModel) -> str:
    parameters = {
        "model": model.name,
        "gpu_uuid": model.gpu_uuid,
        "idle_power_w": repr(model.idle_power_w or 0.0),
        "asleep_power_w": repr(model.asleep_power_w),
    }
    lines = [f"name: {_quoted(model.companion_name)}", 'backend: "python"', _INSTANCE, *_parameters(parameters)]
    return "\n".join(lines) + "\n"


def _parameters(parameters: Mapping[str, str]) -> list[str]:
    return [
        f"parameters {{ key: {_quoted(name)} value {{ string_value: {_quoted(value)} }} }}"
        for name, value in parameters.items()
    ]


def _tensor(kind: str, tensor: TensorSpec) -> str:
    dims = ", ".join(str(size) for size in tensor.dims)
    optional = " optional: true" if kind == "input" and tensor.optional else ""
    return f"{kind} {{ name: {_quoted(tensor.name)} data_type: TYPE_{tensor.data_type} dims: [ {dims} ]{optional} }}"


def _quoted(text: str) -> str:
    """A string of protobuf's text format."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\r", "\\r")
    return f'"{escaped}"'
