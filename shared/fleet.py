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

import tomllib
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    HttpUrl,
    ValidationError,
    ValidationInfo,
    model_validator,
)

from shared.batch_curve import BatchCurve
from shared.messages import Identifier, Level, Zone, option_key
from shared.tenants import OPTIMIZE, Tenant

Dispatch = Literal["pack", "spread"]

DEFAULT_EMBODIED_G_PER_S = 26_356.568 / (5 * 365 * 86_400)
"""k1 of a server with one A100: 26.36 kgCO2eq over five years (paper, section 4)."""


class FleetError(ValueError):
    """The fleet file is missing, not TOML, or inconsistent; the message says where, and what to do."""


def _resolve_path(path: Path, info: ValidationInfo) -> Path:
    folder = (info.context or {}).get("folder")
    return path if folder is None else Path(folder) / path


FleetPath = Annotated[Path, AfterValidator(_resolve_path)]
"""A file or folder, relative to the folder of the fleet file. It need not exist."""


def _resolve_template(name: str, info: ValidationInfo) -> str:
    folder = (info.context or {}).get("folder")
    if folder is None or not ("/" in name or name.endswith((".jinja", ".json"))):
        return name
    beside = Path(folder) / name
    return str(beside) if beside.exists() else name


FleetTemplate = Annotated[Identifier, AfterValidator(_resolve_template)]
"""A chat template: a built-in name or a path. It is a path if it contains `/` or ends in `.jinja` or `.json`; a
relative one is looked for in the folder of the fleet file, then in the working directory."""


def _of_a_model(name: str) -> str:
    if name == "server":
        raise ValueError("'server' is a chat template of pools of kind openai: name it there")
    return name


class FleetPart(BaseModel):
    """A table of the fleet file: immutable; an unknown field is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class TlsFields(FleetPart):
    """TLS of the connections to a model server; given for an endpoint, or for all endpoints of a pool.

    `tls` encrypts gRPC; metrics are encrypted if their address is https. The other fields apply to both.
    """

    tls: bool | None = Field(default=None, description="Encrypt gRPC; default: as the pool, else plain text")
    tls_ca_file: FleetPath | None = Field(
        default=None,
        description="PEM of trusted authorities; default: those of gRPC, and for metrics those of the system",
    )
    tls_cert_file: FleetPath | None = Field(default=None, description="PEM of the client's certificate, for mutual TLS")
    tls_key_file: FleetPath | None = Field(default=None, description="PEM of the client's key, not encrypted")
    tls_server_name: str | None = Field(
        default=None, min_length=1, description="Name in the server's certificate, if it is not the host's"
    )

    def tls_files_named(self) -> list[str]:
        """Names of the TLS fields that are set, without `tls`."""
        names = ("tls_ca_file", "tls_cert_file", "tls_key_file", "tls_server_name")
        return [name for name in names if getattr(self, name) is not None]

    def over(self, other: "TlsFields") -> "TlsFields":
        """These fields; those that are not set come from `other`."""
        chosen = {
            name: getattr(other if getattr(self, name) is None else self, name) for name in TlsFields.model_fields
        }
        return TlsFields.model_construct(**chosen)

    @model_validator(mode="after")
    def _certificate_with_key(self) -> Self:
        if (self.tls_cert_file is None) != (self.tls_key_file is None):
            missing = "tls_key_file" if self.tls_key_file is None else "tls_cert_file"
            raise ValueError(f"a client's certificate needs its key, and the key its certificate: add '{missing}'")
        return self


class Directive(FleetPart):
    """A level and its text. The catalogue starts with no directive (L0) and ends with the shortest answers."""

    level: Level
    text: str = ""


class Endpoint(TlsFields):
    """One inference server."""

    name: Identifier
    grpc: str = Field(
        default="", pattern=r"^([^/\s]+:[0-9]+)?$", description="Kind triton: host:port of Triton's gRPC service"
    )
    url: HttpUrl | None = Field(default=None, description="Kind openai: base URL of the server, without /v1")
    metrics: HttpUrl | None = Field(
        default=None,
        description="Prometheus metrics with the energy of its GPUs, of Triton or DCGM's exporter; absent: energy is "
        "not metered",
    )
    gpus: tuple[str, ...] = Field(default=(), description="UUIDs of this endpoint's GPUs; empty: all that it reports")
    max_in_flight: int | None = Field(
        default=None, ge=1, description="Concurrent requests of one router; others wait in Kafka; absent: unlimited"
    )


class Pool(TlsFields):
    """Interchangeable endpoints that serve one model variant in one zone."""

    name: Identifier
    model: Identifier | None = Field(default=None, description="Logical model served; absent for the judge's pool")
    variant: Identifier | None = Field(default=None, description="Weights served; default: the model's name")
    kind: Literal["triton", "openai"] = Field(
        default="triton", description="Inference server: Triton, or one with an OpenAI-compatible API"
    )
    triton_model: Identifier = Field(default="ensemble", description="Model name in Triton's repository")
    upstream_model: Identifier | None = Field(
        default=None, description="Kind openai: the model's name on the server; default: the weights served"
    )
    api_key_file: FleetPath | None = Field(default=None, description="Kind openai: file with the server's API key")
    sampling_extensions: tuple[Literal["top_k", "min_tokens", "repetition_penalty"], ...] = Field(
        default=(), description="Kind openai: sampling parameters beyond OpenAI's that the server honours"
    )
    zone: Zone
    chat_template: FleetTemplate | None = Field(default=None, description="Default: the model's")
    tokenizer: FleetPath | None = Field(default=None, description="Default: the model's")
    endpoints: tuple[Endpoint, ...] = Field(min_length=1)
    pue: float = Field(default=1.0, ge=1.0, description="Power usage effectiveness of the site")
    embodied_g_per_s: float = Field(default=DEFAULT_EMBODIED_G_PER_S, ge=0, description="k1")
    idle_power_w: float | None = Field(
        default=None, ge=0, description="Per endpoint, all its GPUs; absent: learned from intervals without calls"
    )
    concurrency: int | None = Field(
        default=None, ge=1, description="Concurrent requests, all endpoints; absent: unlimited"
    )
    dispatch: Dispatch = Field(
        default="spread",
        description="pack: fill one endpoint up to its target before the next is used; spread: use the least busy",
    )
    target_batch: int | None = Field(
        default=None, ge=1, description="Requests at once on an endpoint, of all routers; absent: from the objectives"
    )
    tpot_objective_ms: float | None = Field(
        default=None, gt=0, description="Most time per output token; the target batch follows from the learned curve"
    )
    ttft_objective_ms: float | None = Field(default=None, gt=0, description="Most time until the first token")
    scaling: Literal["elastic", "fixed"] | None = Field(
        default=None,
        description="elastic: servers follow the load, so a token costs its share of a full batch; fixed: all of them "
        "always run, so it costs what one more token adds. Default: elastic where dispatch is pack",
    )
    sleep: bool = Field(default=False, description="Endpoints that are not needed may be put to sleep")
    min_awake: int = Field(default=1, ge=1, description="Endpoints that never sleep")

    @property
    def capacity_follows_load(self) -> bool:
        """Whether fewer tokens mean fewer servers."""
        return (self.scaling or ("elastic" if self.dispatch == "pack" else "fixed")) == "elastic"

    def target_for(self, curve: BatchCurve | None, *, prompt_tokens: float = 0.0) -> int | None:
        """Requests at once that an endpoint is to have: the fixed number, or the most that the objectives allow.

        Args:
            curve: of the endpoint; None while it is unknown.
            prompt_tokens: usual length of a prompt.

        Returns:
            At least 1, also where no batch keeps the objectives; None while it is unknown.
        """
        if self.target_batch is not None:
            return self.target_batch
        tpot_s, ttft_s = _seconds(self.tpot_objective_ms), _seconds(self.ttft_objective_ms)
        if curve is None or (tpot_s is None and ttft_s is None):
            return None
        limits = [endpoint.max_in_flight for endpoint in self.endpoints if endpoint.max_in_flight is not None]
        return max(1, min([curve.largest_batch(tpot_s=tpot_s, ttft_s=ttft_s, prompt_tokens=prompt_tokens), *limits]))

    @property
    def served_model(self) -> str:
        """The model's name on servers of kind openai."""
        return self.upstream_model or self.weights or self.name

    @model_validator(mode="after")
    def _endpoints_of_kind(self) -> Self:
        for endpoint in self.endpoints:
            if self.kind == "triton" and (not endpoint.grpc or endpoint.url is not None):
                raise ValueError(
                    f"endpoint {endpoint.name!r} needs 'grpc' (host:port of Triton's gRPC service) and no 'url'; for a "
                    'server with an OpenAI-compatible API set kind = "openai" in its pool'
                )
            if self.kind == "openai" and (endpoint.url is None or endpoint.grpc):
                raise ValueError(
                    f"endpoint {endpoint.name!r} of a pool of kind openai needs 'url' (base URL, without /v1) and no "
                    "'grpc'"
                )
        if self.kind == "triton" and self.chat_template == "server":
            raise ValueError(f"pool {self.name!r}: Triton applies no chat template: name that of the model")
        if self.kind == "openai" and self.sleep:
            raise ValueError(f"pool {self.name!r}: only Triton servers can be put to sleep")
        return self

    @model_validator(mode="after")
    def _tls_is_used(self) -> Self:
        for endpoint in self.endpoints:
            security = endpoint.over(self)
            addresses = [one for one in (endpoint.url, endpoint.metrics) if one is not None]
            encrypted = security.tls or any(one.scheme == "https" for one in addresses)
            if not encrypted and (unused := security.tls_files_named()):
                raise ValueError(
                    f"endpoint {endpoint.name!r}: {', '.join(unused)} would not be used: set tls = true, give "
                    "'metrics' an https address, or leave them out"
                )
        return self

    @model_validator(mode="after")
    def _consistent_dispatch(self) -> Self:
        objectives = (self.target_batch, self.tpot_objective_ms, self.ttft_objective_ms)
        if self.dispatch == "pack" and objectives == (None, None, None):
            raise ValueError(
                f"pool {self.name!r} has dispatch = 'pack' but no target: add 'target_batch' (requests at once on an "
                "endpoint) or 'tpot_objective_ms' (most milliseconds per output token)"
            )
        limits = [endpoint.max_in_flight for endpoint in self.endpoints if endpoint.max_in_flight is not None]
        if self.target_batch is not None and limits and self.target_batch > min(limits):
            raise ValueError(
                f"pool {self.name!r} has target_batch = {self.target_batch}, more than max_in_flight = {min(limits)} "
                "of an endpoint: lower the one or raise the other"
            )
        if self.min_awake > len(self.endpoints):
            raise ValueError(f"pool {self.name!r} has min_awake = {self.min_awake} but {len(self.endpoints)} endpoints")
        return self

    @property
    def weights(self) -> str | None:
        """The weights served; pools of a model with equal weights give the same answers."""
        return self.variant or self.model


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


def _seconds(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1_000.0


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
