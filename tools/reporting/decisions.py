"""Why policies are what they are, in the report: their quality limits, and what another option of a group would emit.

Policies carry both (`services/optimizer/outcome.py`). The newest policy of each model is shown.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from shared.messages import LimitOutcome, Policy
from tools.reporting.quality import PolicyHistory


@dataclass(frozen=True, slots=True)
class LimitRow:
    """A quality limit in a model's newest policy; qualities are relative to the reference's.

    Attributes:
        at: when the policy was made.
    """

    model: str
    policy_version: int
    at: datetime
    metric: str
    outcome: LimitOutcome

    def to_json(self) -> dict[str, Any]:
        """The row as JSON values, without nesting."""
        at = self.at.isoformat()
        row = {"model": self.model, "policy_version": self.policy_version, "at": at, "metric": self.metric}
        return row | self.outcome.model_dump()


@dataclass(frozen=True, slots=True)
class NextOption:
    """The best option of a group that its policy does not choose.

    Attributes:
        option: None: there is none, or it is not known.
        extra_g: gCO2eq by which all traffic would emit more for one more request with it, the quality that it loses
            made up for in other groups.
    """

    option: str | None = None
    extra_g: float | None = None


def limit_rows(policies: PolicyHistory, model: str | None) -> tuple[LimitRow, ...]:
    """The limits of the newest policies, by model and metric."""
    return tuple(
        LimitRow(policy.model, policy.version, policy.created_at, metric, outcome)
        for policy in policies.newest(model)
        for metric, outcome in sorted(policy.limits.items())
    )


def next_options(policies: PolicyHistory, model: str | None) -> dict[str, NextOption]:
    """By group, the option that would cost least of those that its policy does not choose."""
    return {group: one for policy in policies.newest(model) for group, one in _next_options(policy)}


def _next_options(policy: Policy) -> Iterator[tuple[str, NextOption]]:
    for group, row in policy.extra_g.items():
        others = {option: grams for option, grams in row.items() if grams > 0.0}
        if others:
            option = min(others, key=others.__getitem__)
            yield group, NextOption(option, others[option])
