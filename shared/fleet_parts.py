"""What the parts of the fleet file are made of: strict fields, paths, and how a connection is secured."""

from pathlib import Path
from typing import Annotated, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, model_validator

from shared.messages.base import Identifier


class FleetError(ValueError):
    """The fleet file is missing, not TOML, or inconsistent; the message names the place and the remedy."""


def _beside_the_fleet_file(path: Path, info: ValidationInfo) -> Path:
    folder = (info.context or {}).get("folder")
    return path if folder is None else Path(folder) / path


FleetPath = Annotated[Path, AfterValidator(_beside_the_fleet_file)]
"""A file or folder; a relative path starts at the fleet file's folder. Only who uses it asks whether it exists."""


def _template_beside_the_fleet_file(name: str, info: ValidationInfo) -> str:
    folder = (info.context or {}).get("folder")
    if folder is None or not ("/" in name or name.endswith((".jinja", ".json"))):
        return name
    beside = Path(folder) / name
    return str(beside) if beside.exists() else name


FleetTemplate = Annotated[Identifier, AfterValidator(_template_beside_the_fleet_file)]
"""A chat template: the name of a built-in one, or the path of a file or folder; with a `/` or an ending it is a path,
looked for in the fleet file's folder and then in the working directory."""


class FleetPart(BaseModel):
    """A table of the fleet file: immutable, and a field that is not known is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class TlsFields(FleetPart):
    """How connections to a model server are secured; on an endpoint, or on a pool for all its endpoints.

    gRPC is encrypted by `tls`, metrics where their address is https; the other fields are for both.
    """

    tls: bool | None = Field(default=None, description="Encrypt gRPC; default: the pool's, else plain text")
    tls_ca_file: FleetPath | None = Field(
        default=None,
        description="PEM of the authorities to trust; default: what gRPC brings along, and for metrics the system's",
    )
    tls_cert_file: FleetPath | None = Field(default=None, description="PEM of our certificate, for mutual TLS")
    tls_key_file: FleetPath | None = Field(default=None, description="PEM of its key, not encrypted")
    tls_server_name: str | None = Field(
        default=None, min_length=1, description="The name that the server's certificate has, where it is not the host's"
    )

    def tls_files_named(self) -> list[str]:
        """The fields about TLS that are set, other than the switch."""
        names = ("tls_ca_file", "tls_cert_file", "tls_key_file", "tls_server_name")
        return [name for name in names if getattr(self, name) is not None]

    def over(self, other: "TlsFields") -> "TlsFields":
        """These fields, with another's where they are not set."""
        chosen = {
            name: getattr(other if getattr(self, name) is None else self, name) for name in TlsFields.model_fields
        }
        return TlsFields.model_construct(**chosen)

    @model_validator(mode="after")
    def _certificate_with_key(self) -> Self:
        if (self.tls_cert_file is None) != (self.tls_key_file is None):
            missing = "tls_key_file" if self.tls_key_file is None else "tls_cert_file"
            raise ValueError(f"a client's certificate and its key go together: add '{missing}'")
        return self
