"""Finds records that take too much memory to unpack, before a service reads them.

Kafka limits the compressed size of a batch, and aiokafka unpacks a batch whole: 126 KB can become 130 MB. A process
that dies of that reads the same record after its restart. So a starting service first lets another process read, with
limited memory, the records that may have been in hand when its predecessor died: of a consumer group those after the
committed offsets, without a group all of the topic. Only if that process runs out of memory does it read again, record
by record; a record at which it runs out of memory again is set aside unparsed.

`shared.kafka.reading` is that process.
"""

import asyncio
import os
import signal
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Final

from aiokafka import TopicPartition

from shared.kafka import reading
from shared.kafka.reading import OUT_OF_MEMORY, Job, Since, Window, Windows
from shared.runtime.logs import get_logger
from shared.runtime.settings import KafkaSettings

MAX_RUNS: Final = 60
"""Most runs of the process at one start."""

FAILURES: Final = frozenset({OUT_OF_MEMORY, -signal.SIGABRT, -signal.SIGKILL, -signal.SIGSEGV})
"""How the process ends for want of memory: by itself, in a library that is not Python, by the kernel."""

TIMEOUT_S: Final = 60.0
"""Wall seconds of one run."""

_log = get_logger(__name__)


class InspectionError(RuntimeError):
    """The records could not be inspected; the service starts without."""


async def find_unreadable(
    kafka: KafkaSettings, groups: Mapping[str, Collection[str | None]], since: Since | None = None
) -> dict[TopicPartition, list[range]]:
    """The offsets to set aside, in ascending order.

    Args:
        groups, since: see `Job`; full names.
    """
    found: dict[TopicPartition, list[range]] = {}
    try:
        job = Job(groups={topic: list(names) for topic, names in groups.items()}, since=since)
        lines, status = await _run(kafka, job)
        windows = {
            TopicPartition(one.topic, one.partition): range(one.first, one.end)
            for one in map(Window.model_validate_json, lines)
        }
        search = _Search(kafka, windows)
        while status and (bad := await search.next()) is not None:
            partition, offsets = bad
            ranges = found.setdefault(partition, [])
            if ranges and ranges[-1].stop == offsets.start:
                offsets = range(ranges.pop().start, offsets.stop)
            else:
                _log.error(
                    "a record takes too much memory and is set aside",
                    topic=partition.topic,
                    partition=partition.partition,
                    offset=offsets.start,
                )
            ranges.append(offsets)
    except InspectionError as error:
        _log.warning("records could not be inspected before the start", problem=str(error))
    return found


class _Search:
    """Finds the offsets one after the other, reading record by record."""

    def __init__(self, kafka: KafkaSettings, windows: Windows) -> None:
        self._kafka = kafka
        self._left = windows
        self._runs = 0
        self._after_last: tuple[TopicPartition, int] | None = None

    async def next(self) -> tuple[TopicPartition, range] | None:
        """The next offsets that cannot be read, all of one partition; None if there are none."""
        suspect = None
        while True:
            failure, status = await self._first_failure(self._left)
            if failure is None:
                return None
            partition, offset = failure
            end = self._left[partition].stop
            self._left = {one: offsets for one, offsets in self._left.items() if one >= partition}
            self._left[partition] = range(offset, end)
            if status == -signal.SIGKILL and failure != suspect:
                suspect = failure  # memory may have been short for another reason
                continue
            # A batch may hold many records, and a compacted topic may lack many offsets before it.
            many = failure == self._after_last
            stop = await self._first_readable(partition, range(offset + 1, end)) if many else offset + 1
            self._after_last = partition, stop
            self._left[partition] = range(stop, end)
            return partition, range(offset, stop)

    async def _first_readable(self, partition: TopicPartition, offsets: range) -> int:
        """The first of the offsets at which reading works again, or their end."""
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
        failure, _ = await self._first_failure({partition: range(offset, offset + 1)})
        return failure is not None

    async def _first_failure(self, windows: Windows) -> tuple[tuple[TopicPartition, int] | None, int]:
        """The first position at which the process runs out of memory, and its exit status."""
        self._runs += 1
        if self._runs > MAX_RUNS:
            raise InspectionError(f"more than {MAX_RUNS} runs")
        job = Job(windows=[
            Window(topic=partition.topic, partition=partition.partition, first=offsets.start, end=offsets.stop)
            for partition, offsets in windows.items()
        ])  # fmt: skip
        lines, status = await _run(self._kafka, job)
        if not status or not lines:
            return None, status
        topic, partition, offset = lines[-1].split()
        return (TopicPartition(topic, int(partition)), int(offset)), status


async def _run(kafka: KafkaSettings, job: Job) -> tuple[list[str], int]:
    """Run the process.

    Returns:
        The lines that it printed (record by record only the last one), and its exit status: 0, or it ran out of memory.

    Raises:
        InspectionError: it could not read.
    """
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", reading.__name__, job.model_dump_json()),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        cwd=Path(__file__).parents[2],
        env={**os.environ, **kafka.environment()},
    )
    lines: list[str] = []
    try:
        async with asyncio.timeout(TIMEOUT_S):
            assert process.stdout is not None
            assert process.stderr is not None
            async for line in process.stdout:
                if job.windows:
                    lines.clear()
                lines.append(line.decode().strip())
            trace = (await process.stderr.read()).decode(errors="replace").strip()
            status = await process.wait()
    except TimeoutError:
        raise InspectionError(f"not within {TIMEOUT_S:g} s") from None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    # Reading quickly, a background task of the client may meet the `MemoryError`, which then has another status.
    if status and status not in FAILURES and (job.windows or not lines):
        raise InspectionError(trace.rpartition("\n")[2].partition(":")[0] or f"exit status {status}")
    return lines, status
