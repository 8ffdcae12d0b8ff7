"""`sprout dead-letters`: list dead letters, show one, and send them to a topic again."""

import asyncio
import base64
import json
from collections.abc import AsyncIterator, Collection, Coroutine, Iterable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Any, Final, TypeVar

import typer
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.errors import KafkaError
from pydantic_core import from_json
from rich.table import Column, Table
from rich.text import Text

from shared.access import REDRIVE_ID
from shared.kafka.dead_letters import MAX_KEY_BYTES, PROCESS_DIED, UNREADABLE
from shared.kafka.records import PoisonMessageError, parse
from shared.messages import DeadLetter
from shared.runtime.logs import printable
from shared.runtime.settings import KafkaSettings
from shared.topics import DEAD_LETTERS, REDRIVEN_HEADER
from tools.cli.console import (
    Bootstrap,
    Exit,
    Target,
    fail,
    find_target,
    out,
    print_text,
    quiet_clients,
    unreachable,
)
from tools.cli.offsets import existing_partitions

T = TypeVar("T")

REDRIVEN: Final = "redriven"
"""Reason of the record that marks a dead letter as redriven, on the same topic."""

POLL_MS: Final = 500
READ_TIMEOUT_S: Final = 60.0
SHOWN_BYTES: Final = 4_000

app = typer.Typer(no_args_is_help=True, help="List, show and redrive dead letters.")

Reason = Annotated[str | None, typer.Option(help="Only this reason: invalid_json, invalid_message, too_large, ...")]
Topic = Annotated[str | None, typer.Option(help="Only from this topic, with or without the prefix: requests")]
Since = Annotated[datetime | None, typer.Option(help="Only those that failed at this time (UTC, event time) or later")]
Until = Annotated[datetime | None, typer.Option(help="Only those that failed before this time")]
Ids = Annotated[
    list[str] | None, typer.Option("--id", help="Only this dead letter (as listed: 0:17) or request id; repeatable")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print as JSON")]


@dataclass(frozen=True, slots=True)
class Letter:
    """A dead letter and its position: `partition:offset` of the topic `dead-letters`."""

    position: str
    letter: DeadLetter

    @property
    def request_id(self) -> str | None:
        """The id that can be read in the original message."""
        with suppress(ValueError):
            content = from_json(self.letter.original_value(), allow_partial=True)
            if isinstance(content, dict):
                found = content.get("id", content.get("request_id"))
                return found if isinstance(found, str) else None
        return None

    @property
    def obstacle(self) -> str | None:
        """The reason why the letter cannot be sent again; None if it can."""
        key = self.letter.key_base64
        if self.letter.reason == UNREADABLE:
            return "the message was too large to read"
        if self.letter.reason == PROCESS_DIED:
            return "the message was not read again"
        if self.letter.truncated_bytes:
            return f"{self.letter.truncated_bytes} bytes of the message were not kept"
        if key is not None and len(base64.b64decode(key)) >= MAX_KEY_BYTES:
            return "the key was not kept whole"
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Filter:
    """Which dead letters a command is about."""

    reason: str | None = None
    topic: str | None = None
    since: datetime | None = None
    until: datetime | None = None
    ids: frozenset[str] = frozenset()

    def matches(self, one: Letter, kafka: KafkaSettings) -> bool:
        """Whether a dead letter is meant."""
        letter = one.letter
        return (
            self.reason in (None, letter.reason)
            and (self.topic is None or self.topic in (letter.topic, letter.topic.removeprefix(kafka.topic_prefix)))
            and (self.since is None or letter.failed_at >= _utc(self.since))
            and (self.until is None or letter.failed_at < _utc(self.until))
            and (not self.ids or one.position in self.ids or one.request_id in self.ids)
        )


@app.command("list")
def list_letters(
    *,
    reason: Reason = None,
    topic: Topic = None,
    since: Since = None,
    until: Until = None,
    ids: Ids = None,
    limit: Annotated[int, typer.Option(min=1, help="The newest that many")] = 50,
    as_json: AsJson = False,
    bootstrap: Bootstrap = None,
) -> None:
    """List dead letters: where they come from and what was wrong; without their content."""
    target = find_target(bootstrap)
    chosen = Filter(reason=reason, topic=topic, since=since, until=until, ids=frozenset(ids or ()))
    found, redriven = _run(target, read_letters(target.kafka, chosen))
    shown = found[-limit:]
    if as_json:
        rows = [_facts(one, redriven) for one in shown]
        print(json.dumps({"dead_letters": len(found), "shown": rows}, indent=2))
        return
    table = Table(Column("id", no_wrap=True), "failed (UTC)", "service", "message", "reason", "bytes", "", "detail")
    for one in shown:
        letter = one.letter
        size = len(letter.original_value()) + letter.truncated_bytes
        table.add_row(
            one.position,
            f"{letter.failed_at:%Y-%m-%d %H:%M:%S}",
            *map(_cell, (letter.service, f"{letter.topic} {letter.partition}:{letter.offset}", letter.reason)),
            str(size),
            REDRIVEN if one.position in redriven else "",
            _cell(letter.detail),
        )
    out.print(table)
    print_text(f"{len(shown)} of {len(found)} dead letters; the content: sprout dead-letters show ID")


@app.command()
def show(
    position: Annotated[str, typer.Argument(metavar="ID", help="As listed: 0:17")],
    *,
    as_json: AsJson = False,
    bootstrap: Bootstrap = None,
) -> None:
    """Show one dead letter with its content, which may hold a prompt."""
    target = find_target(bootstrap)
    found, redriven = _run(target, read_letters(target.kafka, Filter(ids=frozenset({position}))))
    if not found:
        fail(f"there is no dead letter {position!r}", remedy="sprout dead-letters list", code=Exit.FAILED)
    for one in found:
        if as_json:
            document = _facts(one, redriven) | {"dead_letter": one.letter.model_dump(mode="json")}
            print(json.dumps(document, indent=2))
            continue
        for name, content in _facts(one, redriven).items():
            print_text(f"{name:<12} {content}")
        value = one.letter.original_value()
        print_text(value[:SHOWN_BYTES].decode(errors="replace"))
        if len(value) > SHOWN_BYTES:
            print_text(f"... and {len(value) - SHOWN_BYTES} more bytes; --json prints all of them in base64")


@app.command()
def redrive(
    *,
    reason: Reason = None,
    topic: Topic = None,
    since: Since = None,
    until: Until = None,
    ids: Ids = None,
    to: Annotated[
        str | None, typer.Option(metavar="TOPIC", help="Send them there; default: the topic they come from")
    ] = None,
    execute: Annotated[bool, typer.Option("--execute", help="Send them; without it nothing is sent")] = False,
    bootstrap: Bootstrap = None,
) -> None:
    """Send the messages of dead letters again, each once, with their original bytes, key and headers.

    Without --execute this is a dry run. A dead letter that was redriven before is left out.
    """
    target = find_target(bootstrap)
    chosen = Filter(reason=reason, topic=topic, since=since, until=until, ids=frozenset(ids or ()))
    outcome = _run(target, redrive_letters(target.kafka, chosen, to=to, execute=execute))
    for position, why in outcome.kept_back:
        print_text(f"not sent: {position}: {why}")
    for name, number in outcome.sent.items():
        print_text(f"{number} to {name}" if execute else f"would send {number} to {name}")
    if not outcome.sent:
        print_text("no dead letter to send")
    elif not execute:
        print_text("this was a dry run; to send them: --execute")


@dataclass(frozen=True, slots=True)
class Redriven:
    """The result of a redrive.

    Attributes:
        sent: number of messages by topic.
        kept_back: positions of dead letters that cannot be sent, with the reason.
    """

    sent: dict[str, int]
    kept_back: list[tuple[str, str]]


async def read_letters(kafka: KafkaSettings, chosen: Filter) -> tuple[list[Letter], set[str]]:
    """The dead letters that are meant, oldest first, and the positions of those that were redriven.

    Raises:
        KafkaError: the broker cannot be reached.
        TimeoutError: the topic could not be read to its end.
    """
    found: list[Letter] = []
    redriven: set[str] = set()
    async for record in _records(kafka):
        try:
            one = Letter(f"{record.partition}:{record.offset}", parse(DeadLetter, record.value))
        except PoisonMessageError:
            continue
        if one.letter.reason == REDRIVEN:
            headers = dict(record.headers)
            redriven.add((headers.get(REDRIVEN_HEADER) or b"").decode(errors="replace"))
        elif chosen.matches(one, kafka):
            found.append(one)
    return found, redriven


async def redrive_letters(kafka: KafkaSettings, chosen: Filter, *, to: str | None, execute: bool) -> Redriven:
    """Send dead letters again, and mark them as redriven, each in one transaction.

    Raises:
        KafkaError: the broker cannot be reached, or another redrive has begun.
        LookupError: the topic does not exist.
        TimeoutError: the topic could not be read to its end.
    """
    producer = AIOKafkaProducer(
        **kafka.client_options(),
        # A second redrive ends the first, so no dead letter is sent twice.
        transactional_id=kafka.group(REDRIVE_ID),
        acks="all",
        max_request_size=DEAD_LETTERS.max_message_bytes,
    )
    if execute:
        # Before reading: it ends a redrive that another process has begun, whose marks are then all visible.
        await producer.start()
    try:
        found, redriven = await read_letters(kafka, chosen)
        fresh = [one for one in found if one.position not in redriven]
        sendable = [one for one in fresh if one.obstacle is None]
        topics = {one.position: _topic(kafka, to or one.letter.topic) for one in sendable}
        existing = {one.topic for one in await existing_partitions(kafka, sorted(set(topics.values())))}
        if missing := set(topics.values()) - existing:
            raise LookupError(f"topic {', '.join(sorted(missing))} does not exist")
        sent: dict[str, int] = {}
        for one in sendable:
            if execute:
                await _send(producer, kafka, one, topics[one.position])
            sent[topics[one.position]] = sent.get(topics[one.position], 0) + 1
    finally:
        await producer.stop()
    return Redriven(sent, [(one.position, one.obstacle) for one in fresh if one.obstacle is not None])


async def _send(producer: AIOKafkaProducer, kafka: KafkaSettings, one: Letter, topic: str) -> None:
    letter = one.letter
    key = None if letter.key_base64 is None else base64.b64decode(letter.key_base64)
    mark = letter.model_copy(
        update={
            "service": "sprout",
            "value_base64": "",
            "headers": {},
            "reason": REDRIVEN,
            "detail": f"dead letter {one.position} was sent to {topic}",
            "failed_at": datetime.now(UTC),
        }
    )
    header = (REDRIVEN_HEADER, one.position.encode())
    async with producer.transaction():
        await producer.send_and_wait(
            topic,
            letter.original_value(),
            key=key,
            headers=[*((name, base64.b64decode(content)) for name, content in letter.headers.items()), header],
        )
        await producer.send_and_wait(
            kafka.topic(DEAD_LETTERS), mark.model_dump_json().encode(), key=key, headers=[header]
        )


async def _records(kafka: KafkaSettings) -> AsyncIterator[Any]:
    """The committed records of the topic `dead-letters`, up to its present end."""
    partitions = await existing_partitions(kafka, [kafka.topic(DEAD_LETTERS)])
    if not partitions:
        return
    consumer: Any = AIOKafkaConsumer(
        **kafka.client_options(), enable_auto_commit=False, isolation_level="read_committed"
    )
    await consumer.start()
    try:
        ends = await consumer.end_offsets(partitions)
        consumer.assign(partitions)
        await consumer.seek_to_beginning(*partitions)
        async with asyncio.timeout(READ_TIMEOUT_S):
            while await _unread(consumer, ends):
                for records in (await consumer.getmany(timeout_ms=POLL_MS)).values():
                    for record in records:
                        yield record
    finally:
        await consumer.stop()


async def _unread(consumer: Any, ends: dict[TopicPartition, int]) -> Collection[TopicPartition]:  # noqa: ANN401
    return [partition for partition, end in ends.items() if await consumer.position(partition) < end]


def _run(target: Target, work: Coroutine[Any, Any, T]) -> T:
    quiet_clients()
    try:
        return asyncio.run(work)
    except LookupError as error:
        fail(str(error), remedy="sprout topics list", code=Exit.FAILED)
    except TimeoutError:
        fail("the topic could not be read to its end in time", code=Exit.TIMED_OUT)
    except (KafkaError, OSError) as error:
        unreachable(target, error)


def _facts(one: Letter, redriven: Iterable[str]) -> dict[str, Any]:
    letter = one.letter
    return {
        "id": one.position,
        "failed_at": letter.failed_at.isoformat(),
        "service": letter.service,
        "topic": letter.topic,
        "partition": letter.partition,
        "offset": letter.offset,
        "reason": letter.reason,
        "detail": letter.detail,
        "bytes": len(letter.original_value()) + letter.truncated_bytes,
        "request_id": one.request_id,
        "redriven": one.position in redriven,
    }


def _topic(kafka: KafkaSettings, name: str) -> str:
    return name if name.startswith(kafka.topic_prefix) else kafka.topic_prefix + name


def _cell(text: str) -> Text:
    return Text(printable(text))


def _utc(time: datetime) -> datetime:
    return time.replace(tzinfo=UTC) if time.tzinfo is None else time
