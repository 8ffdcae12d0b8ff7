"""The search for unreadable records, with a stand-in for the process that reads them."""

import pytest
from aiokafka import TopicPartition

from shared.kafka import inspection
from shared.kafka.reading import OUT_OF_MEMORY, Job
from shared.runtime.settings import KafkaSettings

FIRST, SECOND = TopicPartition("a", 0), TopicPartition("b", 1)

END = 5_000


class Reader:
    """Reads all but the bad offsets; offsets that do not exist are passed over."""

    def __init__(self, bad: dict[TopicPartition, set[int]], missing: dict[TopicPartition, set[int]]) -> None:
        self.bad, self.missing, self.runs = bad, missing, 0

    async def run(self, _: KafkaSettings, job: Job) -> tuple[list[str], int]:
        self.runs += 1
        if not job.windows:
            windows = [Job.model_validate({"windows": [self._window(one)]}).windows[0] for one in (FIRST, SECOND)]
            return [one.model_dump_json() for one in windows], OUT_OF_MEMORY if any(self.bad.values()) else 0
        for window in job.windows:
            partition = TopicPartition(window.topic, window.partition)
            offset = window.first
            while offset < window.end:
                # As Kafka: what is read next is the next record, wherever it is.
                record = next((one for one in range(offset, END) if one not in self.missing.get(partition, ())), END)
                if record in self.bad.get(partition, ()):
                    return [f"{partition.topic} {partition.partition} {offset}"], OUT_OF_MEMORY
                offset = record + 1
        return [], 0

    @staticmethod
    def _window(partition: TopicPartition) -> dict[str, object]:
        return {"topic": partition.topic, "partition": partition.partition, "first": 0, "end": END}


@pytest.mark.parametrize(
    ("bad", "missing", "found"),
    [
        ({}, {}, {}),
        ({FIRST: {7}}, {}, {FIRST: [range(7, 8)]}),
        ({FIRST: {0}, SECOND: {4_999}}, {}, {FIRST: [range(1)], SECOND: [range(4_999, 5_000)]}),
        ({FIRST: {3, 10}}, {}, {FIRST: [range(3, 4), range(10, 11)]}),
        ({SECOND: set(range(100, 1_133))}, {}, {SECOND: [range(100, 1_133)]}),
        ({SECOND: {3_000}}, {SECOND: set(range(1_000, 3_000))}, {SECOND: [range(1_000, 3_001)]}),
    ],
)
async def test_exactly_the_bad_offsets_and_the_gaps_before_them_are_found(bad, missing, found, monkeypatch):
    reader = Reader(bad, missing)
    monkeypatch.setattr(inspection, "_run", reader.run)
    assert await inspection.find_unreadable(KafkaSettings(), {"a": [None], "b": ["g"]}) == found
    assert reader.runs <= 40


async def test_what_was_found_counts_although_the_search_ends_early(monkeypatch):
    reader = Reader({FIRST: set(range(0, 5_000, 2))}, {})
    monkeypatch.setattr(inspection, "_run", reader.run)
    found = await inspection.find_unreadable(KafkaSettings(), {"a": [None]})
    assert reader.runs == inspection.MAX_RUNS + 1
    assert len(found[FIRST]) == inspection.MAX_RUNS
