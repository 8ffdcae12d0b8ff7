"""When prompt groups are learned from judged prompts, and how verdicts are re-aggregated by them."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import timedelta

import numpy as np
import pytest

from services.evaluator.cost import Energy
from services.evaluator.group_store import LearningProgress
from services.evaluator.learning import GroupLearner, learning_due
from services.evaluator.quality import JudgedAnswer, JudgedPrompt, hash_of
from services.evaluator.settings import EvaluatorSettings
from services.evaluator.training import TooFewPromptsError, TrainingSet
from shared.grouping import unpack
from shared.messages import ChatMessage, PromptGrouping
from tests.support.grouping import NOW, judged_kinds, learned_grouping, question, sum_of

SETTINGS = EvaluatorSettings(min_judged_to_learn=600, relearn_growth=0.5, max_judged_to_learn=3_000)
LEVELS = ("L0", "L1")
DIRECTIVES = {"L0": "0" * 16, "L1": "1" * 16}
ENERGY = {("evaluation", "p"): Energy(joules=600.0, tokens=100)}


@pytest.fixture(scope="module")
def learned():
    return learned_grouping("m", judged_kinds(400, seed=1), traffic={"question": 30.0, "sum": 10.0}, energy=ENERGY)


@pytest.mark.parametrize(
    ("judged", "unused", "learned_from", "expected"),
    [
        (599, 599, None, False),
        (600, 600, None, True),
        (800, 200, 600, False),
        (900, 300, 600, True),
        (9_000, 1_499, 9_000, False),  # of more than can be learned from, only these count
        (9_000, 1_500, 9_000, True),
    ],
)
def test_groups_are_learned_from_enough_verdicts_and_again_once_enough_are_new(judged, unused, learned_from, expected):
    assert learning_due(SETTINGS, judged=judged, unused=unused, learned_from=learned_from) is expected


def test_prompts_answered_at_other_levels_are_left_out():
    prompts = judged_kinds(4, seed=2)
    assert TrainingSet.select(prompts, LEVELS, minimum=4).prompts == prompts
    with pytest.raises(TooFewPromptsError, match="0 different prompts were judged at levels L0, L1, L2, 4 are needed"):
        TrainingSet.select(prompts, ("L0", "L1", "L2"), minimum=4)


def test_the_groups_separate_the_kinds_of_prompts_that_were_not_judged(learned):
    groups = unpack(learned.message)
    rng = np.random.default_rng(7)
    questions = Counter(groups.assign(question(rng)) for _ in range(100))
    sums = Counter(groups.assign(sum_of(rng)) for _ in range(100))
    for name in groups.names:
        of_both = questions[name] + sums[name]
        assert min(questions[name], sums[name]) <= 0.02 * of_both


def test_a_single_group_is_not_published():
    with pytest.raises(TooFewPromptsError, match="60 judged prompts do not form two groups"):
        learned_grouping("m", judged_kinds(60, seed=3))


def test_every_verdict_is_counted_once_on_its_day(learned):
    assert [one.evaluated_at.day for one in learned.message.evidence] == [9, 10]
    for one in learned.message.evidence:
        assert sum(count.trials for count in one.counts if count.option == "p/L0") == 200
        assert sum(count.successes for count in one.counts) == pytest.approx(200)
        assert {count.group for count in one.counts} <= set(learned.message.names)


def test_of_a_prompt_that_was_judged_again_one_verdict_is_learned_from():
    """Verdicts on the same prompt count in its group, in which a model without any of them puts it."""
    once = [replace(one, prompt_hash=f"{place:012x}") for place, one in enumerate(judged_kinds(200, seed=1))]
    again = [replace(one, id=f"again-{one.id}", evaluated_at=NOW) for one in once[:100]]
    judged = TrainingSet.select([*once, *again], LEVELS, minimum=200)
    newest = judged.newest_of_each_prompt(150).prompts
    assert [one.id for one in newest] == [one.id for one in (*once[150:], *again)]
    learned = learned_grouping("m", judged.prompts)
    assert learned.message.prompts == 200
    assert all(learned.group_of[one.id] == learned.group_of[f"again-{one.id}"] for one in once[:100])
    hashes = Counter(name for one in learned.message.evidence for row in one.prompt_hashes.values() for name in row)
    assert Counter(hashes.values()) == {1: 100, 2: 100}
    with pytest.raises(TooFewPromptsError, match="200 different prompts were judged at levels L0, L1, 201 are needed"):
        TrainingSet.select(judged.prompts, LEVELS, minimum=201)


def test_a_hash_recognises_a_conversation_and_needs_the_key():
    def conversation(*texts: str) -> tuple[ChatMessage, ...]:
        return tuple(ChatMessage(role="user", content=text) for text in texts)

    assert hash_of(conversation("Why?"), b"key") == hash_of(conversation("Why?"), b"key")
    others = [(conversation("Why?"), b"other"), (conversation("Who?"), b"key"), (conversation("Wh", "y?"), b"key")]
    assert all(hash_of(*one) != hash_of(conversation("Why?"), b"key") for one in others)
    # JSON can carry lone surrogates.
    assert len(hash_of(conversation("\ud800"), b"")) == 12


def test_traffic_shares_are_those_of_the_strata(learned):
    kinds = {prompt.id: prompt.stratum for prompt in judged_kinds(400, seed=1)}
    by_kind = {"question": 0.0, "sum": 0.0}
    judged = {"question": 200, "sum": 200}
    for name, share in learned.message.traffic.items():
        members = [kinds[request] for request, group in learned.group_of.items() if group == name]
        total = sum({"question": 3, "sum": 1}[kind] / judged[kind] for kind in members)
        assert share == pytest.approx(total / 4)
        for kind in by_kind:
            by_kind[kind] += {"question": 0.75, "sum": 0.25}[kind] * members.count(kind) / judged[kind]
    assert sum(learned.message.traffic.values()) == pytest.approx(1.0)
    assert by_kind == pytest.approx({"question": 0.75, "sum": 0.25})


def test_energy_time_and_tokens_of_the_judged_answers_are_published_where_energy_is_known(learned):
    taken = learned.message.taken
    assert sum(one.requests for one in taken if one.option == "p/L1") == 400
    joules = sum(one.energy_kwh for one in taken if one.option == "p/L0") * 3.6e6
    assert joules == pytest.approx(400 * 80 * 6.0)
    assert sum(one.completion_tokens for one in taken if one.option == "p/L0") == 400 * 80
    assert learned_grouping("m", judged_kinds(400, seed=1)).message.taken == ()


def test_the_message_survives_serialisation(learned):
    received = PromptGrouping.model_validate_json(learned.message.model_dump_json())
    assert received == learned.message
    rng = np.random.default_rng(8)
    prompts = [question(rng) for _ in range(50)] + [sum_of(rng) for _ in range(50)]
    before, after = unpack(learned.message), unpack(received)
    assert [after.assign(one) for one in prompts] == [before.assign(one) for one in prompts]
    assert len(learned.message.model_dump_json()) < 1_000_000


def test_answers_survive_storage():
    answer = JudgedAnswer("L1", ("p/L1", "q/L1"), "q/L1", 30, 0.5, {"preference": 1.0})
    assert JudgedAnswer.from_json(answer.to_json()) == answer
    assert answer.to_json() == {
        "level": "L1", "options": ["p/L1", "q/L1"], "asked": "q/L1", "tokens": 30, "seconds": 0.5,
        "successes": {"preference": 1.0},
    }  # fmt: skip


JUDGED = judged_kinds(200, seed=1)


class FakeGroupStore:
    """A store with a version that was learned from all judged prompts."""

    def __init__(self, grouping: PromptGrouping) -> None:
        self.current = grouping

    async def progress(self, model: str) -> LearningProgress:
        return LearningProgress(judged=len(JUDGED), unused=0, learned_from=self.current.prompts)

    async def judged_prompts(self, model: str, *, limit: int) -> Sequence[JudgedPrompt]:
        return JUDGED

    async def version(self, model: str) -> str | None:
        return self.current.version

    async def grouping(self, model: str) -> PromptGrouping:
        return self.current

    async def save(self, grouping: PromptGrouping, group_of: Mapping[str, str]) -> None:
        self.current = grouping


@pytest.mark.parametrize(
    ("changes", "learns"),
    [
        ({}, False),
        ({"directives": DIRECTIVES}, False),
        ({"classifier": 1}, True),
        ({"directives": {**DIRECTIVES, "L1": "f" * 16}}, True),
    ],
)
async def test_a_version_of_another_release_or_of_other_texts_is_replaced_without_waiting(changes, learns):
    known = learned_grouping("m", JUDGED).message
    store = FakeGroupStore(known.model_copy(update=changes))
    learner = GroupLearner(store, EvaluatorSettings(min_judged_to_learn=100), directives=DIRECTIVES)
    found = await learner.learn_if_due("m", traffic={}, energy={}, now=NOW + timedelta(hours=1))
    assert (found is not None) is learns
    assert store.current.classifier == 2
    assert found is None or found.directives == DIRECTIVES


async def test_without_learned_groups_a_published_version_is_withdrawn():
    store = FakeGroupStore(learned_grouping("m", JUDGED).message)
    later = NOW + timedelta(hours=1)
    await GroupLearner(store, EvaluatorSettings(), directives=DIRECTIVES).withdraw_if_disabled(["m"], later)
    assert store.current.version is not None
    await GroupLearner(store, EvaluatorSettings(prompt_groups="task"), directives=DIRECTIVES).withdraw_if_disabled(
        ["m"], later
    )
    assert (store.current.version, store.current.learned_at) == (None, later)


def test_every_verdict_counts_whatever_the_groups_are_learned_from():
    prompts = judged_kinds(400, seed=3)
    learned = learned_grouping("m", prompts, learn_from=200)
    counted = sum(
        count.trials
        for evidence in learned.message.evidence
        for count in evidence.counts
        if count.option == prompts[0].answers[0].options[0]
    )
    assert counted == len(prompts) == learned.message.prompts == len(learned.group_of)
    # An earlier verdict, which nothing was learned from, counts in the group that a request like it gets.
    groups = unpack(learned.message)
    assert all(learned.group_of[one.id] == groups.assign_features(one.features) for one in prompts[:200])
    assert learned.message.version == learned_grouping("m", prompts[200:]).message.version
