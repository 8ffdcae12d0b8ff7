"""Configuration that several services share: one settings class per concern, each with its own environment prefix."""

import ssl
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, Self
from urllib.parse import quote, urlsplit

from pydantic import AliasChoices, Field, PrivateAttr, SecretStr, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from shared.hashing import MAX_KEY_BYTES
from shared.runtime.oauth import ClientCredentials

if TYPE_CHECKING:
    from faststream.security import BaseSecurity

    from shared.topics import TopicSpec

SecurityProtocol = Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"]
SaslMechanism = Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512", "OAUTHBEARER"]

MIN_KEY_BYTES: Final = 16
"""Shorter secrets can be guessed."""


def read_secret(file: Path, variable: str) -> str:
    """The secret that a file holds, without the newline at its end.

    Args:
        variable: environment variable that named the file, for the error message.

    Raises:
        ValueError: it cannot be read, or is empty.
    """
    try:
        secret = file.read_text(encoding="utf-8").rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{variable} cannot be read: {error}") from error
    if not secret:
        raise ValueError(f"{variable} {file} is empty")
    return secret


class DrawKeySettings(BaseSettings):
    """The key of random draws, in services that draw; all services of a deployment have the same."""

    model_config = SettingsConfigDict(hide_input_in_errors=True)

    draw_key: SecretStr | None = Field(
        default=None, description="Secret of 16 to 64 bytes: without it clients can steer random draws"
    )
    draw_key_file: Path | None = Field(default=None, description="File with the secret, instead of it")

    @property
    def draw_key_bytes(self) -> bytes:
        """The key; empty if there is none."""
        return b"" if self.draw_key is None else self.draw_key.get_secret_value().encode()

    @model_validator(mode="after")
    def _check_draw_key(self) -> Self:
        variable = f"{self.model_config.get('env_prefix', '')}DRAW_KEY"
        if self.draw_key is not None and self.draw_key_file is not None:
            raise ValueError(f"give either {variable} or {variable}_FILE")
        if self.draw_key_file is not None:
            self.draw_key = SecretStr(read_secret(self.draw_key_file, f"{variable}_FILE"))
        if self.draw_key is not None and not MIN_KEY_BYTES <= len(self.draw_key_bytes) <= MAX_KEY_BYTES:
            raise ValueError(
                f"{variable} must have {MIN_KEY_BYTES} to {MAX_KEY_BYTES} bytes, for example from: openssl rand -hex 32"
            )
        return self


class KafkaSettings(BaseSettings):
    """Kafka: address of the brokers, TLS and login, prefixes of topics and consumer groups.

    A value that would have no effect is an error.
    """

    model_config = SettingsConfigDict(
        env_prefix="SPROUT_KAFKA_", extra="ignore", hide_input_in_errors=True, populate_by_name=True
    )

    bootstrap_servers: str = Field(default="localhost:9092", description="host:port,host:port")
    topic_prefix: str = Field(default="sprout.", description="Prefix of every topic name")
    group_prefix: str = Field(default="sprout.", description="Prefix of every consumer group")
    connect_timeout_s: float | None = Field(
        default=None,
        gt=0,
        description="How long a starting service waits for a broker and its topics before it ends with an error, "
        "wall; default: without end",
        validation_alias=AliasChoices("sprout_kafka_connect_timeout_s", "sprout_kafka_connect_attempts_s"),
    )
    compression: Literal["none", "gzip", "lz4", "zstd"] = Field(
        default="zstd",
        description="How a service compresses what it sends; every reader of its topics must know the codec: aiokafka "
        "needs the package cramjam for lz4 and zstd",
    )
    leader_session_timeout_s: float = Field(
        default=6.0,
        ge=1.0,
        description="A leader that Kafka has not heard of for so long is replaced by a standby, wall; not below the "
        "broker's group.min.session.timeout.ms",
    )

    inspect_at_start: bool = Field(
        default=True,
        description="Look for records that take too much memory to unpack before anything is read; false: a service "
        "starts about a second sooner, and such a record stops it",
    )
    careful_after_deaths: int = Field(
        default=2,
        ge=1,
        description="After so many processes in a row that died with the same record in hand, the next one handles the "
        "records of its partition one at a time",
    )
    set_aside_after_deaths: int = Field(
        default=3, ge=2, description="After so many, the record becomes a dead letter and is not read again"
    )
    security_protocol: SecurityProtocol = Field(default="PLAINTEXT", description="Protocol of the broker's listener")
    sasl_mechanism: SaslMechanism | None = Field(default=None, description="With SASL_*; as the broker is configured")
    sasl_username: str | None = Field(default=None, min_length=1, description="With OAUTHBEARER: the client id")
    sasl_password: SecretStr | None = Field(default=None, description="With OAUTHBEARER: the client secret")
    sasl_password_file: Path | None = Field(default=None, description="File with the password, instead of it")
    oauth_token_url: str | None = Field(
        default=None, description="With OAUTHBEARER: token endpoint for the client-credentials grant, https"
    )
    oauth_scope: str | None = Field(default=None, min_length=1, description="With OAUTHBEARER: scope of the tokens")
    ssl_ca_file: Path | None = Field(
        default=None, description="PEM of trusted authorities; default: those of the system"
    )
    ssl_certificate_file: Path | None = Field(
        default=None, description="PEM of the client's certificate, if the broker asks for one"
    )
    ssl_key_file: Path | None = Field(default=None, description="PEM of its key; default: in the same file")
    ssl_key_password: SecretStr | None = Field(default=None, description="Password of an encrypted key")
    ssl_key_password_file: Path | None = Field(default=None, description="File with it, instead of it")
    ssl_check_hostname: bool = Field(
        default=True, description="Whether the broker's certificate must name the address that is connected to"
    )

    _ssl_context: ssl.SSLContext | None = PrivateAttr(default=None)
    _oauth_tokens: ClientCredentials | None = PrivateAttr(default=None)

    def client_options(self) -> dict[str, Any]:
        """Connection options of every aiokafka client; contain the password."""
        return {"bootstrap_servers": self.bootstrap_servers, **self.security_options()}

    def environment(self) -> dict[str, str]:
        """The environment variables from which another process reads the same settings; contain the password."""
        given = {field: value for field in self.model_fields_set if (value := getattr(self, field)) is not None}
        for secret in ("sasl_password", "ssl_key_password"):
            if f"{secret}_file" in given:
                del given[secret]
        return {
            f"SPROUT_KAFKA_{field.upper()}": value.get_secret_value() if isinstance(value, SecretStr) else str(value)
            for field, value in given.items()
        }

    def connection_advice(self) -> str:
        """What to check when no broker answers, for people; contains no secret."""
        checks = [
            "SPROUT_KAFKA_BOOTSTRAP_SERVERS",
            f"SPROUT_KAFKA_SECURITY_PROTOCOL (does the listener use {self.security_protocol}?)",
        ]
        if self.uses_sasl:
            checks.append(f"the credentials of user {self.sasl_username!r} for {self.sasl_mechanism}")
        if self.oauth_token_url is not None:
            checks.append("SPROUT_KAFKA_OAUTH_TOKEN_URL (does it answer?)")
        if self.uses_tls:
            checks.append("the certificates (SPROUT_KAFKA_SSL_*)")
        return f"check {', '.join(checks[:-1])} and {checks[-1]}"

    def topic(self, spec: "TopicSpec") -> str:
        """The topic's name on the broker."""
        return self.topic_prefix + spec.name

    def group(self, service: str) -> str:
        """The consumer group's name on the broker."""
        return self.group_prefix + service

    @property
    def uses_sasl(self) -> bool:
        """Whether clients log in."""
        return self.security_protocol.startswith("SASL_")

    @property
    def uses_tls(self) -> bool:
        """Whether connections are encrypted."""
        return self.security_protocol.endswith("SSL")

    def security_options(self) -> dict[str, Any]:
        """TLS and login options of an aiokafka client; contain the password."""
        options: dict[str, Any] = {"security_protocol": self.security_protocol, "ssl_context": self._ssl_context}
        if self.oauth_tokens is not None:
            options |= {"sasl_mechanism": self.sasl_mechanism, "sasl_oauth_token_provider": self.oauth_tokens}
        elif self.uses_sasl:
            options |= {
                "sasl_mechanism": self.sasl_mechanism,
                "sasl_plain_username": self.sasl_username,
                "sasl_plain_password": self._password(),
            }
        return options

    def broker_security(self) -> "BaseSecurity | None":
        """The `security` option of a FastStream broker; `None` for PLAINTEXT."""
        # Imported here: it takes longer to import than all that the process of `shared.kafka.reading` needs.
        from faststream import security  # noqa: PLC0415

        if self.sasl_mechanism == "OAUTHBEARER":
            return security.SASLOAuthBearer(ssl_context=self._ssl_context, use_ssl=self.uses_tls)
        if self.sasl_mechanism is not None:
            login = {
                "PLAIN": security.SASLPlaintext,
                "SCRAM-SHA-256": security.SASLScram256,
                "SCRAM-SHA-512": security.SASLScram512,
            }[self.sasl_mechanism]
            return login(
                self.sasl_username or "", self._password(), ssl_context=self._ssl_context, use_ssl=self.uses_tls
            )
        return security.BaseSecurity(ssl_context=self._ssl_context) if self.uses_tls else None

    @property
    def oauth_tokens(self) -> ClientCredentials | None:
        """Where clients get their tokens; `None` without OAUTHBEARER."""
        return self._oauth_tokens

    def _password(self) -> str:
        return "" if self.sasl_password is None else self.sasl_password.get_secret_value()

    @model_validator(mode="after")
    def _check(self) -> Self:
        self._check_sasl()
        self._check_tls()
        if self.set_aside_after_deaths <= self.careful_after_deaths:
            raise ValueError("SPROUT_KAFKA_SET_ASIDE_AFTER_DEATHS must be larger than _CAREFUL_AFTER_DEATHS")
        if self.sasl_password_file is not None:
            self.sasl_password = SecretStr(read_secret(self.sasl_password_file, "SPROUT_KAFKA_SASL_PASSWORD_FILE"))
        if self.ssl_key_password_file is not None:
            secret = read_secret(self.ssl_key_password_file, "SPROUT_KAFKA_SSL_KEY_PASSWORD_FILE")
            self.ssl_key_password = SecretStr(secret)
        self._ssl_context = self._create_ssl_context() if self.uses_tls else None
        if self.oauth_token_url is not None:
            self._oauth_tokens = ClientCredentials(
                self.oauth_token_url,
                client_id=self.sasl_username or "",
                client_secret=self._password(),
                scope=self.oauth_scope,
            )
        return self

    def _check_sasl(self) -> None:
        oauth = self._set("oauth_token_url", "oauth_scope")
        unused = self._set("sasl_mechanism", "sasl_username", "sasl_password", "sasl_password_file") + oauth
        if not self.uses_sasl:
            if unused:
                raise ValueError(
                    f"{', '.join(unused)} would not be used: SPROUT_KAFKA_SECURITY_PROTOCOL is "
                    f"{self.security_protocol}; set it to SASL_SSL or SASL_PLAINTEXT, or leave these out"
                )
            return
        if self.sasl_password is not None and self.sasl_password_file is not None:
            raise ValueError("give either SPROUT_KAFKA_SASL_PASSWORD or SPROUT_KAFKA_SASL_PASSWORD_FILE")
        uses_oauth = self.sasl_mechanism == "OAUTHBEARER"
        if oauth and not uses_oauth:
            raise ValueError(f"{', '.join(oauth)} would not be used: SPROUT_KAFKA_SASL_MECHANISM is not OAUTHBEARER")
        missing = [
            name
            for name, given in (
                ("SPROUT_KAFKA_SASL_MECHANISM (PLAIN, SCRAM-SHA-256, SCRAM-SHA-512 or OAUTHBEARER)",
                 self.sasl_mechanism),
                ("SPROUT_KAFKA_OAUTH_TOKEN_URL", self.oauth_token_url or not uses_oauth),
                ("SPROUT_KAFKA_SASL_USERNAME", self.sasl_username),
                ("SPROUT_KAFKA_SASL_PASSWORD or SPROUT_KAFKA_SASL_PASSWORD_FILE", self._set("sasl_password")
                 or self._set("sasl_password_file")),
            )
            if not given
        ]  # fmt: skip
        if missing:
            raise ValueError(f"SPROUT_KAFKA_SECURITY_PROTOCOL {self.security_protocol} needs {' and '.join(missing)}")
        if self.oauth_token_url is not None:
            url = urlsplit(self.oauth_token_url)
            if url.scheme != "https" and url.hostname not in ("localhost", "127.0.0.1", "::1"):
                raise ValueError("SPROUT_KAFKA_OAUTH_TOKEN_URL must begin with https://: it receives the client secret")

    def _check_tls(self) -> None:
        tls_only = self._set(
            "ssl_ca_file", "ssl_certificate_file", "ssl_key_file", "ssl_key_password", "ssl_key_password_file"
        )
        if not self.ssl_check_hostname:
            tls_only.append("SPROUT_KAFKA_SSL_CHECK_HOSTNAME")
        if tls_only and not self.uses_tls:
            raise ValueError(
                f"{', '.join(tls_only)} would not be used: SPROUT_KAFKA_SECURITY_PROTOCOL is {self.security_protocol}; "
                "set it to SSL or SASL_SSL, or leave these out"
            )
        if self.ssl_certificate_file is None and self._set("ssl_key_file", "ssl_key_password", "ssl_key_password_file"):
            raise ValueError("a client's key needs its certificate: SPROUT_KAFKA_SSL_CERTIFICATE_FILE")
        if self.ssl_key_password is not None and self.ssl_key_password_file is not None:
            raise ValueError("give either SPROUT_KAFKA_SSL_KEY_PASSWORD or SPROUT_KAFKA_SSL_KEY_PASSWORD_FILE")

    def _set(self, *fields: str) -> list[str]:
        """The environment variables of the fields that have a value."""
        return [f"SPROUT_KAFKA_{field.upper()}" for field in fields if getattr(self, field) is not None]

    def _create_ssl_context(self) -> ssl.SSLContext:
        try:
            context = ssl.create_default_context(cafile=self.ssl_ca_file)
        except OSError as error:
            raise ValueError(f"SPROUT_KAFKA_SSL_CA_FILE {self.ssl_ca_file} cannot be used: {error}") from error
        context.check_hostname = self.ssl_check_hostname
        if self.ssl_certificate_file is None:
            return context
        password = "" if self.ssl_key_password is None else self.ssl_key_password.get_secret_value()
        try:
            # A function: with None OpenSSL would ask for the password of an encrypted key on the terminal.
            context.load_cert_chain(self.ssl_certificate_file, self.ssl_key_file, password=lambda: password)
        except OSError as error:
            raise ValueError(
                f"SPROUT_KAFKA_SSL_CERTIFICATE_FILE {self.ssl_certificate_file} with its key cannot be used: {error}. "
                "They must be PEM and belong together; an encrypted key needs SPROUT_KAFKA_SSL_KEY_PASSWORD"
            ) from error
        return context


class DatabaseSettings(BaseSettings):
    """PostgreSQL, in which every service that needs it has a schema of its own."""

    model_config = SettingsConfigDict(env_prefix="SPROUT_DATABASE_", extra="ignore", hide_input_in_errors=True)

    url: SecretStr = Field(
        default=SecretStr("postgresql://sprout@localhost:5432/sprout"),
        description="postgresql://user:password@host:port/database, or a socket with ?host=/path",
    )
    password_file: Path | None = Field(default=None, description="File with the password, for a URL without one")
    pool_size: int = Field(default=5, ge=1)
    command_timeout_s: float = Field(default=30.0, gt=0)

    @model_validator(mode="after")
    def _with_password(self) -> Self:
        if self.password_file is None:
            return self
        parts = urlsplit(self.url.get_secret_value())
        user, at, host = parts.netloc.rpartition("@")
        if not at or not user or ":" in user:
            raise ValueError(
                "SPROUT_DATABASE_PASSWORD_FILE needs a SPROUT_DATABASE_URL with a user and without a password: "
                "postgresql://user@host:port/database"
            )
        password = read_secret(self.password_file, "SPROUT_DATABASE_PASSWORD_FILE")
        with_password = parts._replace(netloc=f"{user}:{quote(password, safe='')}@{host}")
        self.url = SecretStr(with_password.geturl())
        return self


class HttpSettings(BaseSettings):
    """Address on which health, readiness and metrics are served."""

    model_config = SettingsConfigDict(env_prefix="SPROUT_HTTP_", extra="ignore")

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8080


class LogSettings(BaseSettings):
    """Level and format of the log."""

    model_config = SettingsConfigDict(env_prefix="SPROUT_LOG_", extra="ignore")

    level: str = Field(default="INFO", pattern="^(DEBUG|INFO|WARNING|ERROR)$")
    format: str = Field(default="json", pattern="^(json|console)$")


class FleetSettings(BaseSettings):
    """Path of the fleet file."""

    model_config = SettingsConfigDict(env_prefix="SPROUT_FLEET_", extra="ignore")

    file: Path = Field(default=Path("fleet.toml"), description="Directives, models, pools: see shared/fleet.py")
