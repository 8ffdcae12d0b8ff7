"""How many prompts an evaluation takes: as many as pay for themselves, within a share of the requests' carbon.

The optimizer takes a safety margin off estimated quality. The margin shrinks with the number n of judged prompts, and
so does what it costs: the grams per request lost to it are L = c / sqrt(n). One more judged prompt saves L / (2 n)
grams per request, on all requests until it is forgotten. Prompts are judged until the next one saves less than it
costs. See docs/decisions/0041-evaluation-that-pays-for-itself.md.
"""

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final, Literal

from shared.messages import OptionEstimate, Policy

MIN_PROMPTS: Final = 20
"""An evaluation of fewer prompts is not worth a start: its judge could not be rated (`card.MIN_COMPARISONS`)."""

CEILING_WINDOW: Final = timedelta(days=7)
"""Trailing window in which the evaluator's carbon is compared with the requests'."""

MARGIN_MEMORY: Final = timedelta(hours=24)
"""The margin's cost follows the quality limit, which follows the grid through the day: it is averaged over a day."""

SETTLED_FOR: Final = timedelta(hours=24)
"""A group is judged thinly once it has been settled this long: the quality limit follows the grid through the day."""

_LIFETIME_OF_HALF_LIFE: Final = 1.0 / math.log(2)

SizeLimit = Literal["maximum", "carbon_ceiling", "not_worthwhile"]
"""What limits an evaluation: the setting, the ceiling of its carbon, or that more prompts would not pay."""


@dataclass(frozen=True, slots=True)
class Spending:
    """Carbon of one model's requests and evaluations, from footprints.

    Attributes:
        requests_g: of the requests in `CEILING_WINDOW`.
        evaluator_g: of the evaluations in that window, except for the first evaluation ever.
        requests_per_s: mean of the last day.
        g_per_prompt: mean of evaluated prompts; None while no footprint of an evaluation is known.
    """

    requests_g: float = 0.0
    evaluator_g: float = 0.0
    requests_per_s: float = 0.0
    g_per_prompt: float | None = None


@dataclass(frozen=True, slots=True)
class Uncertainty:
    """What uncertainty about quality costs a model's requests.

    Attributes:
        margin_g: grams per request that the safety margin costs.
        judged: effective judged prompts that the margin is made from.
    """

    margin_g: float
    judged: float


@dataclass(frozen=True, slots=True)
class EvaluationSize:
    """Number of prompts of an evaluation, and what limits it."""

    prompts: int
    limit: SizeLimit


def evaluation_size(
    spending: Spending,
    uncertainty: Uncertainty | None,
    *,
    maximum: int,
    max_carbon_share: float | None,
    half_life_s: float,
) -> EvaluationSize:
    """Size of any evaluation but the first one and those that a person requests.

    Args:
        uncertainty: None: not known, or more prompts are needed whatever they save, to learn groups from.
        maximum: prompts of an evaluation at most.
        max_carbon_share: ceiling of the evaluator's carbon as a share of the requests'; None: no ceiling.
        half_life_s: of a judged prompt in the optimizer.
    """
    size = EvaluationSize(maximum, "maximum")
    if max_carbon_share is not None:
        allowed = affordable_prompts(spending, max_carbon_share)
        if allowed < size.prompts:
            size = EvaluationSize(allowed, "carbon_ceiling")
    if uncertainty is not None and spending.g_per_prompt:
        wanted = worthwhile_prompts(
            uncertainty,
            requests_per_s=spending.requests_per_s,
            g_per_prompt=spending.g_per_prompt,
            half_life_s=half_life_s,
        )
        if wanted < size.prompts:
            size = EvaluationSize(wanted, "not_worthwhile")
    return size


def affordable_prompts(spending: Spending, max_carbon_share: float) -> int:
    """Prompts that keep the evaluator's carbon below its share of the requests'; 0 while their cost is unknown."""
    if not spending.g_per_prompt:
        return 0
    left_g = max_carbon_share * spending.requests_g - spending.evaluator_g
    return max(0, math.floor(left_g / spending.g_per_prompt))


def worthwhile_prompts(
    uncertainty: Uncertainty, *, requests_per_s: float, g_per_prompt: float, half_life_s: float
) -> int:
    """Further prompts until the next one saves less than it costs.

    A judged prompt counts for T = half-life / ln 2 seconds on average. With n of them the next one saves
    requests_per_s * T * c / (2 n^1.5) grams, c = margin_g * sqrt(judged), so the wanted number is
    n = (requests_per_s * T * c / (2 g_per_prompt))^(2/3).

    Args:
        requests_per_s: whose grams the margin costs.
        g_per_prompt: cost of evaluating one prompt; > 0.
        half_life_s: of a judged prompt.
    """
    lifetime_s = half_life_s * _LIFETIME_OF_HALF_LIFE
    c = uncertainty.margin_g * math.sqrt(max(uncertainty.judged, 1.0))
    wanted = math.pow(requests_per_s * lifetime_s * c / (2.0 * g_per_prompt), 2.0 / 3.0)
    return max(0, math.ceil(wanted - uncertainty.judged))


def judged_prompts(estimates: Mapping[str, Mapping[str, OptionEstimate]]) -> float:
    """Effective judged prompts behind some estimates, by group, then option; of the option that has most."""
    trials: dict[str, float] = defaultdict(float)
    for row in estimates.values():
        for option, estimate in row.items():
            trials[option] += estimate.trials
    return max(trials.values(), default=0.0)


class PolicyMemory:
    """The newest policy of every model, and what the safety margin cost on average in the last day."""

    def __init__(self) -> None:
        self._newest: dict[str, Policy] = {}
        self._margin_g: dict[str, float] = {}

    def update(self, policy: Policy) -> None:
        """Take in a policy; the previous one served until it was made."""
        before = self._newest.get(policy.model)
        if before is not None and policy.version <= before.version:
            return
        if before is not None and before.margin_g_per_request is not None and policy.model in self._margin_g:
            elapsed = max(policy.created_at - before.created_at, timedelta())
            kept = math.exp(-elapsed / MARGIN_MEMORY)
            mean_g = self._margin_g[policy.model]
            self._margin_g[policy.model] = kept * mean_g + (1.0 - kept) * before.margin_g_per_request
        elif policy.margin_g_per_request is not None:
            self._margin_g[policy.model] = policy.margin_g_per_request
        self._newest[policy.model] = policy

    def bounds(self, model: str, metric: str) -> bool:
        """Whether the current policy limits a metric."""
        policy = self._newest.get(model)
        return policy is not None and policy.bounds.get(metric, 0.0) > 0.0

    def settled(self, model: str, now: datetime) -> frozenset[str]:
        """Groups in which further verdicts would change nothing, under every policy of the last day."""
        policy = self._newest.get(model)
        if policy is None or policy.valid_until < now:
            return frozenset()
        return frozenset(group for group, since in policy.settled.items() if now - since >= SETTLED_FOR)

    def uncertainty(self, model: str) -> Uncertainty | None:
        """What uncertainty costs; None if no policy says so, or the reference serves because too little is known."""
        policy, margin_g = self._newest.get(model), self._margin_g.get(model)
        if policy is None or margin_g is None or policy.status == "reference":
            return None
        return Uncertainty(margin_g, judged_prompts(policy.inputs.estimates))
