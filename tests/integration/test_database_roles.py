"""PostgreSQL's roles on a real server: what a service may reach, and the upgrade of an earlier version's database."""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import urlsplit

import asyncpg
import pytest
from pydantic import SecretStr
from typer.testing import CliRunner

from deploy.local.postgres import create_service_roles
from services import SERVICES
from services.gateway.keys import Limits, create_key, revoke_key, set_limits
from shared.runtime.database import MissingSchemaError, migrate, open_pool
from shared.runtime.database_roles import OPERATOR, create_roles, role_name
from shared.runtime.settings import DatabaseSettings
from tools.cli.main import app
from tools.reporting import collect_report

pytestmark = pytest.mark.integration

WITH_SCHEMA = tuple(name for name, service in SERVICES.items() if service.needs_database)
PRIVATE_TABLE = {"evaluator": "evaluator.reservoir", "ledger": "ledger.calls", "optimizer": "optimizer.migrations"}


async def migrated(url: str, service: str, wait_s: float = 10.0) -> list[str]:
    """Connect as a service does at its start."""
    pool = await open_pool(DatabaseSettings(url=SecretStr(url)), schema=service, wait_s=wait_s)
    try:
        return await migrate(pool, schema=service, package=f"services.{service}.migrations")
    finally:
        await pool.close()


@asynccontextmanager
async def connected(url: str) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(url)
    try:
        yield connection
    finally:
        await connection.close()


@pytest.fixture
def superuser(database: DatabaseSettings) -> str:
    return database.url.get_secret_value()


@pytest.fixture
async def urls(superuser: str) -> Mapping[str, str]:
    """The database by role, with the tables of every service."""
    made = await create_service_roles(superuser, [*WITH_SCHEMA, OPERATOR])
    for service in WITH_SCHEMA:
        assert await migrated(made[service], service)
    return made


async def test_a_service_reaches_its_own_schema_only(urls: Mapping[str, str]) -> None:
    for service in WITH_SCHEMA:
        async with connected(urls[service]) as connection:
            assert not await connection.fetchval("SELECT rolsuper FROM pg_roles WHERE rolname = current_user")
            for other, table in PRIVATE_TABLE.items():
                if other == service:
                    assert await connection.fetchval(f"SELECT count(*) FROM {table}") is not None
                    continue
                for statement in (f"SELECT * FROM {table}", f"DELETE FROM {table}", f"DROP TABLE {table}"):
                    with pytest.raises(asyncpg.InsufficientPrivilegeError):
                        await connection.execute(statement)
            for statement in (
                "CREATE SCHEMA mine",
                "CREATE TABLE public.mine ()",
                "CREATE ROLE mine SUPERUSER",
                f"ALTER ROLE {role_name(service)} SUPERUSER",
                f"SET ROLE {role_name(OPERATOR)}",
                "COPY (SELECT 1) TO PROGRAM 'true'",
                "SELECT pg_read_file('/etc/passwd')",
            ):
                with pytest.raises(asyncpg.InsufficientPrivilegeError):
                    await connection.execute(statement)


async def test_the_operator_reads_and_deletes_and_creates_nothing(urls: Mapping[str, str]) -> None:
    async with connected(urls["ledger"]) as ledger:
        await ledger.execute("CREATE TABLE ledger.made_later (id int)")
        await ledger.execute("INSERT INTO ledger.made_later VALUES (1)")
    async with connected(urls[OPERATOR]) as connection:
        for table in (*PRIVATE_TABLE.values(), "ledger.made_later"):
            async with connection.transaction():
                await connection.execute(f"LOCK TABLE {table} IN SHARE ROW EXCLUSIVE MODE")
                await connection.execute(f"DELETE FROM {table}")
            assert await connection.fetchval(f"SELECT count(*) FROM {table}") == 0
        for statement in ("CREATE TABLE ledger.mine ()", "CREATE SCHEMA mine", "DROP TABLE ledger.made_later"):
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await connection.execute(statement)


async def test_the_operator_manages_api_keys(urls: Mapping[str, str]) -> None:
    now = datetime.now(UTC)
    async with connected(urls[OPERATOR]) as connection:
        await connection.execute("SET search_path TO gateway")
        key, _ = await create_key(connection, name="test", tenant="t", now=now)
        for limits in (Limits(requests_per_minute=1), Limits()):
            await set_limits(connection, f"key/{key.id}", limits)
        assert await revoke_key(connection, key.id, now=now)


async def test_the_operator_can_compute_the_report(urls: Mapping[str, str]) -> None:
    assert (await collect_report(urls[OPERATOR])).empty


async def test_nobody_connects_without_the_password(urls: Mapping[str, str]) -> None:
    for url in urls.values():
        parts = urlsplit(url)
        assert parts.password
        for password in ("", ":wrong", f":{parts.password}x"):
            netloc = f"{parts.username}{password}@{parts.hostname}:{parts.port}"
            with pytest.raises(asyncpg.InvalidAuthorizationSpecificationError):
                await asyncpg.connect(parts._replace(netloc=netloc).geturl())


async def test_a_database_of_an_earlier_version_is_handed_over(superuser: str) -> None:
    # Earlier versions: one superuser for everything.
    for service in WITH_SCHEMA:
        await migrated(superuser, service)
    async with connected(superuser) as connection:
        await connection.execute("INSERT INTO ledger.migrations (name) VALUES ('kept')")
        passwords = {name: f"password-of-{name}" for name in (*WITH_SCHEMA, OPERATOR)}
        changes = await create_roles(connection, passwords)
        assert {f"handed schema {service} to role {role_name(service)}" for service in WITH_SCHEMA} <= set(changes)
        assert await create_roles(connection, passwords) == []  # at every further start
    parts = urlsplit(superuser)
    for service in WITH_SCHEMA:
        netloc = f"{role_name(service)}:password-of-{service}@{parts.hostname}:{parts.port}"
        url = parts._replace(netloc=netloc).geturl()
        assert await migrated(url, service) == []
        async with connected(url) as connection:
            # A later migration may change every table, and use its sequences.
            tables = await connection.fetch("SELECT tablename FROM pg_tables WHERE schemaname = $1", service)
            for table in tables:
                await connection.execute(f'ALTER TABLE {service}."{table[0]}" ADD COLUMN later int')
    async with connected(superuser) as connection:
        assert await connection.fetchval("SELECT count(*) FROM ledger.migrations WHERE name = 'kept'") == 1


async def test_an_administrator_without_superuser_rights_is_enough(superuser: str) -> None:
    parts = urlsplit(superuser)
    name = parts.path.lstrip("/")
    async with connected(superuser) as connection:
        await connection.execute(f"CREATE ROLE admin_{name} LOGIN CREATEROLE PASSWORD 'secret'")
        await connection.execute(f'ALTER DATABASE "{name}" OWNER TO admin_{name}')
        await connection.execute(f"ALTER SCHEMA public OWNER TO admin_{name}")
        # Such an administrator may not change roles that another one created.
        for role in map(role_name, (*WITH_SCHEMA, OPERATOR)):
            if await connection.fetchval("SELECT 1 FROM pg_roles WHERE rolname = $1", role):
                await connection.execute(f"GRANT {role} TO admin_{name} WITH ADMIN OPTION")
    admin = parts._replace(netloc=f"admin_{name}:secret@{parts.hostname}:{parts.port}").geturl()
    try:
        for service, url in (await create_service_roles(admin, [*WITH_SCHEMA, OPERATOR])).items():
            if service != OPERATOR:
                assert await migrated(url, service)
    finally:
        async with connected(superuser) as connection:
            await connection.execute(f'ALTER DATABASE "{name}" OWNER TO CURRENT_USER')
            await connection.execute("ALTER SCHEMA public OWNER TO CURRENT_USER")
            await connection.execute(f"DROP OWNED BY admin_{name}; DROP ROLE admin_{name}")


async def test_a_missing_schema_is_named_with_what_to_do(superuser: str) -> None:
    url = (await create_service_roles(superuser, ["ledger"]))["ledger"]
    with pytest.raises(MissingSchemaError, match=r"no schema 'optimizer'.*sprout database create"):
        await migrated(url, "optimizer")


class TestCommand:
    def test_roles_are_created_with_passwords_from_files(
        self, superuser: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        options = []
        for name in (*WITH_SCHEMA, OPERATOR):
            (tmp_path / name).write_text(f"secret-of-{name}\n")
            options += ["--password-file", f"{name}={tmp_path / name}"]
        monkeypatch.setenv("SPROUT_DATABASE_URL", superuser)
        result = CliRunner().invoke(app, ["database", "create", *options])
        assert result.exit_code == 0, result.output
        assert "created schema ledger" in result.output
        roles = ", ".join(role_name(name) for name in (*WITH_SCHEMA, OPERATOR))
        assert f"set the passwords of {roles}" in result.output
        assert "secret" not in result.output

    def test_wrong_use_is_explained(self, tmp_path: Path, superuser: str) -> None:
        runner = CliRunner()
        wrong_options = (("nobody=x", "NAME=FILE"), ("ledger=/absent", "cannot be read"), ("ledger", "NAME=FILE"))
        for given, problem in wrong_options:
            result = runner.invoke(app, ["database", "create", "--password-file", given, "--database", superuser])
            assert (result.exit_code, problem in result.output) == (2, True), result.output
        file = tmp_path / "ledger"
        file.write_text("secret")
        parts = urlsplit(superuser)
        wrong = parts._replace(netloc=f"{parts.username}:wrong@{parts.hostname}:{parts.port}").geturl()
        arguments = ["database", "create", "--password-file", f"ledger={file}", "--database"]
        result = runner.invoke(app, [*arguments, wrong])
        assert (result.exit_code, "rejects the login" in result.output) == (1, True), result.output
        result = runner.invoke(app, [*arguments, "postgresql://x:y@127.0.0.1:1/z"])
        assert (result.exit_code, "does not answer" in result.output) == (3, True), result.output
