"""PostgreSQL: where the password comes from, and what happens while the server is unavailable."""

from pathlib import Path

import asyncpg
import pytest
from pydantic import SecretStr, ValidationError

from shared.kafka.handling import RetryLaterError
from shared.runtime.database import DatabaseStatus, DatabaseUnavailableError
from shared.runtime.settings import DatabaseSettings


def _url(settings: DatabaseSettings) -> str:
    return settings.url.get_secret_value()


def test_password_of_a_mounted_secret_becomes_part_of_the_url(tmp_path: Path) -> None:
    secret = tmp_path / "password"
    secret.write_text("p@ss/word:1 %\n")
    settings = DatabaseSettings(
        url=SecretStr("postgresql://sprout@db:5432/sprout?sslmode=require"), password_file=secret
    )
    assert _url(settings) == "postgresql://sprout:p%40ss%2Fword%3A1%20%25@db:5432/sprout?sslmode=require"


def test_file_and_url_are_read_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = tmp_path / "password"
    secret.write_text("hidden")
    monkeypatch.setenv("SPROUT_DATABASE_URL", "postgresql://sprout@db/sprout")
    monkeypatch.setenv("SPROUT_DATABASE_PASSWORD_FILE", str(secret))
    settings = DatabaseSettings()
    assert _url(settings) == "postgresql://sprout:hidden@db/sprout"
    assert "hidden" not in repr(settings)


def test_without_a_file_the_url_stays_as_it_is() -> None:
    assert _url(DatabaseSettings(url=SecretStr("postgresql://a:b@c/d"))) == "postgresql://a:b@c/d"


def test_two_passwords_are_rejected_without_quoting_either(tmp_path: Path) -> None:
    secret = tmp_path / "password"
    secret.write_text("hidden")
    with pytest.raises(ValidationError, match="with a user and without a password") as caught:
        DatabaseSettings(url=SecretStr("postgresql://a:other@c/d"), password_file=secret)
    assert "hidden" not in str(caught.value)
    assert "other" not in str(caught.value)


def test_missing_and_empty_files_are_named(tmp_path: Path) -> None:
    url = SecretStr("postgresql://sprout@db/sprout")
    with pytest.raises(ValidationError, match=r"SPROUT_DATABASE_PASSWORD_FILE cannot be read.*absent"):
        DatabaseSettings(url=url, password_file=tmp_path / "absent")
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(ValidationError, match=r"SPROUT_DATABASE_PASSWORD_FILE .*empty is empty"):
        DatabaseSettings(url=url, password_file=tmp_path / "empty")


@pytest.mark.parametrize(
    "error",
    [
        ConnectionRefusedError(),
        TimeoutError(),
        asyncpg.InterfaceError("closed"),
        asyncpg.InternalClientError("gone"),
        asyncpg.AdminShutdownError("shutdown"),
        asyncpg.DiskFullError("no space"),
        asyncpg.DeadlockDetectedError("deadlock"),
        asyncpg.ReadOnlySQLTransactionError("standby"),
    ],
)
def test_an_operation_that_does_not_reach_the_server_can_be_retried(error: Exception) -> None:
    status = DatabaseStatus()
    assert status.problem() == "PostgreSQL: not connected yet"
    with status.watch():
        pass
    assert status.problem() is None
    with pytest.raises(DatabaseUnavailableError) as caught, status.watch():
        raise error
    assert isinstance(caught.value, RetryLaterError)
    assert status.problem() == f"PostgreSQL is unavailable ({type(error).__name__})"


class UnencodableValueError(asyncpg.InterfaceError, ValueError):
    """As asyncpg raises it for an argument."""


@pytest.mark.parametrize("error", [asyncpg.UniqueViolationError("duplicate"), UnencodableValueError("argument")])
def test_an_error_in_a_statement_is_no_outage(error: Exception) -> None:
    status = DatabaseStatus()
    with status.watch():
        pass
    with pytest.raises(type(error)), status.watch():
        raise error
    assert status.problem() is None


async def test_an_operation_is_retried_until_the_server_answers() -> None:
    status = DatabaseStatus()
    errors: list[Exception] = [OSError(), OSError()]

    async def operation() -> str:
        with status.watch():
            if errors:
                raise errors.pop()
        return "done"

    assert await status.retry(operation, pause_s=0) == "done"
    assert errors == []
