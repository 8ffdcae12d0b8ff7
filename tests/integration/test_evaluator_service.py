"""The evaluator as a process, on real Kafka, PostgreSQL, and a Triton server with stand-in model and judge."""

import asyncio
import signal
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import asyncpg
import pytest

from deploy.local.processes import Supervisor
from shared.grouping import unpack
from shared.messages import Footprint, Policy, PromptGrouping, Quality, UsageRecord
from shared.runtime.clock import Clock
from shared.runtime.settings import DatabaseSettings, KafkaSettings
from shared.topics import CARBON_INTENSITY, FOOTPRINTS, POLICIES, PROMPT_GROUPS, QUALITY, SAMPLES, USAGE
from tests.support.contract import EXAMPLES
from tests.support.deadlines import DEADLINE_S, until
from tests.support.evaluator import (
    KINDS,
    TOKEN,
    EvaluatorProcess,
    ask_for_evaluation,
    intensities,
    judged_fleet,
    of_a_kind,
    request_evaluation,
    sample,
    shares,
    start_judged_triton,
    wait_until_ready_is,
)
from tests.support.processes import leader
from tests.support.router import MODEL, ZONE, Producer, TritonServer, producing, question, reading, until_page

pytestmark = pytest.mark.integration

BIAS = 0.4
PROMPTS = 240
RATE = 60.0
QUICK = {"SPROUT_KAFKA_LEADER_SESSION_TIMEOUT_S": "6"}
"""Settings of a leader that is killed or frozen: another one soon takes over."""
CLOCK = Clock.starting(datetime(2023, 2, 10, 12, tzinfo=UTC), rate=RATE)


@pytest.fixture(scope="module")
def triton(supervisor: Supervisor, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    folder = tmp_path_factory.mktemp("triton")
    server = start_judged_triton(
        supervisor, folder, name="evaluator-triton", clock=CLOCK, position_bias=BIAS, prompts=PROMPTS
    )
    yield server
    supervisor.stop(server.name)


@pytest.fixture
def evaluators(
    supervisor: Supervisor, kafka: KafkaSettings, database: DatabaseSettings, triton: TritonServer, tmp_path: Path
) -> Iterator[EvaluatorProcess]:
    fleet = tmp_path / "fleet.toml"
    fleet.write_text(judged_fleet(triton.address))
    settings = {
        "SPROUT_EVALUATOR_MIN_SAMPLES": "30",
        "SPROUT_EVALUATOR_GRACE_H": "0",
        "SPROUT_EVALUATOR_OPPORTUNITY_RULE": "urgency",
        "SPROUT_EVALUATOR_RETRY_PAUSE_S": "0.5",
        "SPROUT_EVALUATOR_HTTP_TOKEN": TOKEN,
        "SPROUT_KAFKA_LEADER_SESSION_TIMEOUT_S": "60",  # the leader stays the leader, however long the machine pauses
    }
    running = EvaluatorProcess(supervisor, kafka, database, fleet, CLOCK, settings)
    yield running
    running.stop_all()


@pytest.fixture
async def producer(kafka: KafkaSettings) -> AsyncIterator[Producer]:
    async with producing(kafka) as made:
        yield made


async def send_samples(producer: Producer, numbers: range, *, group: str = "qa", text=question) -> None:
    samples = [sample(number, group=group, at=CLOCK.now(), text=text) for number in numbers]
    sends = [producer.post(SAMPLES, one, group) for one in samples]
    await asyncio.gather(*sends)


def qualities(answers) -> list[Quality]:
    return [Quality.model_validate_json(record.value) for record in answers.records]


async def stored(database: DatabaseSettings, query: str) -> list[asyncpg.Record]:
    connection = await asyncpg.connect(database.url.get_secret_value())
    try:
        return await connection.fetch(query)
    finally:
        await connection.close()


async def test_published_shares_follow_the_preferences_although_the_judge_is_biased(kafka, evaluators, producer):
    await send_samples(producer, range(PROMPTS))
    name = evaluators.start(
        SPROUT_EVALUATOR_PROMPTS_PER_EVALUATION=str(PROMPTS),
        SPROUT_EVALUATOR_MIN_SAMPLES=str(PROMPTS),
        SPROUT_EVALUATOR_SAMPLES_PER_GROUP=str(PROMPTS),
    )
    async with reading(kafka, QUALITY) as found, reading(kafka, USAGE) as used:
        await found.read(until=1)
        (quality,) = qualities(found)
        assert found.records[0].key == quality.evaluation_id.encode()
        assert (quality.model, quality.trigger, quality.prompts) == (MODEL, "first", PROMPTS)
        measured = shares(quality.counts, group="qa")
        # A sixth of the prompts are ties, which both other orders' bias makes: they shift each share towards a third.
        assert measured == pytest.approx({"p/L0": 1 / 2, "p/L1": 1 / 3, "p/L2": 1 / 6}, abs=0.11)
        assert sum(measured.values()) == pytest.approx(1.0)
        assert {one.trials for one in quality.counts} == {PROMPTS}
        assert {one.metric for one in quality.counts} == {"preference"}  # no policy bounds correctness
        assert (quality.abstentions, quality.discarded, quality.rubric) == (0, {}, "default")
        card = quality.judge
        assert card is not None
        assert (card.comparisons, card.repeats, card.unreadable, card.checks) == (PROMPTS, PROMPTS, 0, 0)
        # The third order is asked only where the first two votes differ.
        assert card.votes == 2 * PROMPTS + card.flips
        assert 0.08 * PROMPTS < card.ties < 0.25 * PROMPTS
        assert 0.55 < card.positions["A"] / card.votes < 0.67
        assert 0.55 < card.flips / card.flips_at_random < 0.85
        assert (quality.cost.generations, quality.cost.judgements) == (3 * PROMPTS, card.votes)
        assert quality.cost.energy_kwh is None  # nothing was metered before
        await used.read(until=3 * PROMPTS + card.votes)
        records = [UsageRecord.model_validate_json(record.value) for record in used.records]
        assert len({record.id for record in records}) == 3 * PROMPTS + card.votes
        assert {record.evaluation_id for record in records} == {quality.evaluation_id}
        calls = Counter((record.purpose, record.pool, record.level, record.completion_tokens) for record in records)
        assert calls == {
            ("evaluation", "p", "L0", 100): PROMPTS,
            ("evaluation", "p", "L1", 30): PROMPTS,
            ("evaluation", "p", "L2", 10): PROMPTS,
            ("judge", "judge", "L0", 1): card.votes,
        }
        assert all(record.started_at <= record.finished_at for record in records)
        assert {(record.zone, record.group) for record in records} == {(ZONE, "qa")}
    # It counts as finished after its publication, when groups were learned.
    finished = f'sprout_evaluator_evaluations_total{{model="{MODEL}",outcome="finished",trigger="first"}} 1.0'
    text = await until_page(f"{evaluators.url(name)}/metrics", lambda text: finished in text)
    assert f'sprout_evaluator_judged_prompts_total{{model="{MODEL}"}} {PROMPTS}.0' in text
    assert f'sprout_evaluator_judge_usable{{metric="preference",model="{MODEL}"}} 1.0' in text
    # A fair judge names each position in a third of its votes.
    (line,) = [
        line for line in text.splitlines() if line.startswith('sprout_evaluator_judge_positions_total{position="A"}')
    ]
    assert float(line.split()[-1]) > 0.5 * card.votes
    assert question(1) not in evaluators.log(name)


async def test_it_estimates_its_cost_from_footprints_and_survives_a_restart(kafka, database, evaluators, producer):
    await send_samples(producer, range(20), group="qa")
    await send_samples(producer, range(20, 30), group="code")
    name = evaluators.start()
    async with reading(kafka, QUALITY) as found:
        await found.read(until=1)
        (first,) = qualities(found)
        assert {one.group for one in first.counts} == {"qa", "code"}
        now = CLOCK.now()
        for number, (purpose, pool, energy_j, tokens) in enumerate(
            [("evaluation", "p", 600.0, 100), ("judge", "judge", 50.0, 1), ("request", "p", 9e9, 1)]
        ):
            footprint = Footprint(
                request_id=f"f{number}", purpose=purpose, model=MODEL, group="qa", pool=pool, level="L0", zone=ZONE,
                endpoint="e0", started_at=now, finished_at=now, processing_s=1.0, completion_tokens=tokens,
                energy_j=energy_j, embodied_g=0.0, total_g=energy_j / 3.6e6 * 100.0,
                evaluation_id=None if purpose == "request" else first.evaluation_id,
            )  # fmt: skip
            await producer.post(FOOTPRINTS, footprint, footprint.request_id)
        evaluators.supervisor.stop(name)
        again = evaluators.start()
        for table in ("carbon", "energy"):
            query = f"SELECT 1 FROM evaluator.{table}"
            await until(lambda query=query: stored(database, query), lambda rows: len(rows) == 2)
        # The restarted process knows the first evaluation, so it waits for the next minimum.
        await producer.post(CARBON_INTENSITY, intensities(CLOCK.now(), 400, 420, 300, 200, 100, 130, hours=0.01), ZONE)
        await found.read(until=2)
        second = qualities(found)[1]
        assert (second.trigger, second.intensity_g_per_kwh) == ("local_minimum", 130.0)
        assert second.evaluated_at > first.evaluated_at
        assert second.evaluation_id != first.evaluation_id
        generated = 30 * 140
        assert second.cost.energy_kwh == pytest.approx((generated * 6 + second.cost.judgements * 50) / 3.6e6)
        assert second.cost.carbon_g > second.cost.energy_kwh * 130
        # Requested by a person.
        await ask_for_evaluation(evaluators.url(again))
        await found.read(until=3)
        assert qualities(found)[2].trigger == "requested"
        await found.read(settle_s=0.5)
        assert len(found.records) == 3


async def test_prompts_of_settled_groups_are_judged_thinly_unless_a_person_asks(kafka, database, evaluators, producer):
    await send_samples(producer, range(60), group="qa")
    await send_samples(producer, range(60, 90), group="code")
    now = CLOCK.now()
    example = EXAMPLES["policies"]
    assert isinstance(example, Policy)
    policy = example.model_copy(
        update={
            "model": MODEL,
            "created_at": now,
            "inputs": example.inputs.model_copy(update={"solved_for": now}),
            "valid_until": now + timedelta(days=2),
            "settled": {"qa": now - timedelta(hours=30), "code": now - timedelta(hours=3)},
        }
    )
    await producer.post(POLICIES, policy, MODEL)
    name = evaluators.start(
        SPROUT_EVALUATOR_MIN_SAMPLES="90",
        SPROUT_EVALUATOR_PROMPT_GROUPS="task",
        SPROUT_EVALUATOR_MAX_CARBON_SHARE="null",
    )
    async with reading(kafka, QUALITY) as found:
        await found.read(until=1)
        assert (qualities(found)[0].prompts, qualities(found)[0].skipped) == (90, 0)
        await producer.post(CARBON_INTENSITY, intensities(CLOCK.now(), 400, 420, 300, 200, 100, 130, hours=0.01), ZONE)
        await found.read(until=2)
        second = qualities(found)[1]
        assert (second.trigger, second.prompts, second.skipped) == ("local_minimum", 36, 54)
        assert second.skipped_by_group == {"qa": 54}
        trials = {one.group: one.trials for one in second.counts if one.option == "p/L0"}
        assert trials == pytest.approx({"qa": 6.0, "code": 30.0})
        kept = await stored(database, "SELECT prompt_group, weight FROM evaluator.judged WHERE weight > 1")
        assert {(row["prompt_group"], row["weight"]) for row in kept} == {("qa", 10.0)}
        # Prompts that were passed over give way to new ones like those that were judged.
        (used,) = await stored(
            database, "SELECT min(evaluations) AS least, max(evaluations) AS most FROM evaluator.reservoir"
        )
        assert (used["least"], used["most"]) == (2, 2)
        skipped = f'sprout_evaluator_skipped_prompts_total{{model="{MODEL}"}} 54.0'
        await until_page(f"{evaluators.url(name)}/metrics", lambda text: skipped in text)
        await ask_for_evaluation(evaluators.url(name))
        await found.read(until=3)
        assert (qualities(found)[2].prompts, qualities(found)[2].skipped) == (90, 0)


async def test_prompt_groups_are_learned_from_judged_prompts_and_withdrawn_when_disabled(
    kafka, database, evaluators, producer
):
    await send_samples(producer, range(KINDS), text=of_a_kind)
    few = {
        "SPROUT_EVALUATOR_MIN_JUDGED_TO_LEARN": "100",
        "SPROUT_EVALUATOR_RELEARN_GROWTH": "9",
        "SPROUT_EVALUATOR_SAMPLES_PER_GROUP": str(KINDS),
    }
    name = evaluators.start(
        **few, SPROUT_EVALUATOR_MIN_SAMPLES=str(KINDS), SPROUT_EVALUATOR_PROMPTS_PER_EVALUATION=str(KINDS)
    )
    async with reading(kafka, PROMPT_GROUPS) as learned, reading(kafka, QUALITY) as found:
        await found.read(until=1)
        await learned.read(until=1)
        (first,) = qualities(found)
        assert {one.group for one in first.counts} == {"qa"}  # counted before groups were learned
        made = PromptGrouping.model_validate_json(learned.records[0].value)
        assert learned.records[0].key == MODEL.encode()
        questions, sums = ({unpack(made).assign(of_a_kind(n)) for n in range(first, 20, 2)} for first in (0, 1))
        assert questions != sums
        (evidence,) = made.evidence
        judged = first.prompts - first.abstentions
        assert made.prompts == judged
        assert sum(one.trials for one in evidence.counts if one.option == "p/L0") == judged
        assert evidence.evaluated_at == first.evaluated_at
        kept = await stored(database, "SELECT answers::text AS answers, prompt_group FROM evaluator.judged")
        assert len(kept) == judged
        assert {row["prompt_group"] for row in kept} <= set(made.names)
        assert not any("word" in row["answers"] for row in kept)

        await ask_for_evaluation(evaluators.url(name))
        await found.read(until=2)
        assert {one.group for one in qualities(found)[1].counts} <= set(made.names)
        evaluators.supervisor.stop(name)
        # Another process uses the stored groups; one without learned groups withdraws them.
        again = evaluators.start(**few)
        await ask_for_evaluation(evaluators.url(again))
        await found.read(until=3)
        assert {one.group for one in qualities(found)[2].counts} <= set(made.names)
        evaluators.supervisor.stop(again)
        evaluators.start(SPROUT_EVALUATOR_PROMPT_GROUPS="task")
        await learned.read(until=2)
        withdrawn = PromptGrouping.model_validate_json(learned.records[1].value)
        assert withdrawn.version is None
        assert withdrawn.learned_at > made.learned_at


async def test_an_evaluation_interrupted_by_a_kill_is_repeated(kafka, database, evaluators, producer):
    await send_samples(producer, range(60))
    name = evaluators.start(SPROUT_EVALUATOR_CONCURRENCY="1", SPROUT_EVALUATOR_MIN_SAMPLES="60", **QUICK)
    async with reading(kafka, USAGE) as used, reading(kafka, QUALITY) as found:
        await used.read(until=5)
        evaluators.supervisor.kill(name)
        evaluators.start()
        await found.read(until=1)
        (quality,) = qualities(found)
        assert (quality.trigger, quality.prompts) == ("first", 60)
        rows = await stored(database, "SELECT status, published FROM evaluator.evaluations ORDER BY status")
        assert sorted(row["status"] for row in rows) == ["finished", "interrupted"]
        records = [UsageRecord.model_validate_json(record.value) for record in await used.read(settle_s=0.3)]
        # The calls of the interrupted evaluation are published too.
        assert len({record.evaluation_id for record in records}) == 2
    kept = await stored(database, "SELECT count(*) AS n, sum(evaluations) AS used FROM evaluator.reservoir")
    assert (kept[0]["n"], kept[0]["used"]) == (60, 60)


@pytest.mark.extended
async def test_a_frozen_leader_is_replaced_and_publishes_nothing_when_it_wakes(kafka, database, evaluators, producer):
    await send_samples(producer, range(60))
    names = [evaluators.start(SPROUT_EVALUATOR_CONCURRENCY="1", **QUICK) for _ in range(2)]
    async with reading(kafka, USAGE) as used, reading(kafka, QUALITY) as found:
        await used.read(until=5)
        frozen = await leader(evaluators.supervisor, names)
        (standby,) = set(names) - {frozen}
        evaluators.supervisor.process(frozen).signal(signal.SIGSTOP)
        try:
            assert await leader(evaluators.supervisor, [standby]) == standby
            await used.read(until=10)
        finally:
            evaluators.supervisor.process(frozen).signal(signal.SIGCONT)
        await found.read(until=1)
        await found.read(settle_s=0.5)
        (quality,) = qualities(found)
        assert quality.prompts == 60
        rows = await stored(database, "SELECT status FROM evaluator.evaluations")
        assert Counter(row["status"] for row in rows)["finished"] == 1
    kept = await stored(database, "SELECT sum(evaluations) AS used FROM evaluator.reservoir")
    assert kept[0]["used"] == 60


async def test_it_waits_while_postgresql_is_unavailable_and_then_continues(
    kafka, database, evaluators, producer, supervisor
):
    # The evaluation is due once all samples are stored, in however many batches they arrive.
    name = evaluators.start(SPROUT_EVALUATOR_MIN_SAMPLES="40")
    spec = supervisor.process("postgres").spec
    supervisor.stop("postgres")
    try:
        await send_samples(producer, range(40))
        url = f"{evaluators.url(name)}/ready"
        await wait_until_ready_is(url, 503, mentions="PostgreSQL")
    finally:
        # Spawned here: a process ends with the thread that started it.
        await asyncio.to_thread(supervisor.spawn(spec).wait_ready)
    await wait_until_ready_is(url, 200)
    async with reading(kafka, QUALITY) as found:
        await found.read(until=1, timeout_s=DEADLINE_S)
        assert qualities(found)[0].prompts == 40
    assert supervisor.process(name).alive


async def test_a_request_is_accepted_only_with_the_token_and_by_the_leader(kafka, evaluators, producer):
    await send_samples(producer, range(40))
    names = [evaluators.start() for _ in range(2)]
    leading = await leader(evaluators.supervisor, names)
    (standby,) = set(names) - {leading}
    url = evaluators.url(leading)
    async with reading(kafka, QUALITY) as found:
        await found.read(until=1)
        assert (await request_evaluation(url, token="wrong"))[0] == 401
        status, body = await request_evaluation(evaluators.url(standby))
        assert (status, "stands by" in body) == (409, True)
        await ask_for_evaluation(url)
        await found.read(until=2)
        assert [one.trigger for one in qualities(found)] == ["first", "requested"]
