"""Finds records that take too much memory to unpack, before a service reads them.

Kafka limits the compressed size of a batch, and aiokafka unpacks a batch whole: 126 KB can become 130 MB. A process
that dies of that reads the same record after its restart. So a starting service first lets another process read, with
limited memory, the records that may have been in hand when its predecessor died: those after the committed offsets. A
record at which that process fails twice for want of memory is set aside unparsed.

`python -m shared.kafka.inspection TOPIC GROUP [PARTITION:OFFSET ...]` is that process. It connects with
`SPROUT_KAFKA_*` and prints every position before it reads it.
"""

import asyncio
import os
import resource
import signal
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Final

from aiokafka import AIOKafkaConsumer, ConsumerRecord, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient

from shared.runtime.logs import get_logger
from shared.runtime.settings import KafkaSettings

UNREADABLE_HEADER: Final = "sprout-unreadable"
"""Header of the record that stands for records which were set aside."""

MEMORY_BYTES: Final = 96 * 1024 * 1024
"""What reading one record may take: about twice its unpacked size. With that the process fits beside a router that has
just started into 256 MiB."""

WINDOW: Final = 2_000
"""Records of each partition that are inspected: more than a service has in hand."""

MAX_RUNS: Final = 50
LINEAR_RUNS: Final = 8
"""Failures in a row after which the next one is looked for at twice the distance: a batch may hold many records."""

OUT_OF_MEMORY: Final = 3
"""Exit status of the process after a `MemoryError`."""

FAILURES: Final = frozenset({OUT_OF_MEMORY, -signal.SIGABRT, -signal.SIGKILL, -signal.SIGSEGV})
"""How the process ends for want of memory: by itself, in a library that is not Python, by the kernel."""

TIMEOUT_S: Final = 60.0
POLL_MS: Final = 1_000

_log = get_logger(__name__)


async def find_unreadable(topic: str, group: str) -> dict[int, list[range]]:
    """The offsets to set aside, by partition number, in ascending order.

    Args:
        topic, group: full names.
    """
    found: dict[int, list[range]] = {}
    starts: dict[int, int] = {}
    suspect = None
    failures = 0
    for _ in range(MAX_RUNS):
        last = await _inspect(topic, group, [f"{partition}:{offset}" for partition, offset in starts.items()])
        if last is None:
            break
        if last != suspect:
            suspect = last
            continue
        partition, offset = last
        ranges = found.setdefault(partition, [])
        continues = bool(ranges) and ranges[-1].stop == offset
        failures = failures + 1 if continues else 1
        first = ranges.pop().start if continues else offset
        starts[partition] = offset + (1 << max(0, failures - LINEAR_RUNS))
        ranges.append(range(first, starts[partition]))
        _log.error("a record takes too much memory and is set aside", topic=topic, partition=partition, offset=offset)
    return found


async def _inspect(topic: str, group: str, starts: Sequence[str]) -> tuple[int, int] | None:
    """Run the process: the position at which it ran out of memory; None if it did not."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", __name__, topic, group, *starts),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        cwd=Path(__file__).parents[2],
    )
    last = None
    try:
        async with asyncio.timeout(TIMEOUT_S):
            assert process.stdout is not None
            async for line in process.stdout:
                partition, _, offset = line.decode().strip().partition(":")
                last = (int(partition), int(offset))
            status = await process.wait()
    except TimeoutError:
        _log.warning("the records after the committed offsets could not be inspected in time", topic=topic)
        return None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if status in FAILURES:
        return last
    if status:
        _log.warning("the records after the committed offsets could not be inspected", topic=topic, status=status)
    return None


async def read_range(kafka: KafkaSettings, partition: TopicPartition, offsets: range) -> list[Any]:
    """The records with these offsets.

    Raises:
        KafkaError: Kafka could not be read.
    """
    records: list[Any] = []
    async with _consumer(kafka) as consumer:
        consumer.assign([partition])
        consumer.seek(partition, offsets.start)
        while await consumer.position(partition) < offsets.stop:
            # One at a time: the record after the last one must not be unpacked.
            batches = await consumer.getmany(partition, timeout_ms=POLL_MS, max_records=1)
            records += (record for record in batches.get(partition, ()) if record.offset in offsets)
    return records


def stand_in(partition: TopicPartition, offset: int) -> "ConsumerRecord[bytes, bytes]":
    """A record without content in place of those that are set aside, for their dead letter."""
    headers = ((UNREADABLE_HEADER, b""),)
    return ConsumerRecord(partition.topic, partition.partition, offset, -1, 0, None, None, None, -1, -1, headers)


async def _read_window(topic: str, group: str, starts: Mapping[int, int]) -> None:
    """Print and read every position of the window."""
    kafka = KafkaSettings()
    async with _consumer(kafka) as consumer:
        partitions = [TopicPartition(topic, number) for number in sorted(await _partitions(kafka, topic))]
        begins, ends = await consumer.beginning_offsets(partitions), await consumer.end_offsets(partitions)
        committed = await _committed(kafka, group, partitions)
        _limit_memory()
        for partition in partitions:
            first = max(begins[partition], committed.get(partition, 0), starts.get(partition.partition, 0))
            end = min(ends[partition], max(begins[partition], committed.get(partition, 0)) + WINDOW)
            if first >= end:
                continue
            consumer.assign([partition])
            consumer.seek(partition, first)
            while (position := await consumer.position(partition)) < end:
                print(f"{partition.partition}:{position}", flush=True)  # noqa: T201 - the result
                try:
                    await consumer.getmany(partition, timeout_ms=POLL_MS, max_records=1)
                except MemoryError:
                    os._exit(OUT_OF_MEMORY)  # an orderly end would need memory, too


async def _partitions(kafka: KafkaSettings, topic: str) -> set[int]:
    admin = AIOKafkaAdminClient(**kafka.client_options())
    try:
        await admin.start()
        return {entry["partition"] for found in await admin.describe_topics([topic]) for entry in found["partitions"]}
    finally:
        await admin.close()


async def _committed(
    kafka: KafkaSettings, group: str, partitions: Sequence[TopicPartition]
) -> dict[TopicPartition, int]:
    admin = AIOKafkaAdminClient(**kafka.client_options())
    try:
        await admin.start()
        stored = await admin.list_consumer_group_offsets(group, partitions=list(partitions))
    finally:
        await admin.close()
    return {partition: one.offset for partition, one in stored.items() if one.offset >= 0}


def _limit_memory() -> None:
    """Let this process take `MEMORY_BYTES` more than it has; further allocations fail, and it ends."""
    status = Path("/proc/self/status")
    if not status.is_file():  # not Linux: nothing is limited, and nothing found
        return
    with suppress(OSError):
        # If memory is short nevertheless, the kernel ends this process and not the service.
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
    fields = dict(line.split(":", 1) for line in status.read_text(encoding="utf-8").splitlines())
    limit = int(fields["VmData"].split()[0]) * 1024 + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


@asynccontextmanager
async def _consumer(kafka: KafkaSettings) -> AsyncIterator[Any]:
    consumer: Any = AIOKafkaConsumer(**kafka.client_options(), enable_auto_commit=False)
    await consumer.start()
    try:
        yield consumer
    finally:
        await consumer.stop()


if __name__ == "__main__":
    _topic, _group, *_starts = sys.argv[1:]
    asyncio.run(_read_window(_topic, _group, {int(p): int(o) for p, _, o in (one.partition(":") for one in _starts)}))
