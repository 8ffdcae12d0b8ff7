"""When prompt groups are learned from judged prompts, and how what was judged is restated by them."""

from collections import Counter

import numpy as np
import pytest

from services.evaluator.grouping import TooFewPromptsError
from services.evaluator.judged import JudgedAnswer, Looks
from services.evaluator.learning import LearningRules, comparable, learn, learning_due
from services.evaluator.spending import Energy
from shared.grouping import feature_count, features, unpack
from shared.messages import PromptGrouping
from tests.support.grouping import NOW, judged_kinds, question, sum_of

RULES = LearningRules(least=600, growth=0.5, most=3_000)
LEVELS = ("L0", "L1")
BOOK = {("evaluation", "p"): Energy(joules=600.0, tokens=100)}


def lesson(prompts=None, *, traffic=None, book=None):
    return learn(
        "m",
        prompts or judged_kinds(400, seed=1),
        levels=LEVELS,
        traffic={"question": 30.0, "sum": 10.0} if traffic is None else traffic,
        book=BOOK if book is None else book,
        learned_at=NOW,
    )


@pytest.mark.parametrize(
    ("judged", "fresh", "learned_from", "expected"),
    [
        (599, 599, None, False),
        (600, 600, None, True),
        (800, 200, 600, False),
        (900, 300, 600, True),
        (9_000, 1_499, 9_000, False),  # of more than can be learned from, only these count
        (9_000, 1_500, 9_000, True),
    ],
)
def test_groups_are_learned_from_enough_verdicts_and_again_once_enough_are_new(judged, fresh, learned_from, expected):
    assert learning_due(RULES, judged=judged, fresh=fresh, learned_from=learned_from) is expected


def test_prompts_answered_at_other_levels_are_left_out():
    prompts = judged_kinds(4, seed=2)
    assert comparable(prompts, LEVELS, least=4) == prompts
    with pytest.raises(TooFewPromptsError, match="0 prompts were judged at levels L0, L1, L2, 4 are needed"):
        comparable(prompts, ("L0", "L1", "L2"), least=4)


def test_the_groups_tell_the_kinds_apart_for_prompts_that_were_not_judged():
    groups = unpack(lesson().grouping)
    rng = np.random.default_rng(7)
    questions = Counter(groups.assign(question(rng)) for _ in range(100))
    sums = Counter(groups.assign(sum_of(rng)) for _ in range(100))
    for name in groups.names:
        of_both = questions[name] + sums[name]
        assert min(questions[name], sums[name]) <= 0.02 * of_both


def test_one_group_for_all_is_no_lesson():
    with pytest.raises(TooFewPromptsError, match="60 judged prompts do not tell two groups apart"):
        lesson(judged_kinds(60, seed=3))


def test_every_verdict_is_counted_once_on_its_day():
    grouping = lesson().grouping
    assert [one.evaluated_at.day for one in grouping.evidence] == [9, 10]
    for one in grouping.evidence:
        assert sum(count.trials for count in one.counts if count.option == "p/L0") == 200
        assert sum(count.successes for count in one.counts) == pytest.approx(200)
        assert {count.group for count in one.counts} <= set(grouping.names)


def test_traffic_is_weighted_back_to_what_is_asked():
    learned = lesson()
    kinds = {prompt.request_id: prompt.stratum for prompt in judged_kinds(400, seed=1)}
    by_kind = {"question": 0.0, "sum": 0.0}
    judged = {"question": 200, "sum": 200}
    for name, share in learned.grouping.traffic.items():
        members = [kinds[request] for request, group in learned.groups.items() if group == name]
        whole = sum({"question": 3, "sum": 1}[kind] / judged[kind] for kind in members)
        assert share == pytest.approx(whole / 4)
        for kind in by_kind:
            by_kind[kind] += {"question": 0.75, "sum": 0.25}[kind] * members.count(kind) / judged[kind]
    assert sum(learned.grouping.traffic.values()) == pytest.approx(1.0)
    assert by_kind == pytest.approx({"question": 0.75, "sum": 0.25})


def test_what_the_judged_answers_took_is_told_where_it_is_known():
    taken = lesson().grouping.taken
    assert sum(one.requests for one in taken if one.option == "p/L1") == 400
    joules = sum(one.energy_kwh for one in taken if one.option == "p/L0") * 3.6e6
    assert joules == pytest.approx(400 * 80 * 6.0)
    assert lesson(book={}).grouping.taken == ()


def test_the_message_says_the_same_after_its_journey():
    grouping = lesson().grouping
    arrived = PromptGrouping.model_validate_json(grouping.model_dump_json())
    assert arrived == grouping
    rng = np.random.default_rng(8)
    prompts = [question(rng) for _ in range(50)] + [sum_of(rng) for _ in range(50)]
    assert [unpack(arrived).assign(one) for one in prompts] == [unpack(grouping).assign(one) for one in prompts]
    assert len(grouping.model_dump_json()) < 1_000_000


def test_looks_and_answers_come_back_from_storage_as_they_were():
    text = "How many of the 12 apples remain?"
    row = np.zeros(feature_count(), dtype=np.float32)
    Looks.from_bytes(Looks.of(text).to_bytes()).fill(row)
    assert np.array_equal(row, features(text))
    answer = JudgedAnswer("L1", ("p/L1", "q/L1"), "q/L1", 30, 0.5, {"preference": 1.0})
    assert JudgedAnswer.from_document(answer.document()) == answer
