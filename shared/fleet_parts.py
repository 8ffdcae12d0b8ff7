"""What the parts of the fleet file are made of: strict fields, paths, and how a connection is secured.

Encrypted connections to the servers of the fleet, from the files that the fleet file names.
"""

import ssl
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


def tls_context(security: TlsFields, *, endpoint: str) -> ssl.SSLContext:
    """What a client of an endpoint trusts, and shows of itself.

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
            # A function, because without a password OpenSSL would ask for one on the terminal.
            context.load_cert_chain(certificate, key, password=lambda: "")
        except OSError as error:
            raise FleetError(
                f"{where}: tls_cert_file {certificate} with tls_key_file {key} cannot be used: {error}; they must be "
                "PEM and belong together, and the key must not be encrypted"
            ) from error
    return context
