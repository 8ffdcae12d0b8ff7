"""The fleet of a local stack: one pool for the model, one for the judge, both on the local Triton server."""

import json
from dataclasses import dataclass
from pathlib import Path

from deploy.local.config import ModelName
from shared.fleet import load_fleet

DIRECTIVES = (("L0", ""), ("L1", "Always answer briefly."), ("L2", "Always answer very briefly."))
CHAT_TEMPLATES: dict[ModelName, str] = {"llama-2-13b-chat": "llama-2", "smollm2": "chatml"}
POOLS: dict[ModelName, str] = {"llama-2-13b-chat": "local-13b", "smollm2": "local-smollm2"}
JUDGE_POOL = "judge"


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalFleet:
    """The contents of a local stack's fleet file.

    Attributes:
        grpc: host:port of Triton.
        metrics: URL of Triton's Prometheus metrics.
        gpu, judge_gpu: GPU uuids of the models' energy counters.
        idle_power_w, judge_idle_power_w: power of an idle model, W; None: the ledger estimates it.
    """

    model: ModelName
    zone: str
    grpc: str
    metrics: str
    gpu: str
    judge_gpu: str
    idle_power_w: float | None
    judge_idle_power_w: float | None

    def write(self, path: Path) -> None:
        """Write the file, and validate it by reading it as the services do.

        Raises:
            FleetError: a value is invalid, for example a zone name that is too long.
        """
        path.write_text(self.to_toml(), encoding="utf-8")
        load_fleet(path)

    def to_toml(self) -> str:
        """The file's text."""
        lines = ["# Written by the local stack at every start.", "", "[switchback]", "share = 0"]
        for level, text in DIRECTIVES:
            lines += ["", "[[directives]]", f"level = {_quoted(level)}"]
            if text:
                lines.append(f"text = {_quoted(text)}")
        lines += [
            "",
            "[[models]]",
            f"name = {_quoted(self.model)}",
            f"chat_template = {_quoted(CHAT_TEMPLATES[self.model])}",
            *self._pool(POOLS[self.model], self.model, "ensemble", self.gpu, self.idle_power_w),
            *self._pool(JUDGE_POOL, None, "judge", self.judge_gpu, self.judge_idle_power_w),
            "",
            "[judge]",
            f"pool = {_quoted(JUDGE_POOL)}",
        ]
        return "\n".join(lines) + "\n"

    def _pool(self, name: str, model: str | None, triton_model: str, gpu: str, idle_power_w: float | None) -> list[str]:
        return [
            "",
            "[[pools]]",
            f"name = {_quoted(name)}",
            *([f"model = {_quoted(model)}"] if model is not None else []),
            f"triton_model = {_quoted(triton_model)}",
            f"zone = {_quoted(self.zone)}",
            *([f"idle_power_w = {float(idle_power_w)!r}"] if idle_power_w is not None else []),
            "[[pools.endpoints]]",
            f"name = {_quoted(f'{name}-0')}",
            f"grpc = {_quoted(self.grpc)}",
            f"metrics = {_quoted(self.metrics)}",
            f"gpus = [{_quoted(gpu)}]",
        ]


def _quoted(text: str) -> str:
    """A TOML basic string; JSON's escapes are a subset of TOML's."""
    return json.dumps(text, ensure_ascii=False)
