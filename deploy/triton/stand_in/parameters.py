"""The parameters of a stand-in model: written to its Triton configuration, and read when Triton loads it."""

import json
import math
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

from deploy.triton.contract import CONTRACT_NAMES, ContractName
from deploy.triton.repository import ParameterError
from deploy.triton.stand_in.batching import BatchRules, CurveRules, RecordedRules
from deploy.triton.stand_in.faults import FaultRules
from deploy.triton.stand_in.judge import JudgeRules
from deploy.triton.stand_in.prompt import Directive
from shared.batch_curve import MEASURED, BatchCurve

Role = Literal["llm", "judge"]
ROLES: tuple[Role, ...] = get_args(Role)

DEFAULT_DIRECTIVES = (
    Directive("L3", "Think step by step in as few words as you can, then give the answer."),
    Directive("L1", "Always answer briefly."),
    Directive("L2", "Always answer very briefly."),
)
"""Concise reasoning, and the paper's directives; without L0, which has no text."""

_RULES = {"batch": RecordedRules, "curve": BatchCurve, "judge": JudgeRules, "faults": FaultRules}
_INTEGERS = frozenset({"slots", "seed"})
"""Parameters that are integers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StandInParameters:
    """One stand-in model.

    Attributes:
        role: an LLM that answers prompts, or the judge of answers.
        workload: file of recorded prompts.
        model: the model of the workload whose answers an LLM gives; not used by a judge.
        gpu_uuid: label of its energy counters.
        idle_power_w: power while no request runs, W; 0 with a curve, because the companion meters the idle power.
        directives: the list of directives, to find the level in a prompt.
        tick_ms: wall time between two rounds of parts after the first tokens; tokens that are due by then are
            sent together.
        batch: how the batch size acts on speed and energy; with a curve, `curve.*` parameters are written.
        judge: a judge's error rates, energy and time.
        contract: which tensors it has.
        decoupled: it can answer a request in several responses.
        faults: how often an LLM's generation fails.
    """

    role: Role = "llm"
    workload: Path
    model: str = ""
    gpu_uuid: str
    idle_power_w: float = 55.0
    directives: tuple[Directive, ...] = DEFAULT_DIRECTIVES
    tick_ms: float = 5.0
    batch: BatchRules = field(default_factory=RecordedRules)
    judge: JudgeRules = field(default_factory=JudgeRules)
    contract: ContractName = "ensemble"
    decoupled: bool = True
    faults: FaultRules = field(default_factory=FaultRules)

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise ParameterError(f"'role' must be one of {', '.join(ROLES)}, got {self.role!r}")
        if self.contract not in CONTRACT_NAMES:
            raise ParameterError(f"'contract' must be one of {', '.join(CONTRACT_NAMES)}, got {self.contract!r}")
        if self.role == "llm" and not self.model:
            raise ParameterError("'model' is missing: name the model of the workload whose answers it gives")
        if not self.gpu_uuid:
            raise ParameterError("'gpu_uuid' is missing: name the label of its energy counters")
        if not self.idle_power_w >= 0:
            raise ParameterError(f"'idle_power_w' must not be negative, got {self.idle_power_w}")
        if isinstance(self.batch, CurveRules) and self.idle_power_w != 0:
            raise ParameterError("'idle_power_w' has no effect with a curve, which has an idle power; remove it")
        if not self.tick_ms >= 1:
            raise ParameterError(f"'tick_ms' must be at least 1, got {self.tick_ms}")

    def to_texts(self) -> dict[str, str]:
        """As string parameters of a model configuration."""
        texts = {
            "role": self.role,
            "workload": str(self.workload),
            "model": self.model,
            "gpu_uuid": self.gpu_uuid,
            "idle_power_w": repr(self.idle_power_w),
            "directives": json.dumps([asdict(directive) for directive in self.directives]),
            "tick_ms": repr(self.tick_ms),
            "contract": self.contract,
            "decoupled": str(self.decoupled).lower(),
        }
        rules = {prefix: asdict(getattr(self, prefix)) for prefix in _RULES if prefix != "curve"}
        if isinstance(self.batch, CurveRules):
            rules["curve"] = rules["batch"].pop("curve")
        for prefix, values in rules.items():
            texts |= {f"{prefix}.{name}": repr(value) for name, value in values.items()}
        return texts

    @classmethod
    def from_texts(cls, texts: Mapping[str, str]) -> "StandInParameters":
        """Read the string parameters of a model configuration.

        Raises:
            ParameterError: one is missing, unknown, or invalid.
        """
        values: dict[str, Any] = {}
        rules: dict[str, dict[str, Any]] = {prefix: {} for prefix in _RULES}
        known = {one.name for one in fields(cls)} - set(_RULES)
        for name, text in texts.items():
            prefix, dot, rest = name.partition(".")
            if dot and prefix in _RULES and rest in {one.name for one in fields(_RULES[prefix])}:
                rules[prefix][rest] = int(_number(name, text)) if rest in _INTEGERS else _number(name, text)
            elif name in known:
                values[name] = _read(name, text)
            else:
                raise ParameterError(f"{name!r} is not a parameter of a stand-in model; remove it")
        for name in ("workload", "gpu_uuid"):
            if name not in values:
                raise ParameterError(f"'{name}' is missing: add it to the model's parameters")
        try:
            return cls(
                **values,
                batch=_batch_rules(rules["batch"], rules["curve"]),
                judge=JudgeRules(**rules["judge"]),
                faults=FaultRules(**rules["faults"]),
            )
        except ValueError as error:
            raise ParameterError(str(error)) from error


def named_curve(name: str, *, stretch: float = 1.0) -> BatchCurve:
    """A measured curve by its name.

    Args:
        stretch: steps and prompts take this many times as long, at the same power.

    Raises:
        ParameterError: there is no such curve, or the factor is not greater than 0.
    """
    if name not in MEASURED:
        raise ParameterError(f"there is no curve {name!r}; use one of: {', '.join(MEASURED)}")
    if not (math.isfinite(stretch) and stretch > 0):
        raise ParameterError(f"'stretch' must be greater than 0, got {stretch}")
    return MEASURED[name].stretched(stretch)


def read_directives(text: str) -> tuple[Directive, ...]:
    """Read a list of directives as JSON: `[{"level": "L1", "text": "Always answer briefly."}]`.

    Raises:
        ParameterError: it does not have this form.
    """
    try:
        listed = json.loads(text)
        return tuple(Directive(str(one["level"]), str(one.get("text") or "")) for one in listed)
    except (json.JSONDecodeError, TypeError, KeyError, AttributeError) as error:
        raise ParameterError(
            f"'directives' must be a JSON list of objects with 'level' and 'text' ({type(error).__name__}: {error})"
        ) from error


def _batch_rules(batch: Mapping[str, Any], curve: Mapping[str, Any]) -> BatchRules:
    if not curve:
        return RecordedRules(**batch)
    missing = [one.name for one in fields(BatchCurve) if one.default is MISSING and one.name not in curve]
    if missing:
        raise ParameterError(f"'curve.{missing[0]}' is missing: a curve needs every parameter without a default")
    without_effect = sorted(batch.keys() - {"slots"})
    if without_effect:
        raise ParameterError(f"'batch.{without_effect[0]}' has no effect with a curve; remove it")
    return CurveRules(curve=BatchCurve(**curve), **batch)


def _read(name: str, text: str) -> object:
    match name:
        case "workload":
            return Path(text)
        case "directives":
            return read_directives(text)
        case "idle_power_w" | "tick_ms":
            return _number(name, text)
        case "decoupled":
            if text not in ("true", "false"):
                raise ParameterError(f"'decoupled' must be true or false, got {text!r}")
            return text == "true"
        case _:
            return text


def _number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ParameterError(f"'{name}' must be a number, got {text!r}") from None
