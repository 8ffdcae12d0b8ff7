"""What is believed once prompt groups are learned: by these groups alone, from the moment that they are known.

A version restates all that was judged before it, and says what the judged answers took and how the traffic was made up.
What has come in since by its names is added. What was judged by other groups is left out, for it is restated; what was
consumed by them stays: it tells how much an option takes in relation to another, whatever the group.
"""

from collections.abc import Iterable

from services.optimizer.consumption import Consumed, Consumption, Memory
from services.optimizer.decay import DecayedSums
from services.optimizer.quality import QualityEvidence
from shared.messages import PromptGrouping, Quality

TRAFFIC_REQUESTS = 100.0
"""Requests that the traffic's make-up, as it was sampled, counts as when a version is learned."""


def evidence_by(grouping: PromptGrouping, evaluations: Iterable[Quality], *, half_life_s: float) -> QualityEvidence:
    """Judged outcomes by the learned groups: what the version restates, and every evaluation by its names since."""
    evidence = QualityEvidence(half_life_s=half_life_s, families=grouping.families)
    for restated in grouping.evidence:
        evidence.count(restated.counts, at_s=restated.evaluated_at.timestamp())
    names = frozenset(grouping.names)
    for evaluation in evaluations:
        evidence.add(evaluation, groups=names)
    return evidence


def consumption_by(grouping: PromptGrouping, consumption: Consumption, memory: Memory) -> Consumption:
    """What was consumed, the judged answers before the version by its groups, with the traffic of these groups."""
    at_s = grouping.learned_at.timestamp()
    found = consumption.asked_by(grouping.names)
    for one in grouping.taken:
        taken = Consumed(one.requests, one.energy_kwh, one.processing_s)
        found.add(one.group, one.option, taken, at_s=at_s, memory=memory, asked=False)
    for group, share in grouping.traffic.items():
        sums = found.traffic.setdefault(group, DecayedSums(at_s, [0.0]))
        sums.add((TRAFFIC_REQUESTS * share,), at_s=at_s, half_life_s=memory.traffic_half_life_s)
    return found
