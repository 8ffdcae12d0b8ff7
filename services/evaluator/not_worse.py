"""The metric `not_worse`: whether an answer is at least as good as the reference option's.

Every answer is compared with the reference option's alone, in both orders. If both votes name the reference option's
answer, the other one is worse; a tie counts as not worse. So an option's quality does not depend on which other options
there are, as its share of an n-way choice does (docs/decisions/0044-not-worse.md).
"""

import asyncio
from collections.abc import Callable, Sequence
from typing import Final

from services.evaluator.cost import CallContext
from services.evaluator.generate import all_or_first_error
from services.evaluator.preference import PreferenceMetric
from shared.messages import Sample

NOT_WORSE: Final = "not_worse"


class NotWorseMetric:
    """Which answers are not worse than the reference option's; see `QualityMetric`."""

    name: Final = NOT_WORSE

    def __init__(self, preference: PreferenceMetric, *, asks_judge: Callable[[str], bool]) -> None:
        """Create.

        Args:
            preference: compares two answers.
            asks_judge: whether the judge may be asked about a model's answers; if not, the metric is undefined.
        """
        self._preference = preference
        self._asks_judge = asks_judge

    async def score(self, sample: Sample, answers: Sequence[str], context: CallContext) -> list[float] | None:
        """1 for an answer that is not worse, 0 for a worse one; the reference option's is the first, and has 1.

        None if one of the comparisons has no verdict.

        Raises:
            JudgeError: a vote failed.
        """
        if not self._asks_judge(context.model):
            return None
        reference = answers[0]
        others = list(dict.fromkeys(answers[1:]))
        replies = await asyncio.gather(
            *(self._preference.score(sample, (reference, one), context) for one in others), return_exceptions=True
        )
        outcomes = {reference: 1.0}
        for answer, shares in zip(others, all_or_first_error(replies), strict=True):
            if shares is None:
                return None
            outcomes[answer] = float(shares[1] >= shares[0])
        return [outcomes[answer] for answer in answers]
