"""Estimates the energy and carbon of an answer from the current policy, before the ledger has attributed it."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from shared.carbon import JOULES_PER_KWH
from shared.messages import Decision, OptionEstimate, Policy, Usage, option_key
from shared.messages.policies import OptionInputs


@dataclass(frozen=True, slots=True)
class Estimate:
    """Estimated energy and carbon of one answer; None where no policy says.

    Attributes:
        joules: of prompt and answer.
        grams: gCO2eq, embodied carbon included.
        source: see `schema.SproutUsage`.
    """

    joules: float | None = None
    grams: float | None = None
    source: Literal["token_price", "option_mean"] | None = None


class Estimates:
    """The newest policy of every model."""

    def __init__(self) -> None:
        self._policies: dict[str, Policy] = {}

    def update(self, policies: Iterable[Policy]) -> None:
        """Take new policies."""
        for policy in policies:
            self._policies[policy.model] = policy

    def of(self, model: str, decision: Decision | None, usage: Usage | None) -> Estimate:
        """The estimate for an answer.

        Args:
            model: logical model.
            decision: which option served it; None: no estimate.
            usage: its tokens; None: of a usual answer.
        """
        policy = self._policies.get(model)
        if policy is None or decision is None:
            return Estimate()
        option = option_key(decision.pool, decision.level)
        inputs = policy.inputs.options.get(option)
        if inputs is None:
            return Estimate()
        price = policy.inputs.prices.get(decision.pool)
        if usage is not None and price is not None and price.token_j is not None:
            prompt_tokens = usage.prompt_tokens or 0
            joules = usage.completion_tokens * price.token_j + prompt_tokens * (price.prompt_token_j or 0.0)
            server_s = usage.completion_tokens * (price.server_token_s or 0.0) + prompt_tokens * (
                price.server_prompt_token_s or 0.0
            )
        else:
            row = policy.inputs.estimates.get(decision.group, {})
            mean = row.get(option)
            if mean is None:
                return Estimate()
            return Estimate(mean.energy_kwh * JOULES_PER_KWH, _mean_grams(mean, inputs), "option_mean")
        grams = joules / JOULES_PER_KWH * inputs.g_per_kwh + server_s * inputs.embodied_g_per_s
        return Estimate(joules, grams, "token_price")

    def reference_grams(self, model: str, decision: Decision | None) -> float | None:
        """What the reference option would have taken for a usual request of the same group; None if no policy says.

        Args:
            model: logical model.
            decision: of the request.
        """
        policy = self._policies.get(model)
        if policy is None or decision is None:
            return None
        mean = policy.inputs.estimates.get(decision.group, {}).get(policy.reference)
        inputs = policy.inputs.options.get(policy.reference)
        return None if mean is None or inputs is None else _mean_grams(mean, inputs)


def _mean_grams(mean: OptionEstimate, inputs: OptionInputs) -> float:
    server_s = mean.processing_s if mean.server_s is None else mean.server_s
    return mean.energy_kwh * inputs.g_per_kwh + server_s * inputs.embodied_g_per_s
