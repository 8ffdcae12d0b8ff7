"""Reads large results from PostgreSQL as arrays, which takes a fraction of the time that single values take."""

from collections.abc import AsyncIterator, Mapping
from typing import Any, TypeAlias

import asyncpg
import numpy as np
from asyncpg.pool import PoolConnectionProxy

Connection: TypeAlias = asyncpg.Connection | PoolConnectionProxy


def array_columns(*names: str) -> str:
    """The columns of a `SELECT` that collects each of these in an array."""
    return ", ".join(f"array_agg({name}) AS {name}" for name in names)


async def read_arrays(
    connection: Connection, statement: str, *arguments: object, at_once: int = 5
) -> AsyncIterator[Mapping[str, Any]]:
    """The rows of a statement that returns arrays, which become numpy arrays.

    Args:
        at_once: rows that are in memory at once as Python's numbers, which take more than arrays.

    Raises:
        asyncpg.PostgresError: the database rejected the statement.
    """
    async for row in connection.cursor(statement, *arguments, prefetch=at_once):
        yield {name: np.array(value) if isinstance(value, list) else value for name, value in row.items()}
