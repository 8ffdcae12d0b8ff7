"""From judged prompts to the counts that are published.

A verdict says, for one prompt and one metric, how far each contestant succeeded. `preference` makes the verdicts of the
judge's choice; whatever else judges answers makes those of another metric, and `tally` counts them all alike.
"""

from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from typing import Final

from services.evaluator.judged import JudgedPrompt
from services.evaluator.plan import Contestant
from shared.messages import QualityCount

PREFERENCE: Final = "preference"


def preference(among: Sequence[Contestant], winners: Collection[Contestant]) -> list[float]:
    """Success by contestant: the best answer's share one success; more than one where they gave the same answer."""
    return [1.0 / len(winners) if one in winners else 0.0 for one in among]


def tally(judged: Iterable[tuple[str, JudgedPrompt]]) -> tuple[QualityCount, ...]:
    """Counts by group, option and metric; a prompt is a trial of every option that it was answered under.

    Args:
        judged: prompts, each with the group to count it in.
    """
    successes: dict[tuple[str, str, str], float] = defaultdict(float)
    shared: dict[tuple[str, str, str], float] = defaultdict(float)
    trials: dict[tuple[str, str, str], int] = defaultdict(int)
    for group, prompt in judged:
        of_reference = prompt.answers[0].successes
        for answer in prompt.answers:
            for metric, success in answer.successes.items():
                for option in answer.options:
                    key = (metric, group, option)
                    successes[key] += success
                    shared[key] += success * of_reference.get(metric, 0.0)
                    trials[key] += 1
    return tuple(
        QualityCount(
            group=group,
            option=option,
            metric=metric,
            successes=successes[key],
            trials=number,
            with_reference=shared[key],
        )
        for key, number in sorted(trials.items())
        for metric, group, option in (key,)
    )
