"""Current estimates of every option for every group: e, p and q (docs/decisions/0004-optimizer-estimates.md)."""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from services.optimizer.costs import Consumption, CostModel, ResourceUse
from services.optimizer.prices import request_energy_j, request_server_s, without_prompts, without_tokens
from services.optimizer.prior import ModelPrior
from services.optimizer.quality import QualityModel, lower_confidence_bound
from services.optimizer.settings import OptimizerSettings
from services.optimizer.state import QualityCounts
from shared.carbon import JOULES_PER_KWH
from shared.messages import OptionEstimate, PoolPrice, split_option

Row = dict[str, OptionEstimate]
"""Estimates by option."""

_LIGHT_GROUP = 0.01
"""Traffic share below which changes of a group's estimates are ignored."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimates:
    """Estimates at one instant.

    Attributes:
        weights: traffic share by group with probabilities of its own; sums to 1, empty without traffic.
        usual_weights: shares of the same groups over a day or more, for the hours to come: the half-life is that of
            energy and time, and prompts of the evaluator are among them. Empty without traffic.
        groups: estimates by group, then option. Ineligible options are left out, the reference never is.
        overall: by option, the traffic-weighted mean: for groups without probabilities of their own.
        families: families of groups about similar things, by group.
        requests_per_s: request rate of the model.
        traffic_requests: effective requests that the weights were counted from; None: they are known exactly.
        variation: standard deviation of a request's energy at the baseline, relative to its mean, by group.
        ineligible: why an option may not be used, by option.
        prices: what a token costs, by pool; e follows from it. A pool without a price has the attributed energy.
    """

    weights: dict[str, float]
    usual_weights: dict[str, float] = field(default_factory=dict)
    groups: dict[str, Row]
    overall: Row
    families: dict[str, str] = field(default_factory=dict)
    requests_per_s: float
    traffic_requests: float | None = None
    variation: dict[str, float] = field(default_factory=dict)
    ineligible: dict[str, str] = field(default_factory=dict)
    prices: dict[str, PoolPrice] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Costs:
    """What requests use, and what that costs.

    Attributes:
        model: mean energy, time and tokens of a request.
        prices: by pool.
        server_time_known: whether the attributed server time of the options is known.
    """

    model: CostModel
    prices: Mapping[str, PoolPrice]
    server_time_known: bool

    def energy_and_server_time(self, group: str, option: str) -> tuple[float, float | None]:
        """Energy (kWh) and server time (seconds, None if unknown) of a request: tokens times the price of a token.

        Where the pool has no price per token, both are those attributed to earlier requests.
        """
        price = self.prices.get(split_option(option)[0])
        if price is None or price.basis == "attributed":
            server_s = self.model.server_s(group, option) if self.server_time_known else None
            return self.model.energy_kwh(group, option), server_s
        tokens = self.model.completion_tokens(group, option)
        prompt = 0.0 if price.prompt_token_j is None else self.model.prompt_tokens(group, option)
        return (
            request_energy_j(price, completion_tokens=tokens, prompt_tokens=prompt) / JOULES_PER_KWH,
            request_server_s(price, completion_tokens=tokens, prompt_tokens=prompt),
        )


def estimate(
    consumption: Consumption,
    counts: QualityCounts,
    *,
    options: Sequence[str],
    reference: str,
    settings: OptimizerSettings,
    now_s: float,
    equivalent: Collection[str] = (),
    prices: Mapping[str, PoolPrice] | None = None,
    prior: ModelPrior | None = None,
) -> Estimates | None:
    """Estimate e, p and q at an event time.

    Args:
        consumption: sums of footprints.
        counts: judged outcomes.
        options: of the fleet, with the reference; other options in the data are ignored.
        reference: the baseline option.
        settings: an option is eligible once its quality is known in every metric of `xi`; half-lives; prior weights.
        now_s: event time.
        equivalent: options that give the reference's own answers.
        prices: what a token costs, by pool; None: the energy is that attributed to earlier requests.
        prior: what an earlier fleet knew.

    Returns:
        The estimates; None as long as there is no footprint of the reference.
    """
    of_fleet = set(options)
    if prior is not None:
        consumption = prior.added_to(consumption, requests=settings.prior_requests, now_s=now_s, settings=settings)
    totals = {
        group: kept
        for group, row in consumption.totals(now_s, settings).items()
        if (kept := {option: used for option, used in row.items() if option in of_fleet})
    }
    requests = {option: sum(row[option].requests for row in totals.values() if option in row) for option in options}
    if requests[reference] <= 0.0:
        return None
    models = {
        metric: counts.model(metric, reference, now_s, equivalent=equivalent, prior=prior) for metric in settings.xi
    }
    ineligible = _ineligible(options, reference, requests, models, settings)
    eligible = [option for option in options if option not in ineligible]
    groups = _groups_with_probabilities(consumption.requests(now_s, settings), settings)
    costs = _costs(totals, eligible, prices or {}, settings)
    total = sum(groups.values())
    weights = {group: count / total for group, count in groups.items()}
    # Without any traffic the overall means weight all groups alike.
    all_weights = weights or {group: 1.0 / len(totals) for group in totals}

    def row(group: str) -> Row:
        return {option: _estimate_cell(group, option, costs, models, settings) for option in eligible}

    rows = {group: row(group) for group in groups}
    usual = {group: sum(used.requests for used in totals.get(group, {}).values()) for group in groups}
    usual_total = sum(usual.values())
    return Estimates(
        weights=weights,
        usual_weights={group: count / usual_total for group, count in usual.items()} if usual_total > 0.0 else {},
        groups=rows,
        overall=_overall(
            {group: rows.get(group) or row(group) for group in all_weights}, all_weights, models, settings
        ),
        families={group: family for group in groups if (family := counts.family(group)) is not None},
        requests_per_s=consumption.requests_per_s(now_s, settings),
        traffic_requests=total or None,
        variation={group: costs.model.energy_variation(group, reference) for group in groups},
        ineligible=ineligible,
        prices=dict(costs.prices),
    )


def estimates_changed(old: Estimates, new: Estimates, change: float) -> bool:
    """Whether options, groups, traffic shares, prices or the estimates of a group with traffic changed materially.

    Args:
        old, new: to compare.
        change: relative for energy and time, absolute for quality and traffic shares.
    """
    if new.overall.keys() != old.overall.keys() or new.groups.keys() != old.groups.keys():
        return True
    if price_bases(new.prices) != price_bases(old.prices):
        return True
    if any(abs(new.weights[group] - old.weights[group]) > change for group in new.weights):
        return True
    return any(_differ(one, other, change) for one, other in _compared_cells(old, new))


def price_bases(prices: Mapping[str, PoolPrice]) -> dict[str, str]:
    """What the energy follows from, by pool; pools with attributed energy are left out."""
    return {pool: price.basis for pool, price in prices.items() if price.basis != "attributed"}


def relative_change(old: float, new: float) -> float:
    """|new - old| relative to the larger of the two; 0 if both are 0."""
    largest = max(abs(old), abs(new))
    return abs(new - old) / largest if largest > 0.0 else 0.0


def _costs(
    totals: Mapping[str, Mapping[str, ResourceUse]],
    eligible: Sequence[str],
    prices: Mapping[str, PoolPrice],
    settings: OptimizerSettings,
) -> _Costs:
    """The costs of the eligible options, each of them with the price that the data allow.

    A price per token needs the tokens of every option of its pool, and an option without known tokens would look free:
    as long as one has too few, the pool's energy is the attributed one.
    """
    used = {option: [row[option] for row in totals.values() if option in row] for option in eligible}

    def unknown(count: Callable[[ResourceUse], float], options: Sequence[str]) -> str | None:
        """The first of some options for which too few requests are counted, in words; None if all have enough."""
        for option in options:
            counted, requests = sum(map(count, used[option])), sum(one.requests for one in used[option])
            if counted < min(requests, settings.min_requests):
                return f"{counted:.1f} of {settings.min_requests:g} footprints of {option}"
        return None

    usable: dict[str, PoolPrice] = {}
    for pool, price in prices.items():
        options = [option for option in eligible if split_option(option)[0] == pool]
        if missing := unknown(lambda one: one.token_requests, options):
            usable[pool] = without_tokens(price, f"tokens are known of {missing}")
        else:
            prompts_known = unknown(lambda one: one.prompt_requests, options) is None
            usable[pool] = price if prompts_known else without_prompts(price)
    attributed = [option for option in eligible if split_option(option)[0] not in price_bases(usable)]
    return _Costs(
        model=CostModel(totals, settings.pseudo_requests),
        prices=usable,
        # For all of them or for none: server time is a fraction of the processing time that stands in for it.
        server_time_known=unknown(lambda one: one.server_requests, attributed) is None,
    )


def _ineligible(
    options: Sequence[str],
    reference: str,
    requests: Mapping[str, float],
    models: Mapping[str, QualityModel],
    settings: OptimizerSettings,
) -> dict[str, str]:
    """Why an option may not be used. Without judged answers of the reference nothing can be compared with it."""
    reasons: dict[str, str] = {}
    for option in options:
        if option == reference:
            continue
        if requests[option] < settings.min_requests:
            reasons[option] = f"{requests[option]:.1f} of {settings.min_requests:g} footprints"
        for metric, model in models.items():
            insufficient = next((one for one in (option, reference) if not model.is_sufficient(one)), None)
            if insufficient is not None and option not in reasons:
                trials = f"{model.trials(insufficient):.1f} of {settings.min_trials:g} judged prompts"
                reasons[option] = f"{trials} ({metric}{' of the reference' if insufficient == reference else ''})"
    return reasons


def _groups_with_probabilities(requests: Mapping[str, float], settings: OptimizerSettings) -> dict[str, float]:
    """The `max_groups` groups with most traffic and enough of it; effective requests by group, sorted by name."""
    by_traffic = sorted(requests, key=lambda group: (-requests[group], group))[: settings.max_groups]
    enough = [group for group in by_traffic if requests[group] >= settings.min_group_requests] or by_traffic[:1]
    return {group: requests[group] for group in sorted(enough) if requests[group] > 0.0}


def _estimate_cell(
    group: str, option: str, costs: _Costs, models: Mapping[str, QualityModel], settings: OptimizerSettings
) -> OptionEstimate:
    """Means and standard errors of one (group, option) pair."""
    energy_kwh, server_s = costs.energy_and_server_time(group, option)
    known = {metric: model for metric, model in models.items() if model.trials(option) > 0.0}
    return OptionEstimate(
        energy_kwh=energy_kwh,
        processing_s=costs.model.processing_s(group, option),
        server_s=server_s,
        quality={metric: model.mean(group, option) for metric, model in known.items()},
        doubt={
            metric: errors for metric, model in known.items() if any(errors := model.standard_errors(group, option))
        },
        group_quality={
            metric: lower_confidence_bound(
                model.mean(group, option),
                math.hypot(*model.standard_errors(group, option)),
                settings.confidence_z_of(metric),
            )
            for metric, model in models.items()
            if metric in settings.floors
        },
        trials=min((model.group_trials(group, option) for model in models.values()), default=0.0),
        requests=costs.model.requests(group, option),
    )


def _overall(
    rows: Mapping[str, Row],
    weights: Mapping[str, float],
    models: Mapping[str, QualityModel],
    settings: OptimizerSettings,
) -> Row:
    """All traffic as one group: traffic-weighted means, with the standard errors of these means."""

    def mean(value: Callable[[str], float]) -> float:
        return sum(weights[group] * value(group) for group in rows)

    def of_option(option: str) -> OptionEstimate:
        cells = {group: row[option] for group, row in rows.items()}
        metrics = next(iter(cells.values())).quality
        quality = {metric: mean(lambda group, metric=metric: cells[group].quality[metric]) for metric in metrics}  # type: ignore[misc]
        errors = {metric: models[metric].overall_standard_error(option, weights) for metric in metrics}
        server_s = {group: cell.server_s for group, cell in cells.items() if cell.server_s is not None}
        return OptionEstimate(
            energy_kwh=mean(lambda group: cells[group].energy_kwh),
            processing_s=mean(lambda group: cells[group].processing_s),
            server_s=mean(lambda group: server_s[group]) if len(server_s) == len(cells) else None,
            quality=quality,
            doubt={metric: (error, 0.0, 0.0) for metric, error in errors.items() if error > 0.0},
            group_quality={
                metric: lower_confidence_bound(quality[metric], errors[metric], settings.confidence_z_of(metric))
                for metric in metrics
                if metric in settings.floors
            },
            trials=sum(cell.trials for cell in cells.values()),
            requests=sum(cell.requests for cell in cells.values()),
        )

    return {option: of_option(option) for option in next(iter(rows.values()))}


def _compared_cells(old: Estimates, new: Estimates) -> Iterator[tuple[OptionEstimate, OptionEstimate]]:
    yield from ((old.overall[option], new.overall[option]) for option in new.overall)
    for group, row in new.groups.items():
        if new.weights[group] >= _LIGHT_GROUP:
            yield from ((old.groups[group][option], row[option]) for option in row)


def _differ(one: OptionEstimate, other: OptionEstimate, change: float) -> bool:
    return (
        relative_change(one.energy_kwh, other.energy_kwh) > change
        or relative_change(one.processing_s, other.processing_s) > change
        or (one.server_s is None) != (other.server_s is None)
        or relative_change(one.server_s or 0.0, other.server_s or 0.0) > change
        or any(abs(one.quality.get(metric, 0.0) - value) > change for metric, value in other.quality.items())
    )
