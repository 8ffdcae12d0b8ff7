"""The fleet file: directives, models, pools and their endpoints, in one TOML document.

```toml
[[directives]]
level = "L0"                      # no directive: no system message
[[directives]]
level = "L1"
text = "Always answer briefly."

[[models]]
name = "llama-2-13b-chat"         # as requests name it in `model`
chat_template = "llama-2"

[[pools]]
name = "california-13b"           # the first pool of a model is its reference (baseline)
model = "llama-2-13b-chat"
zone = "US-CAL-CISO"
embodied_g_per_s = 1.6715e-4
[[pools.endpoints]]
name = "california-13b-0"
grpc = "triton-0:8001"
metrics = "http://triton-0:8002/metrics"

[judge]                           # optional: the evaluator's judge
pool = "judge"                    # a pool without `model`

[[tenants]]                       # optional: defaults of a tenant's requests, see shared/tenants.py
name = "support-desk"
directive = "L1"
```
"""

import ssl
import tomllib
from collections.abc import Mapping
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Annotated, Self

from pydantic import AfterValidator, Field, ValidationError, model_validator

from shared.messages import Identifier, Level, option_key
from shared.pools import Dispatch, FleetPart, FleetPath, FleetTemplate, Pool, TlsFields
from shared.tenants import OPTIMIZE, Tenant


class FleetError(ValueError):
    """The fleet file is missing, not TOML, or inconsistent; the message says where, and what to do."""


def _of_a_model(name: str) -> str:
    if name == "server":
        raise ValueError("'server' is a chat template of pools of kind openai: name it there")
    return name


class Directive(FleetPart):
    """A level and its text. The catalogue starts with no directive (L0) and ends with the shortest answers."""

    level: Level
    text: str = ""


class Switchback(FleetPart):
    """Blocks of time in which the whole fleet serves as it would without Sprout, to measure the saving on the meter."""

    share: float = Field(default=0.02, ge=0, le=0.5, description="Share of the time; 0: never, no metered saving")
    block_s: float = Field(default=1_800.0, gt=0, description="Length of a block, event seconds")
    washout_s: float = Field(
        default=300.0, ge=0, description="Time after every change that does not count, event seconds"
    )
    key: str = Field(default="", max_length=256, description="Draws the blocks; another key draws other blocks")
    dispatch: Dispatch = Field(default="spread", description="Dispatch without Sprout")
    sleep: bool = Field(default=False, description="Whether endpoints would sleep without Sprout")

    @model_validator(mode="after")
    def _blocks_outlast_washout(self) -> Self:
        if self.share > 0 and self.washout_s >= self.block_s:
            raise ValueError(
                f"switchback.washout_s ({self.washout_s:g}) must be shorter than block_s ({self.block_s:g}), or "
                "nothing is measured"
            )
        return self


class Model(FleetPart):
    """A logical model, as requests name it."""

    name: Identifier
    chat_template: Annotated[FleetTemplate, AfterValidator(_of_a_model)] = Field(
        description="Built-in name, or path of a Jinja file, of a tokenizer_config.json, or of a model's folder"
    )
    tokenizer: FleetPath | None = Field(
        default=None,
        description="tokenizer.json, or a folder with one; counts tokens where the model server does not",
    )


class Judge(FleetPart):
    """The judge model's pool."""

    pool: Identifier


class Fleet(FleetPart):
    """The fleet file: directives, models, pools, judge, tenants, switchback."""

    directives: tuple[Directive, ...] = Field(min_length=1)
    models: tuple[Model, ...] = Field(min_length=1)
    pools: tuple[Pool, ...] = Field(min_length=1)
    judge: Judge | None = None
    tenants: tuple[Tenant, ...] = ()
    switchback: Switchback = Switchback()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        _unique("directives.level", [directive.level for directive in self.directives])
        _unique("models.name", [model.name for model in self.models])
        _unique("pools.name", [pool.name for pool in self.pools])
        _unique("pools.endpoints.name", [e.name for pool in self.pools for e in pool.endpoints])
        first = self.directives[0]
        if first.level != "L0" or first.text:
            raise ValueError("the first of 'directives' must be level L0 without text: it is the reference (baseline)")
        without_text = [d.level for d in self.directives[1:] if not d.text.strip()]
        if without_text:
            raise ValueError(f"directives {', '.join(without_text)} need a 'text'; only L0 has none")
        known = {model.name for model in self.models}
        for pool in self.pools:
            if pool.model is not None and pool.model not in known:
                raise ValueError(
                    f"pool {pool.name!r} serves model {pool.model!r}, which 'models' does not list "
                    f"(listed: {', '.join(sorted(known))})"
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
        """The defaults of a tenant; `None` for an unknown one."""
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
        """The zones of all pools, in order of appearance."""
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

    @cached_property
    def directive_hashes(self) -> dict[str, str]:
        """Hash of every directive's text by level, in order: what is measured and judged names it."""
        return {one.level: blake2b(one.text.encode(), digest_size=8).hexdigest() for one in self.directives}

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
        """The pools that serve a logical model, that of the reference first; empty for an unknown model."""
        return tuple(pool for pool in self.pools if pool.model == model)

    def chat_template_of(self, pool: Pool) -> str:
        """Chat template of a pool: its own, else its model's, else ChatML."""
        if pool.chat_template is not None:
            return pool.chat_template
        for model in self.models:
            if model.name == pool.model:
                return model.chat_template
        return "chatml"

    def tokenizer_of(self, pool: Pool) -> Path | None:
        """Path of a pool's tokenizer: its own, else its model's; `None` for none."""
        if pool.tokenizer is not None:
            return pool.tokenizer
        return next((model.tokenizer for model in self.models if model.name == pool.model), None)

    def options_of(self, model: str) -> tuple[str, ...]:
        """Every option of a model: each of its pools with each level."""
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
        """The options with the same answers as the reference: L0 on every pool with the same weights."""
        pools = self.pools_of(model)
        return tuple(option_key(pool.name, self.levels[0]) for pool in pools if pool.weights == pools[0].weights)


def reworded(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Levels that have other texts now than before, by their hashes; a level that only one of the two has is none."""
    return sorted(level for level, text in before.items() if now.get(level, text) != text)


def _unique(what: str, names: list[str]) -> None:
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"{what} must be unique; given more than once: {', '.join(repeated)}")


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


def tls_context(security: TlsFields, *, endpoint: str) -> ssl.SSLContext:
    """The TLS context of a client of an endpoint.

    Raises:
        FleetError: a file cannot be used.
    """
    where = f"endpoint {endpoint!r}"
    authorities, certificate, key = security.tls_ca_file, security.tls_cert_file, security.tls_key_file
    try:
        context = ssl.create_default_context(cafile=authorities)
    except OSError as error:
        raise FleetError(
            f"{where}: tls_ca_file {authorities} cannot be used: {error}; it must be the PEM of an authority"
        ) from error
    if certificate is not None and key is not None:
        try:
            # A function: with None OpenSSL would ask for the password of an encrypted key on the terminal.
            context.load_cert_chain(certificate, key, password=lambda: "")
        except OSError as error:
            raise FleetError(
                f"{where}: tls_cert_file {certificate} with tls_key_file {key} cannot be used: {error}; they must be "
                "PEM and belong together, and the key must not be encrypted"
            ) from error
    return context
