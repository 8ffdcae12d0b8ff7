"""From judged prompts to the counts that are published.

A verdict says, for one prompt and one metric, how far each contestant succeeded. `preference` makes the verdicts of the
judge's choice; whatever else judges answers makes those of another metric, and `tally` counts them all alike.
"""

from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from typing import Final, NamedTuple

from services.evaluator.judged import JudgedPrompt
from services.evaluator.plan import Contestant
from shared.messages import Paired, QualityCount

PREFERENCE: Final = "preference"


def preference(among: Sequence[Contestant], winners: Collection[Contestant]) -> list[float]:
    """Success by contestant: the best answer's share one success; more than one where they gave the same answer."""
    return [1.0 / len(winners) if one in winners else 0.0 for one in among]


def tally(judged: Iterable[tuple[str, JudgedPrompt]]) -> tuple[QualityCount, ...]:
    """Counts by group, option and metric; a prompt is a trial of every option that it was answered under.

    Args:
        judged: prompts, each with the group to count it in.
    """
    outcomes: dict[tuple[str, str, str], list[_Outcome]] = defaultdict(list)
    for group, prompt in judged:
        reference = prompt.answers[0]
        for answer in prompt.answers:
            for metric, success in answer.successes.items():
                one = _Outcome(success, reference.options[0], reference.successes.get(metric))
                for option in answer.options:
                    outcomes[metric, group, option].append(one)
    return tuple(
        QualityCount(
            group=group,
            option=option,
            metric=metric,
            successes=sum(one.success for one in found),
            trials=len(found),
            paired=_paired(found),
        )
        for (metric, group, option), found in sorted(outcomes.items())
    )


class _Outcome(NamedTuple):
    success: float
    reference: str
    of_reference: float | None


def _paired(outcomes: Sequence[_Outcome]) -> Paired | None:
    """Null where the metric was not told of every answer of the reference, or the reference changed meanwhile."""
    known = [(one.success, one.of_reference) for one in outcomes if one.of_reference is not None]
    references = {one.reference for one in outcomes}
    if len(known) < len(outcomes) or len(references) > 1:
        return None
    return Paired(
        reference=references.pop(),
        successes=sum(theirs for _, theirs in known),
        both=sum(min(success, theirs) for success, theirs in known),
    )
