"""Pools of the fleet file: interchangeable endpoints, their TLS, and how requests are dispatched to them."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, HttpUrl, ValidationInfo, model_validator

from shared.batch_curve import BatchCurve
from shared.messages import Identifier, Zone

Dispatch = Literal["pack", "spread"]

DEFAULT_EMBODIED_G_PER_S = 26_356.568 / (5 * 365 * 86_400)
"""k1 of a server with one A100: 26.36 kgCO2eq over five years (paper, section 4)."""


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


class Endpoint(TlsFields):
    """One inference server."""

    name: Identifier
    grpc: str = Field(
        default="", pattern=r"^([^/\s]+:[0-9]+)?$", description="Kind triton: host:port of Triton's gRPC service"
    )
    url: HttpUrl | None = Field(default=None, description="Kind openai: base URL of the server, without /v1")
    metrics: HttpUrl | None = Field(
        default=None,
        description="Metrics with the energy of its GPUs, of Triton, DCGM's exporter or trtllm-serve; absent: energy "
        "is not metered",
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


def _seconds(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1_000.0
