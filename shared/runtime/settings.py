"""Configuration that several services share; one class per concern, each with its own environment prefix."""

from pathlib import Path
from typing import Annotated, Any, Self
from urllib.parse import quote, urlsplit

from pydantic import Field, SecretStr, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from shared.kafka.security import KafkaSecuritySettings
from shared.runtime.secrets import read_secret
from shared.topics import TopicSpec


class KafkaSettings(KafkaSecuritySettings):
    """How to reach Kafka, and what the topics are called."""

    bootstrap_servers: str = Field(default="localhost:9092", description="host:port,host:port")
    topic_prefix: str = Field(default="sprout.", description="Put before every topic's name")
    group_prefix: str = Field(default="sprout.", description="Put before every consumer group's name")
    connect_attempts_s: float = Field(
        default=300.0, gt=0, description="How long a starting service waits for the broker"
    )

    def client_options(self) -> dict[str, Any]:
        """Where an aiokafka client connects to, and how; for every client there is. Holds the password."""
        return {"bootstrap_servers": self.bootstrap_servers, **self.security_options()}

    def connection_advice(self) -> str:
        """What to check when no broker answers; holds no secret."""
        checks = [
            "SPROUT_KAFKA_BOOTSTRAP_SERVERS",
            f"SPROUT_KAFKA_SECURITY_PROTOCOL (does the listener use {self.security_protocol}?)",
        ]
        if self.uses_sasl:
            checks.append(f"the credentials of user {self.sasl_username!r} for {self.sasl_mechanism}")
        if self.uses_tls:
            checks.append("the certificates (SPROUT_KAFKA_SSL_*)")
        return f"check {', '.join(checks[:-1])} and {checks[-1]}"

    def topic(self, spec: TopicSpec) -> str:
        """The full name of a topic."""
        return self.topic_prefix + spec.name

    def group(self, service: str) -> str:
        """The consumer group of a service."""
        return self.group_prefix + service


class DatabaseSettings(BaseSettings):
    """How to reach PostgreSQL; every service owns one schema there."""

    model_config = SettingsConfigDict(env_prefix="SPROUT_DATABASE_", extra="ignore", hide_input_in_errors=True)

    url: SecretStr = Field(
        default=SecretStr("postgresql://sprout:sprout@localhost:5432/sprout"),
        description="postgresql://user:password@host:port/database, or a socket with ?host=/path",
    )
    password_file: Path | None = Field(
        default=None, description="File that holds the password, as orchestrators mount secrets; put into the URL"
    )
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
                "SPROUT_DATABASE_PASSWORD_FILE is for a SPROUT_DATABASE_URL that names a user and no password: "
                "postgresql://user@host:port/database"
            )
        password = read_secret(self.password_file, "SPROUT_DATABASE_PASSWORD_FILE")
        whole = parts._replace(netloc=f"{user}:{quote(password, safe='')}@{host}")
        self.url = SecretStr(whole.geturl())
        return self


class HttpSettings(BaseSettings):
    """Where health, readiness and metrics are served."""

    model_config = SettingsConfigDict(env_prefix="SPROUT_HTTP_", extra="ignore")

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8080


class LogSettings(BaseSettings):
    """What is logged, and how."""

    model_config = SettingsConfigDict(env_prefix="SPROUT_LOG_", extra="ignore")

    level: str = Field(default="INFO", pattern="^(DEBUG|INFO|WARNING|ERROR)$")
    format: str = Field(default="json", pattern="^(json|console)$")


class FleetSettings(BaseSettings):
    """Where the fleet file lies."""

    model_config = SettingsConfigDict(env_prefix="SPROUT_FLEET_", extra="ignore")

    file: Path = Field(default=Path("fleet.toml"), description="Directives, models, pools: see shared/fleet.py")
