"""Reads records with limited memory, in a process of its own: `python -m shared.kafka.reading JOB`.

The job is JSON of a `Job`. The process connects with `SPROUT_KAFKA_*`. A service starts it at each of its own starts,
so it imports little.
"""

import asyncio
import os
import resource
import sys
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Final

from aiokafka import AIOKafkaConsumer, OffsetAndMetadata, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import GroupCoordinatorNotAvailableError
from pydantic import BaseModel

from shared.kafka.deaths import split_deaths
from shared.kafka.workarounds import read_commits
from shared.runtime.settings import KafkaSettings

MEMORY_BYTES: Final = 64 * 1024 * 1024
"""What reading one record may take: about twice its unpacked size. A service has as much left of 256 MiB."""

WINDOW: Final = 70_000
"""Records of each partition of a group that are inspected: as many as a service has in hand, most of them the requests
that a router with the default limits has read ahead."""

QUICK_RECORDS: Final = 500
"""Records read at once while nothing is suspected."""

FETCH_BYTES: Final = 8 * 1024 * 1024
"""Most bytes of one answer of Kafka, as they are on the wire."""

OUT_OF_MEMORY: Final = 3
"""Exit status of the process after a `MemoryError`."""

POLL_MS: Final = 1_000

COORDINATOR_PAUSE_S: Final = 0.2
"""Wall seconds before Kafka is asked again for the coordinator of a group."""

Windows = dict[TopicPartition, range]
"""Offsets to read, by partition."""


class Window(BaseModel):
    """Offsets of a partition, from `first` up to and without `end`."""

    topic: str
    partition: int
    first: int
    end: int


class Since(BaseModel):
    """Topics that are read from a time on, which the commits of a group have in their metadata.

    Attributes:
        topics: that are read.
        group: whose commits.
        committed: topics of the commits.
        prefix: of the metadata; Unix milliseconds follow.
        margin_ms: the topics are read from so much earlier.
    """

    topics: list[str]
    group: str
    committed: list[str]
    prefix: str
    margin_ms: int


class Job(BaseModel):
    """What the process reads.

    Attributes:
        since: see `Since`.
        groups: by topic, the consumer groups that read it; None for a consumer without a group. The process prints the
            windows that follow from that, then reads them quickly.
        windows: read one by one; the process prints every position before it reads it.
    """

    groups: dict[str, list[str | None]] = {}
    since: Since | None = None
    windows: list[Window] = []


async def _read(job: Job) -> None:
    """Read what a job asks for."""
    kafka = KafkaSettings()
    consumer: Any = AIOKafkaConsumer(**kafka.client_options(), enable_auto_commit=False, fetch_max_bytes=FETCH_BYTES)
    await consumer.start()
    try:
        if job.windows:
            _limit_memory()
            for window in job.windows:
                await _read_one_by_one(consumer, window)
            return
        async with _admin(kafka) as admin:
            windows = await _windows_of_groups(admin, consumer, job.groups)
            windows |= {} if job.since is None else await _windows_since(admin, consumer, job.since)
        for partition, offsets in windows.items():
            window = Window(topic=partition.topic, partition=partition.partition, first=offsets.start, end=offsets.stop)
            print(window.model_dump_json(), flush=True)  # noqa: T201 - the result
        if windows:
            _limit_memory()
            await _read_quickly(consumer, windows)
    except MemoryError:
        os._exit(OUT_OF_MEMORY)  # an orderly end would need memory, too
    finally:
        await consumer.stop()


async def _windows_of_groups(
    admin: AIOKafkaAdminClient,
    consumer: Any,  # noqa: ANN401 - aiokafka has no types
    groups: Mapping[str, Sequence[str | None]],
) -> Windows:
    """What the groups may read next: nothing, if they have read all."""
    partitions = await _partitions(admin, groups)
    begins, ends = await consumer.beginning_offsets(partitions), await consumer.end_offsets(partitions)
    windows: Windows = {}
    for group in {name for names in groups.values() for name in names}:
        read = [partition for partition in partitions if group in groups[partition.topic]]
        committed = await _committed(admin, group, read) if group is not None else {}
        for partition in read:
            stored = committed.get(partition)
            first = max(begins[partition], -1 if stored is None else stored.offset)
            end = ends[partition] if group is None else min(ends[partition], first + WINDOW)
            known = windows.get(partition, range(first, end))
            windows[partition] = range(min(first, known.start), max(end, known.stop))
    return {partition: windows[partition] for partition in sorted(windows) if windows[partition]}


async def _windows_since(admin: AIOKafkaAdminClient, consumer: Any, since: Since) -> Windows:  # noqa: ANN401
    committed = await _committed(admin, since.group, await _partitions(admin, since.committed))
    metadata = [split_deaths(str(one.metadata or ""))[0] for one in committed.values()]
    times = [int(found) for one in metadata if (found := one.removeprefix(since.prefix)).isdecimal()]
    if not times:
        return {}
    partitions = await _partitions(admin, since.topics)
    ends = await consumer.end_offsets(partitions)
    begins = await consumer.offsets_for_times(dict.fromkeys(partitions, max(0, min(times) - since.margin_ms)))
    return {
        partition: range(begin.offset, ends[partition])
        for partition, begin in sorted(begins.items())
        if begin is not None and begin.offset < ends[partition]
    }


async def _partitions(admin: AIOKafkaAdminClient, topics: Collection[str]) -> list[TopicPartition]:
    described = await admin.describe_topics(list(topics))
    return [TopicPartition(topic["topic"], entry["partition"]) for topic in described for entry in topic["partitions"]]


async def _committed(
    admin: AIOKafkaAdminClient, group: str, partitions: Sequence[TopicPartition]
) -> Mapping[TopicPartition, OffsetAndMetadata]:
    while True:
        try:
            return await read_commits(admin, group, partitions)
        except GroupCoordinatorNotAvailableError:  # Kafka has just started, or this is its first group
            await asyncio.sleep(COORDINATOR_PAUSE_S)


async def _read_quickly(consumer: Any, windows: Windows) -> None:  # noqa: ANN401 - aiokafka has no types
    consumer.assign(list(windows))
    for partition, offsets in windows.items():
        consumer.seek(partition, offsets.start)
    left = list(windows)
    while left:
        await consumer.getmany(*left, timeout_ms=POLL_MS, max_records=QUICK_RECORDS)
        done = [partition for partition in left if await consumer.position(partition) >= windows[partition].stop]
        consumer.pause(*done)
        left = [partition for partition in left if partition not in done]


async def _read_one_by_one(consumer: Any, window: Window) -> None:  # noqa: ANN401 - aiokafka has no types
    partition = TopicPartition(window.topic, window.partition)
    consumer.assign([partition])
    consumer.seek(partition, window.first)
    # The offset after the last record, not the position: of a compacted batch the last offsets may be missing.
    reached = window.first
    while await consumer.position(partition) < window.end:
        print(window.topic, window.partition, reached, flush=True)  # noqa: T201 - the result
        batches = await consumer.getmany(partition, timeout_ms=POLL_MS, max_records=1)
        reached = max([reached, *(record.offset + 1 for record in batches.get(partition, ()))])


@asynccontextmanager
async def _admin(kafka: KafkaSettings) -> AsyncIterator[AIOKafkaAdminClient]:
    admin = AIOKafkaAdminClient(**kafka.client_options())
    try:
        await admin.start()
        yield admin
    finally:
        await admin.close()


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


if __name__ == "__main__":
    asyncio.run(_read(Job.model_validate_json(sys.argv[1])))
