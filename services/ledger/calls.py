"""Calls as they arrive: what is kept of a response or usage record, and the dimensions that many calls share.

A call's key is the request's record, which no producer chooses. So two answers to one record are one call, and two
records with one request id are two. Answers of an earlier router, and usage records, have no record; their id is the
key then.
"""

import hashlib
import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from datetime import MAXYEAR, UTC, datetime, timedelta
from typing import Any, NamedTuple
from uuid import UUID

from shared.messages import GenerationResponse, UsageRecord

LARGEST_INTEGER = 2**31 - 1
"""Of PostgreSQL's type `int`."""
USED_WITHIN = timedelta(hours=1)
"""The time of a dimension's last use is known to this precision."""
CACHED = 20_000
"""Dimensions that a process remembers."""


class Labels(NamedTuple):
    """What many calls have in common; the columns of a row in `dimensions`."""

    purpose: str
    evaluation_id: str | None
    model: str
    grp: str
    task: str | None
    tenant: str | None
    pool: str
    level: str
    zone: str
    endpoint: str
    policy_version: int | None
    decision_source: str | None
    propensity: float
    propensities: tuple[tuple[str, float], ...]
    """By option."""
    finish_reason: str | None = None


class NewCall(NamedTuple):
    """A call as it arrives: a tuple, because thousands a second are made.

    Attributes:
        id: the key.
        request_id: the producer's id of the request, if it is not the key.
    """

    id: str
    request_id: str | None
    labels: Labels
    started_at: datetime
    first_token_at: datetime | None
    finished_at: datetime
    prompt_tokens: int | None
    completion_tokens: int


def request_call(response: GenerationResponse) -> NewCall:
    """The call of a request that was answered.

    Raises:
        ValueError: the response is not complete.
    """
    decision, usage, timing = response.decision, response.usage, response.timing
    if decision is None or usage is None or timing is None or response.endpoint is None:
        raise ValueError("a response with status 'ok' must carry decision, usage, timing and endpoint")
    return NewCall(
        storable(response.record or response.request_id),
        None if response.record is None else storable(response.request_id),
        Labels(
            "request",
            None,
            response.model,
            decision.group,
            response.task,
            response.tenant,
            decision.pool,
            decision.level,
            decision.zone,
            response.endpoint,
            decision.policy_version,
            decision.source,
            decision.propensity,
            tuple(decision.propensities.items()),
            response.finish_reason,
        ),
        *_times(timing.started_at, timing.first_token_at, timing.finished_at),
        _count(usage.prompt_tokens),
        min(usage.completion_tokens, LARGEST_INTEGER),
    )


def _times(
    started_at: datetime, first_token_at: datetime | None, finished_at: datetime
) -> tuple[datetime, datetime | None, datetime]:
    """The times of a call in order, also if a clock was set back while it ran."""
    finished_at = max(started_at, finished_at)
    if first_token_at is not None:
        first_token_at = min(max(started_at, first_token_at), finished_at)
    return started_at, first_token_at, finished_at


def _count(tokens: int | None) -> int | None:
    return None if tokens is None else min(tokens, LARGEST_INTEGER)


def usage_call(record: UsageRecord) -> NewCall:
    """The call of a usage record of the evaluator."""
    return NewCall(
        storable(record.id),
        None,
        Labels(
            record.purpose,
            record.evaluation_id,
            record.model,
            record.group,
            None,
            None,
            record.pool,
            record.level,
            record.zone,
            record.endpoint,
            None,
            None,
            1.0,
            (),
        ),
        *_times(record.started_at, record.first_token_at, record.finished_at),
        _count(record.prompt_tokens),
        min(record.completion_tokens, LARGEST_INTEGER),
    )


def storable(value: Any) -> Any:  # noqa: ANN401 - any JSON value
    """The nearest value that PostgreSQL can store: no NUL in a text, no integer beyond 32 bits."""
    if isinstance(value, str):
        return value.replace("\x00", "\ufffd") if "\x00" in value else value
    if isinstance(value, dict):
        return {storable(name): storable(content) for name, content in value.items()}
    if isinstance(value, list | tuple):
        return [storable(one) for one in value]
    if isinstance(value, int) and not isinstance(value, bool):
        return min(value, LARGEST_INTEGER)
    return value


def storable_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of values that PostgreSQL can store."""
    return {name: storable(value) for name, value in row.items()}


_ADD_DIMENSIONS = """
INSERT INTO dimensions (digest, purpose, evaluation_id, model, grp, task, tenant, pool, level, zone, endpoint,
                        policy_version, decision_source, propensity, propensities, finish_reason, used_at)
SELECT digest, purpose, evaluation_id, model, grp, task, tenant, pool, level, zone, endpoint,
       policy_version, decision_source, propensity, propensities, finish_reason, used_at
FROM jsonb_populate_recordset(NULL::dimensions, $1)
ON CONFLICT (digest) DO UPDATE SET used_at = greatest(dimensions.used_at, EXCLUDED.used_at)
RETURNING digest, id
"""


class Dimensions:
    """The ids of dimensions, remembered by this process; the least recently used are forgotten."""

    def __init__(self) -> None:
        self._known: OrderedDict[Labels, tuple[int, datetime]] = OrderedDict()

    async def ids(self, connection: Any, calls: Sequence[NewCall]) -> list[int]:  # noqa: ANN401 - asyncpg's types
        """The id of each call's dimension; adds those that are new.

        Raises:
            asyncpg.PostgresError, OSError: nothing is remembered of this call.
        """
        numbers: dict[Labels, int] = {}
        number_of = [numbers.setdefault(call.labels, len(numbers)) for call in calls]
        ends = [datetime.min.replace(tzinfo=UTC)] * len(numbers)
        for number, call in zip(number_of, calls, strict=True):
            ends[number] = max(ends[number], call.finished_at)
        new = [
            (labels, end)
            for labels, end in zip(numbers, ends, strict=True)
            if (known := self._known.get(labels)) is None or end > known[1]
        ]
        if new:
            rows = {_digest(labels): (labels, end) for labels, end in new}
            content = json.dumps([_row(digest, *found) for digest, found in sorted(rows.items())])
            by_digest = {row["digest"]: row["id"] for row in await connection.fetch(_ADD_DIMENSIONS, content)}
            for labels, end in new:
                self._known[labels] = (by_digest[_digest(labels)], _used_at(end))
        for labels in numbers:
            self._known.move_to_end(labels)
        ids = [self._known[labels][0] for labels in numbers]
        while len(self._known) > CACHED:
            self._known.popitem(last=False)
        return [ids[number] for number in number_of]


def _row(digest: UUID, labels: Labels, at: datetime) -> Mapping[str, Any]:
    columns = storable_row(labels._asdict())
    columns["propensities"] = storable(dict(labels.propensities))
    return {**columns, "digest": str(digest), "used_at": _used_at(at).isoformat()}


def _used_at(at: datetime) -> datetime:
    return at if at.year == MAXYEAR else at + USED_WITHIN


def _digest(labels: Labels) -> UUID:
    # The propensities as text within the text: so it was from the beginning, and dimensions must stay the same.
    columns = labels._replace(propensities=json.dumps(dict(labels.propensities)))  # type: ignore[arg-type]
    content = json.dumps([storable(one) for one in columns], ensure_ascii=False).encode()
    return UUID(bytes=hashlib.md5(content, usedforsecurity=False).digest())


def columns_of(calls: Sequence[NewCall], dimensions: Sequence[int]) -> tuple[Sequence[Any], ...]:
    """The calls as columns, in the order in which `sql.ADD_CALLS` takes them."""
    if not calls:
        return ()
    ids, request_ids, labels, *others = zip(*calls, strict=True)
    return (ids, request_ids, dimensions, [storable(one.endpoint) for one in labels], *others)
