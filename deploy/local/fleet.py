"""The fleet of a local stack: one pool with the model's servers, one for a smaller variant, one for the judge."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from deploy.local.config import ModelName, StackConfig
from shared.fleet import load_fleet

DIRECTIVES: dict[ModelName, tuple[tuple[str, str], ...]] = {
    "llama-2-13b-chat": (
        ("L0", ""),
        ("L3", "Think step by step in as few words as you can, then give the answer."),
        ("L1", "Always answer briefly."),
        ("L2", "Always answer very briefly."),
    ),
    # With "very briefly" this model answers no more briefly than with "briefly".
    "smollm2": (
        ("L0", ""),
        ("L1", "Always answer briefly."),
        ("L2", "Answer in one short sentence, with no explanation."),
    ),
}
"""Level and text of the directives, which the model obeys; from the longest answers to the shortest."""

CHAT_TEMPLATES: dict[ModelName, str] = {"llama-2-13b-chat": "llama-2", "smollm2": "chatml"}
POOLS: dict[ModelName, str] = {"llama-2-13b-chat": "local-13b", "smollm2": "local-smollm2"}
SMALL_MODEL = "llama-2-7b-chat"
SMALL_POOL = "local-7b"
JUDGE_POOL = "judge"


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalServer:
    """Where a model is served.

    Attributes:
        grpc: host:port of Triton.
        metrics: URL of Triton's Prometheus metrics.
        gpu: GPU uuid of the model's energy counter.
    """

    grpc: str
    metrics: str
    gpu: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalFleet:
    """The contents of a local stack's fleet file.

    Attributes:
        config: model, zone, and the settings of the model's pool.
        servers: of the model, in packing order.
        small_server: of the smaller variant; None: there is none.
        judge: a server has both the judge and the model; their energy counters differ.
        idle_power_w, judge_idle_power_w: power of an idle model, W; None: the ledger estimates it.
        directives: level and text.
    """

    config: StackConfig
    servers: tuple[LocalServer, ...]
    judge: LocalServer
    idle_power_w: float | None
    judge_idle_power_w: float | None
    small_server: LocalServer | None = None
    directives: tuple[tuple[str, str], ...] | None = None

    def write(self, path: Path) -> None:
        """Write the file, and validate it by reading it as the services do.

        Raises:
            FleetError: a value is invalid, for example a zone name that is too long.
        """
        path.write_text(self.to_toml(), encoding="utf-8")
        load_fleet(path)

    def to_toml(self) -> str:
        """The file's text."""
        config = self.config
        lines = ["# Written by the local stack at every start.", "", "[switchback]"]
        lines += [f"{name} = {_value(value)}" for name, value in config.switchback.model_dump().items()]
        for level, text in self.directives or DIRECTIVES[config.model]:
            lines += ["", "[[directives]]", f"level = {_value(level)}"]
            if text:
                lines.append(f"text = {_value(text)}")
        lines += ["", "[[models]]", f"name = {_value(config.model)}"]
        lines += [f"chat_template = {_value(CHAT_TEMPLATES[config.model])}"]
        model = {"model": config.model, "triton_model": "ensemble", "idle_power_w": self.idle_power_w}
        limit = config.max_in_flight
        lines += self._pool(POOLS[config.model], {**model, **config.pool_settings()}, self.servers, limit=limit)
        if self.small_server is not None:
            small = {**model, "variant": SMALL_MODEL, **config.pool_settings(), "min_awake": 1}
            lines += self._pool(SMALL_POOL, small, [self.small_server], limit=limit)
        judge = {"triton_model": "judge", "idle_power_w": self.judge_idle_power_w}
        lines += self._pool(JUDGE_POOL, judge, [self.judge])
        lines += ["", "[judge]", f"pool = {_value(JUDGE_POOL)}"]
        return "\n".join(lines) + "\n"

    def _pool(
        self,
        name: str,
        settings: Mapping[str, str | float | None],
        servers: Sequence[LocalServer],
        *,
        limit: int | None = None,
    ) -> list[str]:
        lines = ["", "[[pools]]", f"name = {_value(name)}", f"zone = {_value(self.config.zone)}"]
        lines += [f"{setting} = {_value(value)}" for setting, value in settings.items() if value is not None]
        for number, server in enumerate(servers):
            lines += ["[[pools.endpoints]]", f"name = {_value(f'{name}-{number}')}", f"grpc = {_value(server.grpc)}"]
            lines += [f"metrics = {_value(server.metrics)}", f"gpus = [{_value(server.gpu)}]"]
            lines += [f"max_in_flight = {limit}"] if limit is not None else []
        return lines


def _value(value: str | float) -> str:
    """A value in TOML; JSON's strings, numbers, and true and false are TOML too."""
    return json.dumps(value, ensure_ascii=False)
