"""Outages of servers under running services, and what the services' `/ready` says of them."""

import asyncio
import urllib.error
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from functools import partial

import psutil

from deploy.local.processes import Supervisor
from tests.support.deadlines import DEADLINE_S, until
from tests.support.router import page

NOTICED_S = 30.0
"""The services notice an outage within 10 s; a busy test machine may stand still for as long again."""


@contextmanager
def frozen(pid: int) -> Iterator[None]:
    """Stop a process and its children, which may be in sessions of their own."""
    process = psutil.Process(pid)
    process.suspend()
    children = process.children(recursive=True)
    for one in children:
        one.suspend()
    try:
        yield
    finally:
        for one in (process, *children):
            one.resume()


async def restart(supervisor: Supervisor, name: str) -> None:
    """Stop a server as an operator does, if it runs, and start it again."""
    await asyncio.to_thread(supervisor.respawn(name).wait_ready)


def kill(supervisor: Supervisor, name: str) -> None:
    """Kill a process and its descendants, which may be in sessions of their own."""
    children = psutil.Process(supervisor.process(name).pid).children(recursive=True)
    supervisor.kill(name)
    for one in children:
        with suppress(psutil.NoSuchProcess):
            one.kill()
    psutil.wait_procs(children, timeout=DEADLINE_S)


async def until_ready(supervisor: Supervisor, names: Collection[str], problem: str | None = None) -> None:
    """Wait until every service is ready, or until every one reports a problem."""
    async with asyncio.timeout(DEADLINE_S if problem is None else NOTICED_S):
        for name in names:
            await until(
                partial(asyncio.to_thread, readiness, supervisor, name),
                lambda found: (problem or '"ready"') in found,
            )


def readiness(supervisor: Supervisor, name: str) -> str:
    """What `/ready` says; empty while the process does not listen yet."""
    try:
        return page(f"{supervisor.process(name).spec.url}/ready")
    except urllib.error.HTTPError as error:
        return error.read().decode()
    except urllib.error.URLError:
        return ""
