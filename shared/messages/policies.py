"""Topic `policies`: how to draw an option."""

from typing import Literal, Self

from pydantic import Field, model_validator

from shared.messages.base import Identifier, Message, Probability, UtcDatetime, Value

PolicyStatus = Literal["optimal", "floors_dropped", "capacity_dropped", "reference"]
PROBABILITY_TOLERANCE = 1e-6


class OptionEstimate(Value):
    """What the optimizer believed of one option for one group when it solved."""

    energy_kwh: float = Field(ge=0)
    processing_s: float = Field(ge=0)
    quality: dict[str, float] = Field(description="Expected, by metric")
    doubt: dict[str, tuple[float, float, float]] = Field(
        default={},
        description="By metric, how far it may be off against the reference's: standard deviations of what is the "
        "group's own, of what it shares with its family, and of what it shares with all; none where nothing is doubted",
    )
    group_quality: dict[str, float] = Field(
        default={}, description="By metric with a group floor: what is counted on for this group by itself"
    )
    trials: float = Field(default=0.0, ge=0, description="Effective judged prompts behind the quality")
    requests: float = Field(default=0.0, ge=0, description="Effective requests behind energy and time")


class OptionInputs(Value):
    """What one option costs, whatever the group."""

    pool: Identifier
    g_per_kwh: float = Field(ge=0, description="PUE times the carbon intensity of the pool's zone")
    embodied_g_per_s: float = Field(ge=0, description="k1 of the pool")


class PolicyInputs(Value):
    """Everything that the program was solved with."""

    solved_for: UtcDatetime = Field(description="Event time of the inputs")
    intensity_g_per_kwh: dict[str, float] = Field(description="k by zone")
    k0_zone: str = Field(description="Zone whose intensity sets the bounds")
    k0_g_per_kwh: float = Field(ge=0)
    k0_min_g_per_kwh: float = Field(ge=0, description="Over the trailing window")
    k0_max_g_per_kwh: float = Field(ge=0, description="Over the trailing window")
    xi: dict[str, float] = Field(description="Largest relative loss tolerated, by metric")
    weights: dict[str, Probability] = Field(description="Traffic share by group")
    families: dict[str, str] = Field(default={}, description="Of groups that are about alike things, by group")
    cautions: dict[str, float] = Field(
        default={},
        description="By metric, standard deviations of all traffic's quality taken off what is expected",
    )
    estimates: dict[str, dict[str, OptionEstimate]] = Field(description="By group, then option")
    holdout: Probability
    options: dict[str, OptionInputs] = Field(
        default={}, description="By option that has a known price; empty in policies of the first release"
    )
    floors: dict[str, Probability] = Field(
        default={}, description="Minimum quality of every group relative to the reference's, by metric"
    )
    capacities: dict[str, float] = Field(default={}, description="Concurrent requests by pool with a limit")
    requests_per_s: float = Field(default=0.0, ge=0, description="Request rate that capacities are compared with")


class Policy(Message):
    """Probabilities of every option for every prompt group of one model."""

    model: Identifier
    version: int = Field(ge=1, description="Grows by one with every policy of the model")
    group_version: str | None = Field(default=None, description="Version of the learned groups; null: task labels")
    created_at: UtcDatetime
    valid_until: UtcDatetime = Field(description="After this the router serves the reference")
    status: PolicyStatus
    reason: str = Field(description="Why it was solved, and what was relaxed")
    reference: str = Field(description="Option served without a policy and held out from optimisation")
    groups: dict[str, dict[str, Probability]] = Field(description="By group, then option")
    overall: dict[str, Probability] = Field(description="Row for a group that the policy does not name")
    bounds: dict[str, float] = Field(description="Quality relative to the reference that was required, by metric")
    expected_quality: dict[str, float] = Field(description="Quality relative to the reference counted on, by metric")
    expected_g_per_request: float = Field(ge=0)
    reference_g_per_request: float = Field(ge=0, description="The same traffic, all on the reference option")
    inputs: PolicyInputs

    @model_validator(mode="after")
    def _rows_are_distributions(self) -> Self:
        for name, row in [("overall", self.overall), *self.groups.items()]:
            total = sum(row.values())
            if abs(total - 1.0) > PROBABILITY_TOLERANCE:
                raise ValueError(f"probabilities of {name!r} must sum to 1, got {total:.6f}")
        return self

    def row(self, group: str) -> dict[str, float]:
        """Probabilities by option for a prompt group; the overall row where the group is unknown."""
        return self.groups.get(group, self.overall)
