"""A prior from an earlier fleet: what its last policies estimated, as evidence of a configured weight.

`sprout policy export-prior` writes the file, `SPROUT_OPTIMIZER_PRIOR_FILE` names it. The prior is never forgotten, and
counts for ever less as evidence of this fleet arrives. It counts

- in quality as judged prompts, at most as many as know the difference from the baseline as precisely as the earlier
  fleet did; by task label, or as one group if the earlier fleet's groups were learned: their names mean nothing here;
- in energy and time as requests of a group of its own, in units of the baseline's: other servers may use a multiple of
  it, so only the options' ratios are taken over.

See docs/decisions/0047-prior-from-an-earlier-fleet.md.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from services.optimizer.costs import Consumption, ResourceUse
from services.optimizer.quality import NO_ERROR, Outcomes
from services.optimizer.settings import OptimizerSettings
from shared.fleet import Fleet
from shared.messages import OptionEstimate, Policy, split_option
from shared.messages.base import UtcDatetime

PRIOR_GROUP = "*"
"""Group of what is known of all traffic together."""

MAX_BYTES = 4_000_000

NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class PriorError(ValueError):
    """A file with a prior cannot be used; the text says why."""


class _Document(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class PriorCost(_Document):
    """Mean energy and time of a request with an option, over all traffic."""

    energy_kwh: Positive
    processing_s: Positive
    server_s: NonNegative | None = None


class PriorQuality(_Document):
    """Quality of an option, and the standard error of its difference from the reference's."""

    mean: Annotated[float, Field(ge=0, le=1)]
    standard_error: NonNegative


class ModelPrior(_Document):
    """What is known of one model.

    Attributes:
        directives: texts, by level.
        costs: by option.
        quality: by group, metric and option, the reference among them.
    """

    made_at: UtcDatetime
    reference: str
    directives: dict[str, str]
    costs: dict[str, PriorCost]
    quality: dict[str, dict[str, dict[str, PriorQuality]]]

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.reference not in self.costs:
            raise ValueError(f"no costs of the reference {self.reference!r}")
        for group, metrics in self.quality.items():
            for metric, row in metrics.items():
                if self.reference not in row:
                    raise ValueError(f"no {metric} of the reference {self.reference!r} in group {group!r}")
        return self

    def outcomes(self, metric: str, prompts: float) -> dict[str, dict[str, Outcomes]]:
        """Judged outcomes by group, then option.

        Args:
            prompts: that the prior counts as at most, over all groups.
        """
        groups = {group: metrics[metric] for group, metrics in self.quality.items() if metric in metrics}
        return {group: _outcomes(row, self.reference, prompts / len(groups)) for group, row in groups.items()}

    def added_to(
        self, consumption: Consumption, *, requests: float, now_s: float, settings: OptimizerSettings
    ) -> Consumption:
        """A copy of the consumption with the prior's requests, scaled to what this fleet's baseline uses."""
        found = consumption.with_traffic_of(consumption.traffic)
        rows = consumption.totals(now_s, settings).values()
        base = [row[self.reference] for row in rows if self.reference in row and row[self.reference].requests > 0.0]
        known, of_reference = sum(one.requests for one in base), self.costs[self.reference]
        energy = sum(one.energy_kwh for one in base) / known / of_reference.energy_kwh if known else 1.0
        time = sum(one.processing_s for one in base) / known / of_reference.processing_s if known else 1.0
        for option, cost in self.costs.items():
            used = ResourceUse(
                requests,
                requests * energy * cost.energy_kwh,
                requests * time * cost.processing_s,
                server_requests=0.0 if cost.server_s is None else requests,
                server_s=requests * time * (cost.server_s or 0.0),
            )
            found.add(PRIOR_GROUP, option, used, at_s=now_s, settings=settings, traffic=0.0)
        return found


class PriorFile(_Document):
    """The file."""

    format: Literal["sprout-prior"] = "sprout-prior"
    version: Literal[1] = 1
    models: Annotated[dict[str, ModelPrior], Field(min_length=1)]


def load_priors(path: Path, fleet: Fleet) -> Mapping[str, ModelPrior]:
    """Read a prior for every model that the file names.

    Raises:
        PriorError: the file cannot be read, is not a prior, or is of other models, options or directives.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise PriorError(f"{path} is larger than {MAX_BYTES} bytes")
        found = PriorFile.model_validate_json(path.read_bytes()).models
    except OSError as error:
        raise PriorError(f"{path} cannot be read: {error.strerror}") from error
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise PriorError(f"{path} is not a prior of version 1: {where}: {first['msg']}") from None
    models = {model.name for model in fleet.models}
    for name, prior in found.items():
        if name not in models:
            raise PriorError(f"{path}: the fleet has no model {name!r}; it has {', '.join(sorted(models))}")
        _check(path, name, prior, fleet)
    return found


def _check(path: Path, name: str, prior: ModelPrior, fleet: Fleet) -> None:
    if prior.reference != fleet.reference_of(name):
        raise PriorError(
            f"{path}: quality is relative to {prior.reference!r}, the baseline of {name!r} is "
            f"{fleet.reference_of(name)!r}"
        )
    named = {*prior.costs, *(o for metrics in prior.quality.values() for row in metrics.values() for o in row)}
    if unknown := sorted(named - set(fleet.options_of(name))):
        raise PriorError(f"{path}: the fleet has no option {', '.join(unknown)} of {name!r}: remove it from the file")
    for level in sorted({split_option(option)[1] for option in named}):
        if prior.directives.get(level) != fleet.directive_text(level):
            raise PriorError(f"{path}: level {level} of {name!r} has another directive in this fleet: remove it")


def export_prior(policy: Policy, fleet: Fleet) -> ModelPrior | None:
    """What a policy estimated; None if it knows no more than the reference.

    Raises:
        KeyError: the fleet has no level that the policy names.
    """
    groups = policy.inputs.estimates
    weights = policy.inputs.weights or dict.fromkeys(groups, 1.0 / len(groups))
    options = sorted(set.intersection(*(set(row) for row in groups.values())))
    if len(options) < 2 or policy.reference not in options:
        return None
    quality: dict[str, dict[str, dict[str, PriorQuality]]] = {}
    for group in groups if policy.group_version is None else ():
        quality[group] = _quality({group: groups[group]}, {group: 1.0}, options)
    if policy.group_version is not None:
        quality[PRIOR_GROUP] = _quality(groups, weights, options)

    def mean(option: str, name: str) -> float:
        return sum(weights[group] * float(getattr(groups[group][option], name)) for group in groups)

    return ModelPrior(
        made_at=policy.created_at,
        reference=policy.reference,
        directives={level: fleet.directive_text(level) for level in sorted({split_option(one)[1] for one in options})},
        costs={
            option: PriorCost(
                energy_kwh=mean(option, "energy_kwh"),
                processing_s=mean(option, "processing_s"),
                server_s=None
                if any(row[option].server_s is None for row in groups.values())
                else mean(option, "server_s"),
            )
            for option in options
        },
        quality=quality,
    )


def _quality(
    groups: Mapping[str, Mapping[str, OptionEstimate]], weights: Mapping[str, float], options: list[str]
) -> dict[str, dict[str, PriorQuality]]:
    """Quality of some groups together. Errors of groups count as fully dependent, which makes none smaller."""
    found: dict[str, dict[str, PriorQuality]] = {}
    for metric in sorted(set.intersection(*(set(row[one].quality) for row in groups.values() for one in options))):
        found[metric] = {
            option: PriorQuality(
                mean=min(1.0, sum(weights[group] * row[option].quality[metric] for group, row in groups.items())),
                standard_error=sum(
                    weights[group] * math.hypot(*row[option].doubt.get(metric, NO_ERROR))
                    for group, row in groups.items()
                ),
            )
            for option in options
        }
    return found


def _outcomes(row: Mapping[str, PriorQuality], reference: str, prompts: float) -> dict[str, Outcomes]:
    """As many prompts as know the differences as well as the row does, at most `prompts`.

    Which answers were right together is not known: `PairedDifferences` assumes as few as the rates allow.
    """
    of_reference = row[reference].mean
    found = {reference: Outcomes(of_reference * prompts, prompts)}
    for option, one in row.items():
        if option != reference:
            variance = min(one.mean + of_reference, 2.0 - one.mean - of_reference) - (one.mean - of_reference) ** 2
            known = prompts if one.standard_error <= 0.0 else min(prompts, variance / one.standard_error**2)
            found[option] = Outcomes(one.mean * known, known)
    return found
