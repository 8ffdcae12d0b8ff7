"""The parameters of the SmolLM2 model: written to its Triton configuration, and read when Triton loads it."""

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Literal, get_args

from deploy.triton.repository import ParameterError

EnergySource = Literal["rapl", "modelled"]
ENERGY_SOURCES: tuple[EnergySource, ...] = get_args(EnergySource)


@dataclass(frozen=True, slots=True, kw_only=True)
class SmolLm2Parameters:
    """The model and its energy counter.

    Attributes:
        gpu_uuid: label of its energy counters; it should name the energy source.
        energy_source: `rapl` reads the processor's counters, which cover the whole package: everything that runs on it,
            and its idle power. `modelled` multiplies this process's CPU time by `core_power_w`.
        core_power_w: for `modelled`: power of one busy core, W.
        slots: requests that are decoded together; further ones wait.
        context_tokens: most tokens of a request, prompt and answer together.
        threads: of llama.cpp; 0 means all cores but one. Its threads wait for each other at every step, so a thread
            that other processes keep from running holds up all of them.
        temperature, top_p: for requests that do not set them.
    """

    gpu_uuid: str
    energy_source: EnergySource = "modelled"
    core_power_w: float = 6.0
    slots: int = 8
    context_tokens: int = 2048
    threads: int = 0
    temperature: float = 0.2
    top_p: float = 0.9

    def __post_init__(self) -> None:
        if not self.gpu_uuid:
            raise ParameterError("'gpu_uuid' is missing: name the label of its energy counters")
        if self.energy_source not in ENERGY_SOURCES:
            raise ParameterError(f"'energy_source' must be one of {', '.join(ENERGY_SOURCES)}")
        for name, least in (("core_power_w", 0.0), ("temperature", 0.0), ("top_p", 0.0), ("threads", 0)):
            if not getattr(self, name) >= least:
                raise ParameterError(f"'{name}' must be at least {least}, got {getattr(self, name)}")
        for name, least in (("slots", 1), ("context_tokens", 64)):
            if not getattr(self, name) >= least:
                raise ParameterError(f"'{name}' must be at least {least}, got {getattr(self, name)}")

    @property
    def thread_count(self) -> int:
        """Number of threads for llama.cpp."""
        return self.threads or max(1, (os.cpu_count() or 1) - 1)

    def to_texts(self) -> dict[str, str]:
        """As string parameters of a model configuration."""
        return {name: str(value) for name, value in asdict(self).items()}

    @classmethod
    def from_texts(cls, texts: Mapping[str, str]) -> "SmolLm2Parameters":
        """Read the string parameters of a model configuration.

        Raises:
            ParameterError: one is missing, unknown, or invalid.
        """
        types = {one.name: one.type for one in fields(cls)}
        values: dict[str, str | int | float] = {}
        for name, text in texts.items():
            kind = types.get(name)
            if kind is None:
                raise ParameterError(f"{name!r} is not a parameter of this model; remove it")
            try:
                values[name] = int(text) if kind is int else float(text) if kind is float else text
            except ValueError:
                raise ParameterError(f"'{name}' must be a number, got {text!r}") from None
        if "gpu_uuid" not in values:
            raise ParameterError("'gpu_uuid' is missing: add it to the model's parameters")
        return cls(**values)  # type: ignore[arg-type]
