"""Which groups are in force in the evaluator, and when it learns others."""

from collections.abc import Mapping, Sequence
from datetime import timedelta

import pytest

from services.evaluator.group_storage import Progress
from services.evaluator.groups import Groups
from services.evaluator.judged import JudgedPrompt
from services.evaluator.learning import LearningRules, learn
from shared.messages import PromptGrouping
from tests.support.grouping import NOW, judged_kinds

LEVELS = ("L0", "L1")
RULES = LearningRules(least=100, growth=0.5, most=3_000)
JUDGED = judged_kinds(200, seed=1)


class Kept:
    """A database in which a version is in force that was learned from all that was judged."""

    def __init__(self, grouping: PromptGrouping) -> None:
        self.in_force = grouping

    async def progress(self, model: str) -> Progress:
        return Progress(judged=len(JUDGED), fresh=0, learned_from=self.in_force.prompts)

    async def judged(self, model: str, *, most: int) -> Sequence[JudgedPrompt]:
        return JUDGED

    async def version(self, model: str) -> str | None:
        return self.in_force.version

    async def grouping(self, model: str) -> PromptGrouping:
        return self.in_force

    async def keep(self, grouping: PromptGrouping, groups: Mapping[str, str]) -> None:
        self.in_force = grouping


@pytest.mark.parametrize(("classifier", "anew"), [(2, False), (1, True)])
async def test_a_version_of_another_release_is_replaced_without_waiting_for_new_verdicts(classifier, anew):
    known = learn("m", JUDGED, levels=LEVELS, traffic={}, book={}, learned_at=NOW).grouping
    kept = Kept(known.model_copy(update={"classifier": classifier}))
    groups = Groups(kept, rules=RULES, levels=LEVELS)
    learned = await groups.learn("m", traffic={}, book={}, now=NOW + timedelta(hours=1))
    assert (learned is not None) is anew
    assert kept.in_force.classifier == 2
