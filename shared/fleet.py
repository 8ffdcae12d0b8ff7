"""The fleet file: directives, models, pools and their endpoints, in one TOML document.

```toml
[[directives]]
level = "L0"                      # always "no system message at all"
[[directives]]
level = "L1"
text = "Always answer briefly."

[[models]]
name = "llama-2-13b-chat"         # what producers ask for
chat_template = "llama-2"

[[pools]]
name = "california-13b"           # the first pool of a model is its reference
model = "llama-2-13b-chat"
zone = "US-CAL-CISO"
embodied_g_per_s = 1.6715e-4
[[pools.endpoints]]
name = "california-13b-0"
grpc = "triton-0:8001"
metrics = "http://triton-0:8002/metrics"

[judge]                           # optional: the evaluator's judge
pool = "judge"                    # a pool that no model names

[[tenants]]                       # optional: defaults of a tenant's requests, see shared/tenants.py
name = "support-desk"
directive = "L1"
```
"""

import tomllib
from functools import cached_property
from pathlib import Path
from typing import Self

from pydantic import Field, HttpUrl, ValidationError, model_validator

from shared.fleet_parts import FleetError, FleetPart, FleetPath, FleetTemplate, TlsFields
from shared.messages.base import Identifier, Level, Zone, option_key
from shared.tenants import OPTIMIZE, Tenant

__all__ = ["Directive", "Endpoint", "Fleet", "FleetError", "Judge", "Model", "Pool", "load_fleet"]

DEFAULT_EMBODIED_G_PER_S = 26_356.568 / (5 * 365 * 86_400)
"""k1 of one A100 server: 26.36 kgCO2eq over five years (paper, section 4)."""


class Directive(FleetPart):
    """A level and its text; the catalogue is ordered from no directive to the most brief."""

    level: Level
    text: str = ""


class Endpoint(TlsFields):
    """One Triton server."""

    name: Identifier
    grpc: str = Field(pattern=r"^[^/\s]+:[0-9]+$", description="host:port of Triton's gRPC service")
    metrics: HttpUrl | None = Field(default=None, description="Triton's Prometheus metrics; null: energy unmetered")
    gpus: tuple[str, ...] = Field(default=(), description="uuids of this endpoint's GPUs; empty: all that it reports")
    max_in_flight: int | None = Field(
        default=None, ge=1, description="Requests of one router at once; the others wait in Kafka; null: unbounded"
    )


class Pool(TlsFields):
    """Interchangeable endpoints that serve one model variant in one zone."""

    name: Identifier
    model: Identifier | None = Field(default=None, description="Logical model served; null for the judge's pool")
    variant: Identifier | None = Field(default=None, description="Weights served; default: the model's name")
    triton_model: Identifier = Field(default="ensemble", description="Model name in Triton's repository")
    zone: Zone
    chat_template: FleetTemplate | None = Field(default=None, description="Default: the model's")
    tokenizer: FleetPath | None = Field(default=None, description="Default: the model's")
    endpoints: tuple[Endpoint, ...] = Field(min_length=1)
    pue: float = Field(default=1.0, ge=1.0, description="Power usage effectiveness of the site")
    embodied_g_per_s: float = Field(default=DEFAULT_EMBODIED_G_PER_S, ge=0, description="k1")
    idle_power_w: float | None = Field(
        default=None, ge=0, description="Per endpoint, all its GPUs; null: learned from quiet intervals"
    )
    concurrency: int | None = Field(default=None, ge=1, description="Requests at once, all endpoints; null: unbounded")

    @property
    def weights(self) -> str | None:
        """What answers here: pools of a model that agree in it give the same answers."""
        return self.variant or self.model


class Model(FleetPart):
    """A logical model that producers ask for."""

    name: Identifier
    chat_template: FleetTemplate = Field(
        description="Built-in name, or path of a Jinja file, of a tokenizer_config.json, or of a model's folder"
    )
    tokenizer: FleetPath | None = Field(
        default=None,
        description="tokenizer.json, or a folder with one: counts tokens where the model server does not",
    )


class Judge(FleetPart):
    """The judge model's pool."""

    pool: Identifier


class Fleet(FleetPart):
    """All that can serve, as configured."""

    directives: tuple[Directive, ...] = Field(min_length=1)
    models: tuple[Model, ...] = Field(min_length=1)
    pools: tuple[Pool, ...] = Field(min_length=1)
    judge: Judge | None = None
    tenants: tuple[Tenant, ...] = ()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        _unique("directives.level", [directive.level for directive in self.directives])
        _unique("models.name", [model.name for model in self.models])
        _unique("pools.name", [pool.name for pool in self.pools])
        _unique("pools.endpoints.name", [e.name for pool in self.pools for e in pool.endpoints])
        first = self.directives[0]
        if first.level != "L0" or first.text:
            raise ValueError("the first of 'directives' must be level L0 with no text: it is the reference")
        wordless = [d.level for d in self.directives[1:] if not d.text.strip()]
        if wordless:
            raise ValueError(f"directives {', '.join(wordless)} need a 'text'; only L0 has none")
        known = {model.name for model in self.models}
        for pool in self.pools:
            if pool.model is not None and pool.model not in known:
                raise ValueError(
                    f"pool {pool.name!r} serves model {pool.model!r}, which 'models' does not list "
                    f"(listed: {', '.join(sorted(known))})"
                )
            for endpoint in pool.endpoints:
                security = endpoint.over(pool)
                encrypted = security.tls or (endpoint.metrics is not None and endpoint.metrics.scheme == "https")
                if not encrypted and (unused := security.tls_files_named()):
                    raise ValueError(
                        f"endpoint {endpoint.name!r}: {', '.join(unused)} would not be used: set tls = true, give "
                        "'metrics' an https address, or leave them out"
                    )
        for model in self.models:
            if not any(pool.model == model.name for pool in self.pools):
                raise ValueError(f"model {model.name!r} has no pool: add one to 'pools' with model = {model.name!r}")
        if self.judge is not None and self.judge.pool not in {pool.name for pool in self.pools}:
            raise ValueError(f"judge.pool names {self.judge.pool!r}, which 'pools' does not list")
        self._check_tenants(known)
        return self

    def _check_tenants(self, models: set[str]) -> None:
        _unique("tenants.name", [tenant.name for tenant in self.tenants])
        for tenant in self.tenants:
            if tenant.model is not None and tenant.model not in models:
                raise ValueError(
                    f"tenant {tenant.name!r} has model {tenant.model!r}, which 'models' does not list "
                    f"(listed: {', '.join(sorted(models))})"
                )
            if tenant.directive not in (OPTIMIZE, *self.levels):
                raise ValueError(
                    f"tenant {tenant.name!r} has directive {tenant.directive!r}, which 'directives' does not list "
                    f"(listed: {', '.join(self.levels)}; or {OPTIMIZE})"
                )

    def tenant(self, name: str | None) -> Tenant | None:
        """The defaults of a tenant; null for an unknown one."""
        return None if name is None else self._tenants_by_name.get(name)

    @cached_property
    def _tenants_by_name(self) -> dict[str, Tenant]:
        return {tenant.name: tenant for tenant in self.tenants}

    @property
    def default_model(self) -> str:
        """The model of a request that names none."""
        return self.models[0].name

    @property
    def levels(self) -> tuple[str, ...]:
        """Directive levels in order, L0 first."""
        return tuple(directive.level for directive in self.directives)

    @property
    def zones(self) -> tuple[str, ...]:
        """Every zone that a pool lies in, in order of appearance."""
        return tuple(dict.fromkeys(pool.zone for pool in self.pools))

    def directive_text(self, level: str) -> str:
        """The directive's text; empty for L0.

        Raises:
            KeyError: no such level in the catalogue.
        """
        for directive in self.directives:
            if directive.level == level:
                return directive.text
        raise KeyError(level)

    def pool(self, name: str) -> Pool:
        """A pool by name.

        Raises:
            KeyError: no such pool.
        """
        for pool in self.pools:
            if pool.name == name:
                return pool
        raise KeyError(name)

    def pools_of(self, model: str) -> tuple[Pool, ...]:
        """The pools that serve a logical model; the first is the reference's. Empty for an unknown model."""
        return tuple(pool for pool in self.pools if pool.model == model)

    def chat_template_of(self, pool: Pool) -> str:
        """Name of the chat template for a pool: its own, else its model's, else ChatML."""
        if pool.chat_template is not None:
            return pool.chat_template
        for model in self.models:
            if model.name == pool.model:
                return model.chat_template
        return "chatml"

    def tokenizer_of(self, pool: Pool) -> Path | None:
        """Where the tokenizer of a pool lies: its own, else its model's; null for none."""
        if pool.tokenizer is not None:
            return pool.tokenizer
        return next((model.tokenizer for model in self.models if model.name == pool.model), None)

    def options_of(self, model: str) -> tuple[str, ...]:
        """Every option of a model: its pools times the levels."""
        return tuple(option_key(pool.name, level) for pool in self.pools_of(model) for level in self.levels)

    def reference_of(self, model: str) -> str:
        """The reference option: L0 on the model's first pool.

        Raises:
            KeyError: unknown model.
        """
        pools = self.pools_of(model)
        if not pools:
            raise KeyError(model)
        return option_key(pools[0].name, self.levels[0])

    def same_as_reference(self, model: str) -> tuple[str, ...]:
        """The options that give the reference's own answers: its level on every pool with its weights."""
        pools = self.pools_of(model)
        return tuple(option_key(pool.name, self.levels[0]) for pool in pools if pool.weights == pools[0].weights)


def _unique(what: str, names: list[str]) -> None:
    doubled = sorted({name for name in names if names.count(name) > 1})
    if doubled:
        raise ValueError(f"{what} must be unique; given more than once: {', '.join(doubled)}")


def load_fleet(path: Path) -> Fleet:
    """Read and check a fleet file.

    Raises:
        FleetError: the file is missing, not TOML, or inconsistent.
    """
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FleetError(f"fleet file {path} does not exist; set SPROUT_FLEET_FILE to one") from None
    except tomllib.TOMLDecodeError as error:
        raise FleetError(f"fleet file {path} is not valid TOML: {error}") from error
    try:
        return Fleet.model_validate(document, context={"folder": path.parent})
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(str(part) for part in problem['loc']) or 'file'}: {problem['msg']}"
            for problem in error.errors(include_url=False, include_input=False)
        )
        raise FleetError(f"fleet file {path}: {problems}") from error
