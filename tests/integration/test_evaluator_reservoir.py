"""The reservoir in PostgreSQL: bounded per model however many labels there are, and fair among those that are used."""

from collections import Counter
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from services.evaluator.group_store import GroupStore
from services.evaluator.learning import GroupLearner
from services.evaluator.samples import SampleStore
from services.evaluator.settings import EvaluatorSettings
from services.evaluator.store import EvaluationStore
from shared.messages import PackedArray, PromptGrouping, Sample
from shared.runtime.database import DatabaseStatus, migrate, open_pool
from tests.support.evaluator import judged_answer, judged_prompt, sample
from tests.support.report import quality_at
from tests.support.router import MODEL

pytestmark = pytest.mark.integration

NOW = datetime(2023, 2, 10, 12, tzinfo=UTC)
LABELS = 30_000
LIMIT = 500


@pytest.fixture
async def pool(database):
    pool = await open_pool(database, schema="evaluator")
    await migrate(pool, schema="evaluator", package="services.evaluator.migrations")
    yield pool
    await pool.close()


def samples(first: int, count: int, group: str) -> list[Sample]:
    return [sample(number, group=group, at=NOW) for number in range(first, first + count)]


async def test_a_flood_of_labels_neither_grows_the_reservoir_nor_displaces_groups_that_are_used(pool):
    store = SampleStore(
        pool, DatabaseStatus(), samples_per_group=200, samples_per_model=LIMIT, max_age=timedelta(days=7)
    )
    flood = [sample(number, group=f"label-{number}", at=NOW) for number in range(LABELS)]
    used = [*samples(40_000, 400, "qa"), *samples(41_000, 300, "code"), *samples(42_000, 20, "rare")]
    elsewhere = [one.model_copy(update={"model": "other"}) for one in samples(43_000, 30, "qa")]
    await store.add(elsewhere, now=NOW)
    await store.add(used[:200], now=NOW)
    for start in range(0, LABELS, 1_000):
        await store.add(flood[start : start + 1_000], now=NOW)
        assert await store.count(MODEL) <= LIMIT
    await store.add(used[200:], now=NOW)
    kept = Counter({group: len(ids) for group, ids in (await store.ids_by_group(MODEL)).items()})
    assert kept.total() == LIMIT
    assert (kept["qa"], kept["code"]) == (200, 200)
    assert kept["rare"] >= 19
    assert await store.count("other") == 30
    # The table of the traffic is bounded with the reservoir.
    assert set(await store.traffic(MODEL)) == set(kept)


async def test_a_sample_that_is_deleted_during_an_evaluation_leaves_no_judged_prompt(pool):
    status = DatabaseStatus()
    store = SampleStore(pool, status, samples_per_group=9, samples_per_model=9, max_age=timedelta(days=7))
    evaluations = EvaluationStore(pool, status)
    offered = [one.model_copy(update={"tenant": "desk"}) for one in samples(0, 3, "qa")]
    await store.add(offered, now=NOW)
    await evaluations.start("e1", model=MODEL, reason="first", at=NOW)
    judged = [replace(judged_prompt(one.request_id, answers=[judged_answer("L0")]), tenant="desk") for one in offered]
    await pool.execute("DELETE FROM reservoir WHERE request_id = 'r1'")
    result = quality_at(12).model_copy(update={"model": MODEL, "evaluation_id": "e1"})
    await evaluations.finish(result, evaluated=["r0", "r1", "r2"], judged=judged)
    groups = GroupStore(pool, status, max_judged_age=timedelta(days=60), directives={})
    found = await groups.judged_prompts(MODEL, limit=9)
    assert {(one.request_id, one.tenant) for one in found} == {("r0", "desk"), ("r2", "desk")}


async def test_verdicts_on_other_texts_of_the_directives_do_not_count_until_these_are_back(pool, capsys):
    status = DatabaseStatus()
    store = SampleStore(pool, status, samples_per_group=9, samples_per_model=9, max_age=timedelta(days=7))
    evaluations = EvaluationStore(pool, status)
    offered = samples(0, 3, "qa")
    await store.add(offered, now=NOW)
    old, new = ({"L0": "0" * 16, "L1": text * 16} for text in "ab")

    async def judge(number: int, directives: dict[str, str]) -> None:
        name, prompt = f"e{number}", offered[number].request_id
        await evaluations.start(name, model=MODEL, reason="first", at=NOW + timedelta(hours=number))
        result = quality_at(12).model_copy(
            update={"model": MODEL, "evaluation_id": name, "directives": directives, "evaluated_at": NOW}
        )
        one = judged_prompt(prompt, answers=[judged_answer("L0")], at=NOW + timedelta(hours=number))
        await evaluations.finish(result, evaluated=[prompt], judged=[one])

    async def known(directives: dict[str, str]) -> tuple[set[str], str]:
        """The prompts that count for these texts, and what the evaluator logs when it begins to lead."""
        groups = GroupStore(pool, status, max_judged_age=timedelta(days=60), directives=directives)
        await GroupLearner(groups, EvaluatorSettings(), directives=directives).check_directives([MODEL])
        found = {one.request_id for one in await groups.judged_prompts(MODEL, limit=9)}
        assert (await groups.progress(MODEL)).judged == len(found)
        return found, capsys.readouterr().out

    # By an earlier release, which did not say what was judged: it counts for the texts that the first leader finds.
    await judge(0, {})
    arrays = {"w": PackedArray(dtype="<f4", shape=(0,), data="")}
    version = PromptGrouping(model=MODEL, version="v", learned_at=NOW, names=("v.00",), arrays=arrays)
    groups = GroupStore(pool, status, max_judged_age=timedelta(days=60), directives=old)
    await groups.save(version, {})
    await groups.mark_published(version)
    capsys.readouterr()
    assert await known(old) == ({"r0"}, "")
    assert await groups.unpublished() == [version.model_copy(update={"directives": old})]
    await judge(1, old)
    assert await known({**old, "L2": "c" * 16}) == (set(), "")  # a level that is new has not been judged
    assert await known({"L0": old["L0"]}) == ({"r0", "r1"}, "")
    found, log = await known(new)
    assert found == set()
    assert "the text of directives has changed" in log
    assert "L1" in log
    assert "L0" not in log
    await judge(2, new)
    assert await known(new) == ({"r2"}, "")
    assert (await known(old))[0] == {"r0", "r1"}
