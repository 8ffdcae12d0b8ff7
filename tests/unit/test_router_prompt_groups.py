"""The prompt group of a request: by the version that the policy names, otherwise by its task label."""

from datetime import timedelta
from functools import cache

import numpy as np
import pytest

from services.router.policy import PromptGroupCache
from shared.grouping import GroupingError, unpack
from shared.messages import GenerationRequest, PromptGrouping
from tests.support.grouping import NOW, judged_kinds, learned_grouping, question, sum_of
from tests.support.router import MODEL, policy, request

RNG = np.random.default_rng(3)


@cache
def learned(seed: int) -> PromptGrouping:
    return learned_grouping(MODEL, judged_kinds(200, seed=seed)).message


def grouping(seed: int = 1, *, hours: float = 0.0) -> PromptGrouping:
    return learned(seed).model_copy(update={"learned_at": NOW + timedelta(hours=hours)})


def known(*groupings: PromptGrouping) -> PromptGroupCache:
    groups = PromptGroupCache()
    for one in groupings:
        groups.update(one)
    return groups


def by(version: str | None, **rows):
    made = policy({"L0": 0.5, "L1": 0.5})
    return made.model_copy(update={"group_version": version, "groups": {**made.groups, **rows}})


def asking(text: str, *, task: str | None = None) -> GenerationRequest:
    return GenerationRequest(id="r", model=MODEL, prompt=text, task=task)


def test_without_a_version_the_group_is_the_task_or_the_default():
    groups = known(grouping())
    assert groups.assign(request(1, task="maths"), model=MODEL, policy=by(None)).group == "maths"
    assert groups.assign(request(1), model=MODEL, policy=by(None)).group == "default"


def test_with_a_version_only_the_prompt_decides():
    made = grouping()
    text = sum_of(RNG)
    name = unpack(made).assign(text)
    following = by(made.version, **{name: {"p/L0": 1.0}})
    for task in (None, "maths"):
        found = known(made).assign(asking(text, task=task), model=MODEL, policy=following)
        assert (found.group, found.probabilities, found.unknown_version) == (name, {"p/L0": 1.0}, False)
    questions = [known(made).assign(asking(question(RNG)), model=MODEL, policy=following) for _ in range(20)]
    others = [found for found in questions if found.group != name]
    assert len(others) > 10
    assert all(found.group in made.names and found.probabilities == following.overall for found in others)


def test_a_known_task_label_takes_part_in_the_decision():
    made = grouping()
    assert made.task_scores.keys() == {"question", "sum"}
    text = question(RNG)
    found = [
        known(made).assign(asking(text, task=task), model=MODEL, policy=by(made.version)).group
        for task in ("question", "sum")
    ]
    assert found[0] != found[1]
    assert unpack(made).assign(text, "question") == found[0]


def test_groups_of_an_earlier_release_ignore_task_labels():
    text, made = question(RNG), grouping()
    document = made.model_dump(mode="json")
    del document["task_scores"]
    older = unpack(PromptGrouping.model_validate(document))
    assert older.assign(text, "sum") == older.assign(text) == unpack(made).assign(text)


def test_task_scores_of_other_groups_are_rejected():
    damaged = grouping().model_copy(update={"task_scores": {"sum": (1.0,)}})
    with pytest.raises(GroupingError, match="a task has not one score for each of the"):
        unpack(damaged)


def test_an_unknown_version_leads_to_the_overall_probabilities():
    made = grouping()
    following = by("another", qa={"p/L0": 1.0})
    found = known(made).assign(asking("Why?", task="qa"), model=MODEL, policy=following)
    assert (found.group, found.probabilities, found.unknown_version) == ("qa", following.overall, True)


def test_without_a_policy_the_newest_groups_are_used():
    made = grouping()
    found = known(made).assign(asking(sum_of(RNG)), model=MODEL, policy=None)
    assert found.probabilities is None
    assert found.group in made.names
    assert PromptGroupCache().assign(asking("Why?", task="qa"), model=MODEL, policy=None).group == "qa"


def test_earlier_versions_are_kept_for_policies_that_still_name_them():
    first, second = grouping(1), grouping(2, hours=1)
    groups = known(first, second)
    for made in (first, second):
        assert groups.assign(asking("Why?"), model=MODEL, policy=by(made.version)).group in made.names
    assert not groups.update(first)  # older than the newest one
    many = known(*(grouping(seed, hours=seed) for seed in range(5)))
    assert many.assign(asking("Why?"), model=MODEL, policy=by(grouping(0).version)).unknown_version


def test_withdrawn_groups_are_not_used():
    made = grouping()
    groups = known(made, PromptGrouping(model=MODEL, version=None, learned_at=NOW + timedelta(hours=1)))
    assert groups.assign(asking("Why?", task="qa"), model=MODEL, policy=None).group == "qa"


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"features": 99}, "features version 99"),
        ({"arrays": {}}, "no array 'telling'"),
        ({"classifier": 1}, "classifier version 1, this release uses 2"),
        ({"names": ("a.00",)}, "array 'weights' has shape"),
    ],
)
def test_unusable_groups_are_rejected_with_the_reason(change, why):
    damaged = grouping().model_copy(update=change)
    with pytest.raises(GroupingError, match=why):
        unpack(damaged)
    groups = PromptGroupCache()
    with pytest.raises(GroupingError, match=why):
        groups.update(damaged)
    assert groups.assign(asking("Why?", task="qa"), model=MODEL, policy=by(damaged.version)).unknown_version


def test_damaged_arrays_are_rejected():
    made = grouping()
    weights = made.arrays["weights"]
    for packed, why in (
        (weights.model_copy(update={"data": "%%%"}), "'weights' is damaged"),
        (weights.model_copy(update={"data": made.arrays["intercept"].data}), "does not have the size of its shape"),
        (weights.model_copy(update={"shape": (3, 4)}), "'weights' has shape"),
        (weights.model_copy(update={"shape": (1 << 40,)}), "'weights' has shape"),
        (made.arrays["intercept"], "'weights' has shape"),
    ):
        with pytest.raises(GroupingError, match=why):
            unpack(made.model_copy(update={"arrays": made.arrays | {"weights": packed}}))
