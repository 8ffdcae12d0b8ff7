"""Finds records that take too much memory to unpack, before a service reads them.

Kafka limits the compressed size of a batch, and aiokafka unpacks a batch whole: 126 KB can become 130 MB. A process
that dies of that reads the same record after its restart. So a starting service first lets another process read, with
limited memory, the records that may have been in hand when its predecessor died: of a consumer group those after the
committed offsets, without a group all of the topic. Only if that process runs out of memory does it read again, record
by record; a record at which it fails twice is set aside unparsed.

`python -m shared.kafka.inspection JOB` is that process; the job is JSON of a `Job`. It connects with `SPROUT_KAFKA_*`.
"""

import asyncio
import os
import resource
import signal
import sys
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Final

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from pydantic import BaseModel

from shared.runtime.logs import get_logger
from shared.runtime.settings import KafkaSettings

MEMORY_BYTES: Final = 64 * 1024 * 1024
"""What reading one record may take: about twice its unpacked size. A service has as much left of 256 MiB."""

WINDOW: Final = 2_000
"""Records of each partition of a group that are inspected: as many as a service has in hand."""

QUICK_RECORDS: Final = 500
"""Records read at once while nothing is suspected."""

FETCH_BYTES: Final = 8 * 1024 * 1024
"""Most bytes of one answer of Kafka, as they are on the wire."""

MAX_RUNS: Final = 60
"""Most runs of the process at one start."""

OUT_OF_MEMORY: Final = 3
"""Exit status of the process after a `MemoryError`."""

FAILURES: Final = frozenset({OUT_OF_MEMORY, -signal.SIGABRT, -signal.SIGKILL, -signal.SIGSEGV})
"""How the process ends for want of memory: by itself, in a library that is not Python, by the kernel."""

TIMEOUT_S: Final = 60.0
"""Wall seconds of one run."""

POLL_MS: Final = 1_000

Windows = dict[TopicPartition, range]
"""Offsets to read, by partition."""

_log = get_logger(__name__)


class Window(BaseModel):
    """Offsets of a partition, from `first` up to and without `end`."""

    topic: str
    partition: int
    first: int
    end: int


class Job(BaseModel):
    """What the process reads.

    Attributes:
        groups: by topic, the consumer groups that read it; None for a consumer without a group. The process prints the
            windows that follow from that, then reads them quickly.
        windows: read one by one; the process prints every position before it reads it.
    """

    groups: dict[str, list[str | None]] = {}
    windows: list[Window] = []


class InspectionError(RuntimeError):
    """The records could not be inspected; the service starts without."""


async def find_unreadable(
    kafka: KafkaSettings, groups: Mapping[str, Collection[str | None]]
) -> dict[TopicPartition, list[range]]:
    """The offsets to set aside, in ascending order.

    Args:
        groups: see `Job`; full names.
    """
    found: dict[TopicPartition, list[range]] = {}
    try:
        lines, failed = await _run(kafka, Job(groups={topic: list(names) for topic, names in groups.items()}))
        windows = {
            TopicPartition(one.topic, one.partition): range(one.first, one.end)
            for one in map(Window.model_validate_json, lines)
        }
        search = _Search(kafka, windows)
        while failed and (bad := await search.next()) is not None:
            partition, offsets = bad
            _log.error(
                "a record takes too much memory and is set aside",
                topic=partition.topic,
                partition=partition.partition,
                offset=offsets.start,
            )
            found.setdefault(partition, []).append(offsets)
    except InspectionError as error:
        _log.warning("records could not be inspected before the start", problem=str(error))
    return found


class _Search:
    """Finds the offsets one after the other, reading record by record."""

    def __init__(self, kafka: KafkaSettings, windows: Windows) -> None:
        self._kafka = kafka
        self._left = windows
        self._runs = 0

    async def next(self) -> tuple[TopicPartition, range] | None:
        """The next offsets that cannot be read, all of one partition; None if there are none."""
        suspect = None
        while (failure := await self._first_failure(self._left)) is not None:
            partition, offset = failure
            done = list(self._left)[: list(self._left).index(partition)]
            for one in done:
                del self._left[one]
            end = self._left[partition].stop
            self._left[partition] = range(offset, end)
            if failure == suspect:
                readable = await self._first_readable(partition, range(offset + 1, end))
                self._left[partition] = range(readable, end)
                return partition, range(offset, readable)
            suspect = failure
        return None

    async def _first_readable(self, partition: TopicPartition, offsets: range) -> int:
        """The first of the offsets at which reading works again, or their end.

        A batch may hold many records, and a compacted topic may lack many offsets before it.
        """
        bad, step = offsets.start - 1, 1
        while bad + step < offsets.stop and await self._fails_at(partition, bad + step):
            bad, step = bad + step, step * 2
        good = min(bad + step, offsets.stop)
        while good - bad > 1:
            middle = (good + bad) // 2
            if await self._fails_at(partition, middle):
                bad = middle
            else:
                good = middle
        return good

    async def _fails_at(self, partition: TopicPartition, offset: int) -> bool:
        return await self._first_failure({partition: range(offset, offset + 1)}) is not None

    async def _first_failure(self, windows: Windows) -> tuple[TopicPartition, int] | None:
        """The first position at which the process runs out of memory."""
        self._runs += 1
        if self._runs > MAX_RUNS:
            raise InspectionError(f"more than {MAX_RUNS} runs")
        job = Job(windows=[
            Window(topic=partition.topic, partition=partition.partition, first=offsets.start, end=offsets.stop)
            for partition, offsets in windows.items()
        ])  # fmt: skip
        lines, failed = await _run(self._kafka, job)
        if not failed or not lines:
            return None
        topic, partition, offset = lines[-1].split()
        return TopicPartition(topic, int(partition)), int(offset)


async def _run(kafka: KafkaSettings, job: Job) -> tuple[list[str], bool]:
    """Run the process.

    Returns:
        The lines that it printed (record by record only the last one), and whether it ran out of memory.

    Raises:
        InspectionError: it could not read.
    """
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", __name__, job.model_dump_json()),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        cwd=Path(__file__).parents[2],
        env={**os.environ, **kafka.environment()},
    )
    lines: list[str] = []
    try:
        async with asyncio.timeout(TIMEOUT_S):
            assert process.stdout is not None
            async for line in process.stdout:
                if job.windows:
                    lines.clear()
                lines.append(line.decode().strip())
            status = await process.wait()
    except TimeoutError:
        raise InspectionError(f"not within {TIMEOUT_S:g} s") from None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    failed = status in FAILURES if job.windows else bool(status and lines)
    if status and not failed:
        raise InspectionError(f"exit status {status}")
    return lines, failed


async def _inspect(job: Job) -> None:
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
        windows = await _find_windows(kafka, consumer, job.groups)
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


async def _find_windows(kafka: KafkaSettings, consumer: Any, groups: Mapping[str, Sequence[str | None]]) -> Windows:  # noqa: ANN401
    """What the groups may read next: nothing, if they have read all."""
    async with _admin(kafka) as admin:
        described = await admin.describe_topics(list(groups))
        partitions = [
            TopicPartition(topic["topic"], entry["partition"]) for topic in described for entry in topic["partitions"]
        ]
        begins, ends = await consumer.beginning_offsets(partitions), await consumer.end_offsets(partitions)
        windows: Windows = {}
        for group in {name for names in groups.values() for name in names}:
            read = [partition for partition in partitions if group in groups[partition.topic]]
            committed = await admin.list_consumer_group_offsets(group, partitions=read) if group is not None else {}
            for partition in read:
                stored = committed.get(partition)
                first = max(begins[partition], -1 if stored is None else stored.offset)
                end = ends[partition] if group is None else min(ends[partition], first + WINDOW)
                known = windows.get(partition, range(first, end))
                windows[partition] = range(min(first, known.start), max(end, known.stop))
    return {partition: windows[partition] for partition in sorted(windows) if windows[partition]}


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
    asyncio.run(_inspect(Job.model_validate_json(sys.argv[1])))
