"""Writes a Triton model repository: for each model a folder with its configuration and a `model.py`."""

import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from deploy.triton.contract import CONTRACTS, ContractName, TensorSpec

STAND_IN = "deploy.triton.stand_in.model"
SMOLLM2 = "deploy.triton.smollm2.model"

_SOURCE = '''"""Loaded by Triton."""

from {module} import TritonPythonModel

__all__ = ["TritonPythonModel"]
'''

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class ParameterError(ValueError):
    """A parameter of a model is unknown, or its value is invalid; the message names it."""


class RepositoryError(ValueError):
    """The models cannot be combined in one repository."""


@dataclass(frozen=True, slots=True)
class RepositoryModel:
    """One model of a repository.

    Attributes:
        name: in Triton's repository, for example `ensemble`.
        module: Python module that has its `TritonPythonModel`.
        parameters: string parameters, as the module reads them.
        gpu_uuid: label of its energy counters.
        idle_power_w: power while no request runs, W; None where it is not known in advance.
        contract: which tensors it has.
        decoupled: it can answer a request in several responses.
    """

    name: str
    module: str
    parameters: Mapping[str, str]
    gpu_uuid: str
    idle_power_w: float | None
    contract: ContractName = "ensemble"
    decoupled: bool = True


def write_repository(folder: Path, models: Sequence[RepositoryModel]) -> None:
    """Write the models; replaces the content of the folder.

    Raises:
        RepositoryError: there is no model, a name cannot be a folder's, or two have the same name or energy label.
    """
    _check(models)
    shutil.rmtree(folder, ignore_errors=True)
    for model in models:
        version = folder / model.name / "1"
        version.mkdir(parents=True)
        (version.parent / "config.pbtxt").write_text(_configuration(model), encoding="utf-8")
        (version / "model.py").write_text(_SOURCE.format(module=model.module), encoding="utf-8")


def _check(models: Sequence[RepositoryModel]) -> None:
    if not models:
        raise RepositoryError("a model repository needs at least one model")
    names = [model.name for model in models]
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
        "instance_group [ { count: 1 kind: KIND_CPU } ]",
        *(_tensor("input", tensor) for tensor in contract.inputs),
        *(_tensor("output", tensor) for tensor in contract.outputs),
        *(
            f"parameters {{ key: {_quoted(name)} value {{ string_value: {_quoted(value)} }} }}"
            for name, value in model.parameters.items()
        ),
    ]
    return "\n".join(lines) + "\n"


def _tensor(kind: str, tensor: TensorSpec) -> str:
    dims = ", ".join(str(size) for size in tensor.dims)
    optional = " optional: true" if kind == "input" and tensor.optional else ""
    return f"{kind} {{ name: {_quoted(tensor.name)} data_type: TYPE_{tensor.data_type} dims: [ {dims} ]{optional} }}"


def _quoted(text: str) -> str:
    """A string of protobuf's text format."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\r", "\\r")
    return f'"{escaped}"'
