"""When a model is solved again: what changed since the last solve, or when its policy must be renewed."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from services.optimizer.bounds import CurrentIntensity
from services.optimizer.estimates import Estimates
from services.optimizer.policy import Trigger
from services.optimizer.settings import OptimizerSettings
from shared.messages import Policy


@dataclass(frozen=True, slots=True, kw_only=True)
class SolveInputs:
    """The inputs of the last solve of a model.

    Attributes:
        checked_at: event time of the last check of the estimates.
        intensities: current carbon intensity by zone.
        groups: version of the learned prompt groups; None: task labels.
        evaluation: id of the latest evaluation.
        evaluation_seen_at: event time at which that evaluation was first considered.
        estimates: those of the last solve.
    """

    checked_at: datetime
    intensities: Mapping[str, CurrentIntensity]
    groups: str | None
    evaluation: str | None
    evaluation_seen_at: datetime
    estimates: Estimates


def solve_trigger(
    last: SolveInputs | None,
    *,
    intensities: Mapping[str, CurrentIntensity],
    groups: str | None,
    evaluation: str | None,
    published: Policy | None,
    now: datetime,
    settings: OptimizerSettings,
) -> Trigger | None:
    """Why to solve now, estimates aside; None if there is no reason.

    Args:
        last: of the last solve; None since the start.
        intensities, groups, evaluation: current, as in `SolveInputs`.
        published: the current policy; None if there is none.
        now: event time.
        settings: when a policy must be renewed.
    """
    if last is None:
        return "start"
    period_ended = published is not None and published.promise is not None and now >= published.promise.current.end
    reasons: dict[Trigger, bool] = {
        "intensity": intensities != last.intensities,
        "groups": groups != last.groups,
        "quality": evaluation != last.evaluation,
        "period": period_ended,
        "validity": published is not None and must_renew(published, now, settings),
    }
    return next((trigger for trigger, is_given in reasons.items() if is_given), None)


def awaits_footprints(last: SolveInputs, now: datetime, settings: OptimizerSettings) -> bool:
    """Whether footprints of the latest evaluation may still be on their way: the ledger publishes them later."""
    return now - last.evaluation_seen_at <= settings.evaluation_window


def estimates_due(last: SolveInputs, now: datetime, settings: OptimizerSettings) -> bool:
    """Whether to look for changed estimates: soon after an evaluation, so that its verdicts and its footprints count
    together, and otherwise rarely.
    """
    soon = awaits_footprints(last, now, settings)
    return now - last.checked_at >= (settings.evaluation_interval if soon else settings.estimates_interval)


def must_renew(published: Policy, now: datetime, settings: OptimizerSettings) -> bool:
    """Whether a policy expires so soon that a new one must replace it."""
    return published.valid_until - now <= settings.renewal
