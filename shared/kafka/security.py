"""How every Kafka client proves who it is, and knows whom it talks to: one set of settings for all of them."""

import ssl
from pathlib import Path
from typing import Any, Literal, Self

from faststream.security import BaseSecurity, SASLPlaintext, SASLScram256, SASLScram512
from pydantic import Field, PrivateAttr, SecretStr, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from shared.runtime.secrets import read_secret

SecurityProtocol = Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"]
SaslMechanism = Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"]

_FASTSTREAM = {"PLAIN": SASLPlaintext, "SCRAM-SHA-256": SASLScram256, "SCRAM-SHA-512": SASLScram512}


class KafkaSecuritySettings(BaseSettings):
    """The listener's protocol, credentials, certificates. Everything that is said must be used, or it is an error."""

    model_config = SettingsConfigDict(env_prefix="SPROUT_KAFKA_", extra="ignore", hide_input_in_errors=True)

    security_protocol: SecurityProtocol = Field(default="PLAINTEXT", description="Of the broker's listener")
    sasl_mechanism: SaslMechanism | None = Field(default=None, description="With SASL_*; the broker's choice")
    sasl_username: str | None = Field(default=None, min_length=1)
    sasl_password: SecretStr | None = None
    sasl_password_file: Path | None = Field(default=None, description="Instead of the password, as secrets are mounted")
    ssl_ca_file: Path | None = Field(
        default=None, description="PEM; whom to trust as the broker's issuer; default: the system's authorities"
    )
    ssl_certificate_file: Path | None = Field(default=None, description="PEM; shown where the broker asks for one")
    ssl_key_file: Path | None = Field(default=None, description="PEM; default: it is in the certificate's file")
    ssl_key_password: SecretStr | None = Field(default=None, description="Of an encrypted key")
    ssl_key_password_file: Path | None = Field(default=None, description="Instead of the key's password")
    ssl_check_hostname: bool = Field(
        default=True, description="Whether the broker's certificate must be for the address that is connected to"
    )

    _ssl_context: ssl.SSLContext | None = PrivateAttr(default=None)

    @property
    def uses_sasl(self) -> bool:
        """Whether clients log in."""
        return self.security_protocol.startswith("SASL_")

    @property
    def uses_tls(self) -> bool:
        """Whether connections are encrypted."""
        return self.security_protocol.endswith("SSL")

    def security_options(self) -> dict[str, Any]:
        """What an aiokafka client is given; holds the password."""
        options: dict[str, Any] = {"security_protocol": self.security_protocol, "ssl_context": self._ssl_context}
        if self.uses_sasl:
            options |= {
                "sasl_mechanism": self.sasl_mechanism,
                "sasl_plain_username": self.sasl_username,
                "sasl_plain_password": self._password(),
            }
        return options

    def broker_security(self) -> BaseSecurity | None:
        """What a FastStream broker is given; null for plaintext."""
        if self.sasl_mechanism is not None:
            return _FASTSTREAM[self.sasl_mechanism](
                self.sasl_username or "", self._password(), ssl_context=self._ssl_context, use_ssl=self.uses_tls
            )
        return BaseSecurity(ssl_context=self._ssl_context) if self.uses_tls else None

    def _password(self) -> str:
        return "" if self.sasl_password is None else self.sasl_password.get_secret_value()

    @model_validator(mode="after")
    def _usable(self) -> Self:
        self._check_sasl()
        self._check_tls()
        if self.sasl_password_file is not None:
            self.sasl_password = SecretStr(read_secret(self.sasl_password_file, "SPROUT_KAFKA_SASL_PASSWORD_FILE"))
        if self.ssl_key_password_file is not None:
            secret = read_secret(self.ssl_key_password_file, "SPROUT_KAFKA_SSL_KEY_PASSWORD_FILE")
            self.ssl_key_password = SecretStr(secret)
        self._ssl_context = self._tls() if self.uses_tls else None
        return self

    def _check_sasl(self) -> None:
        named = self._set("sasl_mechanism", "sasl_username", "sasl_password", "sasl_password_file")
        if not self.uses_sasl:
            if named:
                raise ValueError(
                    f"{', '.join(named)} would not be used: SPROUT_KAFKA_SECURITY_PROTOCOL is "
                    f"{self.security_protocol}; set it to SASL_SSL or SASL_PLAINTEXT, or leave these out"
                )
            return
        if self.sasl_password is not None and self.sasl_password_file is not None:
            raise ValueError("give either SPROUT_KAFKA_SASL_PASSWORD or SPROUT_KAFKA_SASL_PASSWORD_FILE")
        missing = [
            name
            for name, given in (
                ("SPROUT_KAFKA_SASL_MECHANISM (PLAIN, SCRAM-SHA-256 or SCRAM-SHA-512)", self.sasl_mechanism),
                ("SPROUT_KAFKA_SASL_USERNAME", self.sasl_username),
                ("SPROUT_KAFKA_SASL_PASSWORD or SPROUT_KAFKA_SASL_PASSWORD_FILE", self._set("sasl_password")
                 or self._set("sasl_password_file")),
            )
            if not given
        ]  # fmt: skip
        if missing:
            raise ValueError(f"SPROUT_KAFKA_SECURITY_PROTOCOL {self.security_protocol} needs {' and '.join(missing)}")

    def _check_tls(self) -> None:
        named = self._set(
            "ssl_ca_file", "ssl_certificate_file", "ssl_key_file", "ssl_key_password", "ssl_key_password_file"
        )
        if not self.ssl_check_hostname:
            named.append("SPROUT_KAFKA_SSL_CHECK_HOSTNAME")
        if named and not self.uses_tls:
            raise ValueError(
                f"{', '.join(named)} would not be used: SPROUT_KAFKA_SECURITY_PROTOCOL is {self.security_protocol}; "
                "set it to SSL or SASL_SSL, or leave these out"
            )
        if self.ssl_certificate_file is None and self._set("ssl_key_file", "ssl_key_password", "ssl_key_password_file"):
            raise ValueError("a client's key needs its certificate: SPROUT_KAFKA_SSL_CERTIFICATE_FILE")
        if self.ssl_key_password is not None and self.ssl_key_password_file is not None:
            raise ValueError("give either SPROUT_KAFKA_SSL_KEY_PASSWORD or SPROUT_KAFKA_SSL_KEY_PASSWORD_FILE")

    def _set(self, *fields: str) -> list[str]:
        """The variables of those fields that have a value."""
        return [f"SPROUT_KAFKA_{field.upper()}" for field in fields if getattr(self, field) is not None]

    def _tls(self) -> ssl.SSLContext:
        try:
            context = ssl.create_default_context(cafile=self.ssl_ca_file)
        except OSError as error:
            raise ValueError(f"SPROUT_KAFKA_SSL_CA_FILE {self.ssl_ca_file} cannot be used: {error}") from error
        context.check_hostname = self.ssl_check_hostname
        if self.ssl_certificate_file is None:
            return context
        password = "" if self.ssl_key_password is None else self.ssl_key_password.get_secret_value()
        try:
            # A function, because without a password OpenSSL would ask for one on the terminal.
            context.load_cert_chain(self.ssl_certificate_file, self.ssl_key_file, password=lambda: password)
        except OSError as error:
            raise ValueError(
                f"SPROUT_KAFKA_SSL_CERTIFICATE_FILE {self.ssl_certificate_file} with its key cannot be used: {error}. "
                "They must be PEM and belong together; an encrypted key needs SPROUT_KAFKA_SSL_KEY_PASSWORD"
            ) from error
        return context
