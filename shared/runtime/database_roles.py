"""Roles of PostgreSQL: one per service, which owns only its own schema, and one for the operator's command line.

A service's role may not read another service's schema, create schemas, or change roles. The operator's role reads all
schemas and deletes from them (`sprout report`, `sprout erase`); it creates nothing. None is a superuser.
"""

import base64
import hashlib
import hmac
import os
from collections.abc import Mapping
from typing import Final

import asyncpg

OPERATOR: Final = "operator"
"""Name of the operator's role, without the prefix."""

SCRAM_ITERATIONS: Final = 4_096
"""PostgreSQL's own default."""

_FOREIGN_RELATIONS: Final = """
SELECT format('%I.%I', $1::text, relname) FROM pg_class
WHERE relnamespace = to_regnamespace($1) AND relkind IN ('r', 'p', 'v', 'm', 'S')
  AND pg_get_userbyid(relowner) <> $2
  -- The sequence of a column has the owner of its table.
  AND NOT (relkind = 'S' AND EXISTS (
      SELECT FROM pg_depend WHERE classid = 'pg_class'::regclass AND objid = pg_class.oid AND deptype IN ('a', 'i')
  ))
"""


def role_name(name: str) -> str:
    """The role of a service, or of the operator."""
    return f"sprout_{name}"


async def create_roles(connection: asyncpg.Connection, passwords: Mapping[str, str]) -> list[str]:
    """Create roles and schemas, and set the passwords; what exists is corrected, so it may be called at every start.

    Tables that another role created in a service's schema, such as the superuser of an earlier version, are handed to
    the service.

    Args:
        connection: to the database, as a superuser or as a role that owns the database and may create roles.
        passwords: by service; that of the operator under `OPERATOR`.

    Returns:
        What was changed, for people.

    Raises:
        ValueError: a password is empty or not ASCII.
        asyncpg.PostgresError: the server refused.
    """
    changes: list[str] = []
    services = [name for name in passwords if name != OPERATOR]
    async with connection.transaction():
        await connection.execute("SELECT pg_advisory_xact_lock(hashtext('sprout.roles'))")
        for name, password in passwords.items():
            changes += await _create_role(connection, role_name(name), password)
        database = await connection.fetchval("SELECT quote_ident(current_database())")
        await connection.execute(f"REVOKE ALL ON DATABASE {database} FROM PUBLIC")
        await connection.execute("REVOKE CREATE ON SCHEMA public FROM PUBLIC")
        for name in passwords:
            await connection.execute(f'GRANT CONNECT, TEMPORARY ON DATABASE {database} TO "{role_name(name)}"')
        for service in services:
            changes += await _create_schema(connection, service, operator=OPERATOR in passwords)
    return changes


async def _create_role(connection: asyncpg.Connection, role: str, password: str) -> list[str]:
    known = await connection.fetchval("SELECT EXISTS (SELECT FROM pg_roles WHERE rolname = $1)", role)
    if not known:
        await connection.execute(f'CREATE ROLE "{role}"')  # without any right
    # The server gets only the verifier, so the password is in no log of statements.
    await connection.execute(f"ALTER ROLE \"{role}\" LOGIN PASSWORD '{scram_verifier(password)}'")
    if await connection.fetchval("SELECT rolsuper FROM pg_roles WHERE rolname = current_user"):
        await connection.execute(f'ALTER ROLE "{role}" NOSUPERUSER NOCREATEDB NOCREATEROLE NOBYPASSRLS')
    else:
        await connection.execute(f'GRANT "{role}" TO CURRENT_USER')  # to act on its schema
    return [] if known else [f"created role {role}"]


async def _create_schema(connection: asyncpg.Connection, service: str, *, operator: bool) -> list[str]:
    role = role_name(service)
    owner = await connection.fetchval("SELECT pg_get_userbyid(nspowner) FROM pg_namespace WHERE nspname = $1", service)
    changes: list[str] = []
    if owner is None:
        await connection.execute(f'CREATE SCHEMA "{service}" AUTHORIZATION "{role}"')
        changes.append(f"created schema {service}")
    elif owner != role:
        await connection.execute(f'ALTER SCHEMA "{service}" OWNER TO "{role}"')
        changes.append(f"handed schema {service} to role {role}")
    relations = [row[0] for row in await connection.fetch(_FOREIGN_RELATIONS, service, role)]
    for relation in relations:
        await connection.execute(f'ALTER TABLE {relation} OWNER TO "{role}"')  # also for views and sequences
    if relations:
        changes.append(f"handed {len(relations)} tables of schema {service} to role {role}")
    if operator:
        reader, rights = role_name(OPERATOR), "SELECT, UPDATE, DELETE"
        await connection.execute(f'GRANT USAGE ON SCHEMA "{service}" TO "{reader}"')
        await connection.execute(f'GRANT {rights} ON ALL TABLES IN SCHEMA "{service}" TO "{reader}"')
        await connection.execute(
            f'ALTER DEFAULT PRIVILEGES FOR ROLE "{role}" IN SCHEMA "{service}" GRANT {rights} ON TABLES TO "{reader}"'
        )
    return changes


def scram_verifier(password: str) -> str:
    """What PostgreSQL stores of a password (RFC 5803, SCRAM-SHA-256); it cannot be used to log in.

    Raises:
        ValueError: the password is empty or not ASCII.
    """
    if not password or not password.isascii():
        raise ValueError("a password of PostgreSQL must be ASCII and not empty")
    salt = os.urandom(16)
    salted = hashlib.pbkdf2_hmac("sha256", password.encode(), salt, SCRAM_ITERATIONS)
    stored_key = hashlib.sha256(hmac.digest(salted, b"Client Key", "sha256")).digest()
    server_key = hmac.digest(salted, b"Server Key", "sha256")
    return f"SCRAM-SHA-256${SCRAM_ITERATIONS}:{_base64(salt)}${_base64(stored_key)}:{_base64(server_key)}"


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()
