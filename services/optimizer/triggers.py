"""When to solve, and whether the result is worth publishing.

A policy is solved anew when the grid, the quality or the estimates changed, and before the last one expires. It is
published only when it differs materially, or must be renewed: routers, ledgers and their logs need no copies.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal

from services.optimizer.bounds import InForce
from services.optimizer.estimates import Estimates
from shared.messages import OptionEstimate, Policy

Trigger = Literal["start", "intensity", "groups", "quality", "estimates", "validity"]

_LIGHT_GROUP = 0.01
"""Traffic share below which a group's estimates do not make a policy stale."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TriggerRules:
    """When something is material; spans in event time.

    Attributes:
        estimates_interval: between two looks at the estimates.
        estimates_change: relative change of energy or time, or absolute change of a quality or a traffic share.
        probability_change: of any option in any group.
        carbon_change: relative change of the expected gCO2eq per request.
        bound_change: of any metric's bound.
        renewal: a policy is renewed when it is valid for no longer than this.
    """

    estimates_interval: timedelta
    estimates_change: float
    probability_change: float
    carbon_change: float
    bound_change: float
    renewal: timedelta


@dataclass(frozen=True, slots=True, kw_only=True)
class Basis:
    """What a policy was last solved from.

    Attributes:
        looked_at: when the estimates were last looked at; event time.
        intensities: in force, by zone.
        groups: version of the learned prompt groups; null: task labels.
        evaluation: id of the latest evaluation.
    """

    looked_at: datetime
    intensities: Mapping[str, InForce]
    groups: str | None
    evaluation: str | None
    estimates: Estimates


def due(
    basis: Basis | None,
    *,
    intensities: Mapping[str, InForce],
    groups: str | None,
    evaluation: str | None,
    published: Policy | None,
    now: datetime,
    rules: TriggerRules,
) -> Trigger | None:
    """Why to solve now, estimates aside; null where nothing calls for it.

    Args:
        basis: of the last solution; null since the start.
        published: the policy in force; null where there is none.
    """
    if basis is None:
        return "start"
    if intensities != basis.intensities:
        return "intensity"
    if groups != basis.groups:
        return "groups"
    if evaluation != basis.evaluation:
        return "quality"
    if published is not None and expiring(published, now, rules):
        return "validity"
    return None


def expiring(published: Policy, now: datetime, rules: TriggerRules) -> bool:
    """Whether a policy must be renewed."""
    return published.valid_until - now <= rules.renewal


def look_due(basis: Basis, now: datetime, rules: TriggerRules) -> bool:
    """Whether it is time to look at the estimates again."""
    return now - basis.looked_at >= rules.estimates_interval


def moved(old: Estimates, new: Estimates, rules: TriggerRules) -> bool:
    """Whether the estimates changed materially: what is known at all, the traffic's shares, or a cell that counts."""
    if new.whole.keys() != old.whole.keys() or new.groups.keys() != old.groups.keys():
        return True
    if any(abs(new.weights[group] - old.weights[group]) > rules.estimates_change for group in new.weights):
        return True
    return any(_differ(one, other, rules.estimates_change) for one, other in _cells(old, new))


def material(old: Policy, new: Policy, rules: TriggerRules) -> str | None:
    """What a router or ledger would notice of a new policy, in words; null when nothing."""
    return next(_differences(old, new, rules), None)


def _differences(old: Policy, new: Policy, rules: TriggerRules) -> Iterator[str]:
    if (new.status, new.reference) != (old.status, old.reference):
        yield f"status {old.status} is now {new.status}"
    if (new.groups.keys(), new.group_version) != (old.groups.keys(), old.group_version):
        yield "other prompt groups"
        return
    rows = [(old.overall, new.overall), *((old.groups[group], new.groups[group]) for group in new.groups)]
    changed = max(
        abs(after.get(option, 0.0) - before.get(option, 0.0))
        for before, after in rows
        for option in before.keys() | after.keys()
    )
    if changed > rules.probability_change:
        yield f"a probability changed by {changed:.3f}"
    if new.bounds.keys() != old.bounds.keys() or any(
        abs(new.bounds[metric] - old.bounds[metric]) > rules.bound_change for metric in new.bounds
    ):
        yield "other bounds"
    if _relative(old.expected_g_per_request, new.expected_g_per_request) > rules.carbon_change:
        yield "other grams per request"


def _cells(old: Estimates, new: Estimates) -> Iterator[tuple[OptionEstimate, OptionEstimate]]:
    yield from ((old.whole[option], new.whole[option]) for option in new.whole)
    for group, row in new.groups.items():
        if new.weights[group] >= _LIGHT_GROUP:
            yield from ((old.groups[group][option], row[option]) for option in row)


def _differ(one: OptionEstimate, other: OptionEstimate, change: float) -> bool:
    return (
        _relative(one.energy_kwh, other.energy_kwh) > change
        or _relative(one.processing_s, other.processing_s) > change
        or any(abs(one.quality.get(metric, 0.0) - value) > change for metric, value in other.quality.items())
    )


def _relative(old: float, new: float) -> float:
    largest = max(abs(old), abs(new))
    return abs(new - old) / largest if largest > 0.0 else 0.0
