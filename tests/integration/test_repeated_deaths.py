"""Records whose handling kills the process, on real Kafka: they are set aside, and all others are handled."""

import asyncio

import asyncpg
import pytest

from shared.messages import DeadLetter, ErrorDetail, GenerationResponse
from shared.topics import DEAD_LETTERS, RESPONSES
from tests.support.contract import NOW
from tests.support.deadlines import DEADLINE_S
from tests.support.deadly import DEADLY, deadly_spec
from tests.support.evaluator import judged_fleet
from tests.support.processes import restart_exited, service_process
from tests.support.router import committed, producing, reading, request, until_committed

pytestmark = pytest.mark.integration

RECORDS = 40
DEADLY_AT = (10, 25)
DEATHS = 4
"""Most for each record: one that nobody counts, two until the service is careful, and one that shows which it is."""


def letters_of(records) -> list[tuple[str, int, int, str]]:
    letters = (DeadLetter.model_validate_json(record.value) for record in records)
    return [(one.reason, one.partition, one.offset, one.value_base64) for one in letters]


async def test_a_router_sets_them_aside_and_answers_all_other_requests(kafka, routers, producer):
    await producer.prepare({"L1": 1.0})
    for number in range(RECORDS):
        changes = {"prompt": DEADLY} if number in DEADLY_AT else {}
        value = request(number, **changes).model_dump_json(exclude_none=True).encode()
        await producer.raw(value, key=f"r{number}".encode(), partition=0)
    spec = deadly_spec(routers.spec({}))
    routers.supervisor.spawn(spec)
    deaths = 0
    async with reading(kafka) as answers, reading(kafka, DEAD_LETTERS) as letters:
        async with asyncio.timeout(DEADLINE_S):
            while len(answers.records) + len(letters.records) < RECORDS:
                deaths += len(restart_exited(routers.supervisor, [spec.name]))
                await answers._poll(20)
                await letters._poll(20)
        await until_committed(kafka)
        await answers.read_to_end()
        await letters.read_to_end()
    assert letters_of(letters.records) == [("process_died", 0, offset, "") for offset in DEADLY_AT]
    assert {one.status for one in answers.responses().values()} == {"ok"}
    assert len(answers.records) == len(answers.responses()) == RECORDS - len(DEADLY_AT)
    assert deaths <= DEATHS * len(DEADLY_AT)


async def test_a_ledger_sets_them_aside_and_books_all_other_responses(kafka, database, supervisor, tmp_path):
    deadly_at = DEADLY_AT[0]
    fleet = tmp_path / "fleet.toml"
    fleet.write_text(judged_fleet("127.0.0.1:9"))
    async with producing(kafka) as producer:
        for number in range(RECORDS):
            response = GenerationResponse(
                request_id=DEADLY if number == deadly_at else f"r{number}",
                model="m",
                status="error",
                error=ErrorDetail(code="upstream_error", message="none"),
                requested_at=NOW,
            )
            await producer.producer.send_and_wait(
                kafka.topic(RESPONSES), response.model_dump_json().encode(), partition=0
            )
    spec = deadly_spec(service_process("ledger", kafka=kafka, database=database, fleet=fleet))
    supervisor.spawn(spec)
    deaths = 0
    async with reading(kafka, DEAD_LETTERS) as letters, asyncio.timeout(DEADLINE_S):
        while (await committed(kafka, "ledger.responses", topic=RESPONSES))[0] != (RECORDS, RECORDS):
            deaths += len(restart_exited(supervisor, [spec.name]))
            await letters._poll(50)
        await letters.read_to_end()
    assert letters_of(letters.records) == [("process_died", 0, deadly_at, "")]
    assert deaths <= DEATHS
    connection = await asyncpg.connect(database.url.get_secret_value())
    try:
        booked = [row["id"] for row in await connection.fetch("SELECT id FROM ledger.rejections")]
    finally:
        await connection.close()
        supervisor.stop(spec.name)
    assert sorted(booked) == sorted(f"r{number}" for number in range(RECORDS) if number != deadly_at)
