"""What the optimizer believes of every option for every group: e, p and q (docs/decisions/0004-optimizer-estimates.md).

Energy and time follow a multiplicative model, level of the group × ratio of the option, and each cell leans on it by
pseudo-requests: a group in which an option was never seen is expected to take what the reference takes there, times the
option's usual ratio to it.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

from services.optimizer.consumption import Consumed, Consumption, Memory
from services.optimizer.effects import main_effects
from services.optimizer.posterior import Posterior
from services.optimizer.quality import QualityEvidence, QualityRules
from shared.messages import OptionEstimate

Row = dict[str, OptionEstimate]


@dataclass(frozen=True, slots=True, kw_only=True)
class EstimateRules:
    """How evidence becomes estimates.

    Attributes:
        memory: how long consumption is remembered.
        quality: how counts become a posterior.
        pseudo_requests: requests that the multiplicative model counts as, in each group and option.
        min_requests: effective requests of an option, in all groups, before it may be used.
        min_group_requests: effective requests of a group before it gets a row of its own.
        floors: metrics of which every group by itself has a bound.
    """

    memory: Memory
    quality: QualityRules
    pseudo_requests: float
    min_requests: float
    min_group_requests: float
    floors: Collection[str] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimates:
    """Beliefs at one instant.

    Attributes:
        weights: traffic share by group that has a row of its own; sums to 1, empty without traffic.
        groups: by group, then option; options without evidence are left out, the reference never.
        whole: by option: the mean over the traffic, for groups without a row.
        families: of groups that are about alike things, by group that has a row.
        requests_per_s: of the model.
        withheld: why an option may not be used, by option.
    """

    weights: dict[str, float]
    groups: dict[str, Row]
    whole: Row
    families: dict[str, str] = field(default_factory=dict)
    requests_per_s: float
    withheld: dict[str, str] = field(default_factory=dict)


def estimate(
    consumption: Consumption,
    evidence: QualityEvidence,
    *,
    options: Sequence[str],
    reference: str,
    metrics: Sequence[str],
    rules: EstimateRules,
    now_s: float,
    same: Collection[str] = (),
) -> Estimates | None:
    """Beliefs at an event time; null as long as no footprint of the reference is known.

    Args:
        options: of the fleet, the reference among them; others in the evidence are passed over.
        metrics: that an option's quality must be known in before it may be used.
        same: options whose answers are the reference's.
    """
    served = set(options)
    consumed = {
        group: kept
        for group, row in consumption.consumed(now_s, rules.memory).items()
        if (kept := {option: cell for option, cell in row.items() if option in served})
    }
    requests = {option: sum(row[option].requests for row in consumed.values() if option in row) for option in options}
    if requests[reference] <= 0.0:
        return None
    posteriors = {metric: evidence.posterior(metric, reference, now_s, rules.quality, same=same) for metric in metrics}
    withheld = _withheld(options, reference, requests, posteriors, rules)
    usable = [option for option in options if option not in withheld]
    groups = _named_groups(consumption.requests(now_s, rules.memory), rules)
    costs = _Costs(consumed, rules.pseudo_requests)
    total = sum(groups.values())
    weights = {group: count / total for group, count in groups.items()}
    everyone = weights or {group: 1.0 / len(consumed) for group in consumed}

    def row(group: str) -> Row:
        return {option: _believed(group, option, costs, posteriors, rules.floors) for option in usable}

    rows = {group: row(group) for group in groups}
    return Estimates(
        weights=weights,
        groups=rows,
        whole=_whole({group: rows.get(group) or row(group) for group in everyone}, everyone, posteriors, rules.floors),
        families={group: family for group in groups if (family := evidence.family(group)) is not None},
        requests_per_s=consumption.requests_per_s(now_s, rules.memory),
        withheld=withheld,
    )


class _Costs:
    """Energy and time of every group and option."""

    def __init__(self, consumed: Mapping[str, Mapping[str, Consumed]], pseudo_requests: float) -> None:
        self._consumed = consumed
        self._pseudo = pseudo_requests
        self._energy = self._fit(lambda cell: cell.energy_kwh)
        self._time = self._fit(lambda cell: cell.processing_s)

    def of(self, group: str, option: str) -> Consumed:
        """Effective requests, and the means of energy and time."""
        cell = self._consumed.get(group, {}).get(option, Consumed(0.0, 0.0, 0.0))
        weight = cell.requests + self._pseudo
        return Consumed(
            cell.requests,
            (cell.energy_kwh + self._pseudo * self._energy(group, option)) / weight,
            (cell.processing_s + self._pseudo * self._time(group, option)) / weight,
        )

    def _fit(self, value: Callable[[Consumed], float]) -> Callable[[str, str], float]:
        return main_effects(
            {
                group: {option: (cell.requests, value(cell)) for option, cell in row.items()}
                for group, row in self._consumed.items()
            },
            pseudo_requests=self._pseudo,
        )


def _withheld(
    options: Sequence[str],
    reference: str,
    requests: Mapping[str, float],
    posteriors: Mapping[str, Posterior],
    rules: EstimateRules,
) -> dict[str, str]:
    """Why an option may not be used. Without evidence of the reference's quality no other can be compared with it."""
    reasons: dict[str, str] = {}
    for option in options:
        if option == reference:
            continue
        if requests[option] < rules.min_requests:
            reasons[option] = f"{requests[option]:.1f} of {rules.min_requests:g} footprints"
        for metric, posterior in posteriors.items():
            scarce = next((one for one in (option, reference) if not posterior.suffices(one)), None)
            if scarce is not None and option not in reasons:
                trials = f"{posterior.trials(scarce):.1f} of {rules.quality.posterior.min_trials:g} judged prompts"
                reasons[option] = f"{trials} ({metric}{' of the reference' if scarce == reference else ''})"
    return reasons


def _named_groups(requests: Mapping[str, float], rules: EstimateRules) -> dict[str, float]:
    """The groups with most traffic, as many as get a row of their own; effective requests by group, in order."""
    by_traffic = sorted(requests, key=lambda group: (-requests[group], group))[: rules.memory.max_groups]
    named = [group for group in by_traffic if requests[group] >= rules.min_group_requests] or by_traffic[:1]
    return {group: requests[group] for group in sorted(named) if requests[group] > 0.0}


def _believed(
    group: str,
    option: str,
    costs: _Costs,
    posteriors: Mapping[str, Posterior],
    floors: Collection[str],
) -> OptionEstimate:
    """What is believed, and how far that may be off."""
    cost = costs.of(group, option)
    known = {metric: one for metric, one in posteriors.items() if one.trials(option) > 0.0}
    return OptionEstimate(
        energy_kwh=cost.energy_kwh,
        processing_s=cost.processing_s,
        quality={metric: one.mean(group, option) for metric, one in known.items()},
        doubt={metric: doubt for metric, one in known.items() if any(doubt := one.doubt(group, option))},
        group_quality={
            metric: one.counted_on(one.mean(group, option), math.hypot(*one.doubt(group, option)))
            for metric, one in posteriors.items()
            if metric in floors
        },
        trials=min((one.group_trials(group, option) for one in posteriors.values()), default=0.0),
        requests=cost.requests,
    )


def _whole(
    rows: Mapping[str, Row], weights: Mapping[str, float], posteriors: Mapping[str, Posterior], floors: Collection[str]
) -> Row:
    """All traffic as one group: the mean over groups by traffic, in whose doubt theirs cancel out in part."""

    def mean(value: Callable[[str], float]) -> float:
        return sum(weights[group] * value(group) for group in rows)

    def option_of_all(option: str) -> OptionEstimate:
        cells = {group: row[option] for group, row in rows.items()}
        known = next(iter(cells.values())).quality
        quality = {metric: mean(lambda group, metric=metric: cells[group].quality[metric]) for metric in known}  # type: ignore[misc]
        doubt = {metric: posteriors[metric].doubt_of_all(option, weights) for metric in known}
        return OptionEstimate(
            energy_kwh=mean(lambda group: cells[group].energy_kwh),
            processing_s=mean(lambda group: cells[group].processing_s),
            quality=quality,
            doubt={metric: (deviation, 0.0, 0.0) for metric, deviation in doubt.items() if deviation > 0.0},
            group_quality={
                metric: posteriors[metric].counted_on(quality[metric], doubt[metric])
                for metric in known
                if metric in floors
            },
            trials=sum(cell.trials for cell in cells.values()),
            requests=sum(cell.requests for cell in cells.values()),
        )

    return {option: option_of_all(option) for option in next(iter(rows.values()))}
