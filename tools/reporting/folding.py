"""Small prompt groups are counted together: clients choose task labels, and each row describes what somebody asked.

A group of a few requests says nothing with certainty, and may say something about a person. The time of a report and
the number of its rows are bounded, however many labels there are.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from shared.messages import Quality, QualityCount
from shared.metering.columns import Texts
from tools.reporting.query import Snapshot

FEWEST_REQUESTS = 10
"""A group with fewer requests has no row of its own, nor is such a label named as a group's main task."""

MOST_GROUPS = 50
"""Groups with a row of their own: those with most requests."""


@dataclass(frozen=True, slots=True)
class FoldedGroups:
    """The groups that are counted together.

    Attributes:
        names: of these groups; empty: every group has its own row.
    """

    names: frozenset[str] = frozenset()

    @property
    def label(self) -> str:
        """The name of their row."""
        return f"other groups ({len(self.names):,})"


def fold_small_groups(snapshot: Snapshot) -> tuple[Snapshot, FoldedGroups]:
    """Count groups with few requests, and all but the largest, as one: their calls and their judged prompts.

    A single small group keeps its name: without another one nothing would be hidden. Learned groups keep theirs too:
    they are few, and no client chooses them.
    """
    requests = Counter[str]()
    for group, count in zip(snapshot.requests.group.tolist(), snapshot.requests.count.tolist(), strict=True):
        requests[group] += count
    every = {*requests, *snapshot.evaluations.group.tolist()}
    by_size = sorted(every, key=lambda group: (-requests[group], group))
    learned = tuple(f"{one.version}." for one in snapshot.groupings)
    kept = {group for group in by_size[:MOST_GROUPS] if requests[group] >= FEWEST_REQUESTS}
    kept |= {group for group in every if group.startswith(learned)}
    folded = FoldedGroups(frozenset(every - kept))
    if len(folded.names) < 2:
        return snapshot, FoldedGroups()
    return (
        replace(
            snapshot,
            requests=replace(snapshot.requests, group=_fold(snapshot.requests.group, folded)),
            evaluations=replace(snapshot.evaluations, group=_fold(snapshot.evaluations.group, folded)),
            qualities=[_fold_quality(one, folded) for one in snapshot.qualities],
            groupings=[replace(one, counts=_fold_counts(one.counts, folded)) for one in snapshot.groupings],
        ),
        folded,
    )


def _fold(groups: Texts, folded: FoldedGroups) -> Texts:
    label = folded.label
    column: Texts = np.array([label if group in folded.names else group for group in groups], dtype=object)
    return column


def _fold_quality(quality: Quality, folded: FoldedGroups) -> Quality:
    skipped = Counter[str]()
    for group, prompts in quality.skipped_by_group.items():
        skipped[folded.label if group in folded.names else group] += prompts
    counts = _fold_counts(quality.counts, folded)
    return quality.model_copy(update={"counts": counts, "skipped_by_group": dict(skipped)})


def _fold_counts(counts: Sequence[QualityCount], folded: FoldedGroups) -> tuple[QualityCount, ...]:
    return tuple(one.model_copy(update={"group": folded.label}) if one.group in folded.names else one for one in counts)
