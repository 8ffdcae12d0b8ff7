"""From findings on single prompts to the counts that are published.

A finding says, for one prompt and one metric, how far each contestant succeeded. `preference` makes the findings of the
judge's verdicts; whatever else judges answers makes findings of another metric, and `tally` counts them all alike.
"""

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from services.evaluator.plan import Contestant
from shared.messages import QualityCount

PREFERENCE: Final = "preference"


@dataclass(frozen=True, slots=True)
class Finding:
    """One prompt's outcome under one metric.

    Attributes:
        successes: by contestant, in [0, 1].
    """

    group: str
    metric: str
    successes: Mapping[Contestant, float]


def preference(group: str, among: Sequence[Contestant], winners: Collection[Contestant]) -> Finding:
    """The best answer's contestants share one success; more than one where they gave the same answer."""
    share = 1.0 / len(winners)
    return Finding(group, PREFERENCE, {one: share if one in winners else 0.0 for one in among})


def tally(findings: Iterable[Finding]) -> tuple[QualityCount, ...]:
    """Counts by group, option and metric; a prompt is a trial of every option that it was answered under."""
    successes: dict[tuple[str, str, str], float] = defaultdict(float)
    trials: dict[tuple[str, str, str], int] = defaultdict(int)
    for finding in findings:
        for contestant, success in finding.successes.items():
            for option in contestant.options:
                key = (finding.metric, finding.group, option)
                successes[key] += success
                trials[key] += 1
    return tuple(
        QualityCount(group=group, option=option, metric=metric, successes=successes[key], trials=number)
        for key, number in sorted(trials.items())
        for metric, group, option in (key,)
    )
