"""What the router last heard of policies and carbon intensities, and whether it may be followed now.

Quality comes first: whatever is doubtful leads to the reference.
"""

from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from services.router.grouping import LearnedGroups
from shared.fleet import Fleet
from shared.messages import CarbonIntensity, Policy

FallbackReason = Literal["no_policy", "expired", "unknown_options", "stale_intensity"]
"""Why there is no policy to follow."""


@dataclass(frozen=True, slots=True)
class Standing:
    """How things stand for a model.

    Attributes:
        policy: to be followed; null where there is none.
        fallback: why there is none.
    """

    policy: Policy | None
    fallback: FallbackReason | None = None


@dataclass(frozen=True, slots=True)
class _Known:
    policy: Policy
    served: bool
    """The fleet serves all its options."""


class Knowledge:
    """The newest policy of every model and the newest intensity of every zone.

    Attributes:
        groups: learned prompt groups, which policies refer to.
    """

    def __init__(self, fleet: Fleet, *, max_intensity_age_s: float | None) -> None:
        """Begin without any.

        Args:
            max_intensity_age_s: event seconds after which an intensity is stale; null: never.
        """
        self.groups = LearnedGroups()
        self._fleet = fleet
        self._max_age_s = max_intensity_age_s
        self._zones = {model.name: {pool.zone for pool in fleet.pools_of(model.name)} for model in fleet.models}
        self._policies: dict[str, _Known] = {}
        self._intensities: dict[str, CarbonIntensity] = {}

    def learn_policy(self, policy: Policy) -> bool:
        """Take a policy unless a newer one of its model is known; returns whether it was taken.

        Newer is what was made later, not what has the higher version: an optimizer that lost its state begins to count
        again.
        """
        known = self.policy(policy.model)
        if known is not None and (policy.created_at, policy.version) <= (known.created_at, known.version):
            return False
        self._policies[policy.model] = _Known(policy, self._serves(policy))
        return True

    def learn_intensity(self, intensity: CarbonIntensity) -> bool:
        """Take an intensity unless a later one of its zone is known; returns whether it was taken."""
        known = self._intensities.get(intensity.zone)
        if known is not None and (intensity.latest.at, intensity.published_at) <= (known.latest.at, known.published_at):
            return False
        self._intensities[intensity.zone] = intensity
        return True

    def standing(self, model: str, now: datetime) -> Standing:
        """The policy to follow for a model at an event time, or why there is none."""
        known = self._policies.get(model)
        if known is None:
            return Standing(None, "no_policy")
        if now > known.policy.valid_until:
            return Standing(None, "expired")
        if not known.served:
            return Standing(None, "unknown_options")
        if not self._fresh(model, now):
            return Standing(None, "stale_intensity")
        return Standing(known.policy)

    def policy(self, model: str) -> Policy | None:
        """The newest policy of a model, valid or not."""
        known = self._policies.get(model)
        return None if known is None else known.policy

    def intensity_age_s(self, zone: str, now: datetime) -> float | None:
        """Event seconds since the period that a zone's newest intensity describes began; null when none is known."""
        known = self._intensities.get(zone)
        return None if known is None else (now - known.latest.at).total_seconds()

    def _fresh(self, model: str, now: datetime) -> bool:
        """Whether the intensities behind the model's policy are recent: of all zones that the model is served in."""
        if self._max_age_s is None:
            return True
        ages = [self.intensity_age_s(zone, now) for zone in self._zones.get(model, ())]
        return all(age is not None and age <= self._max_age_s for age in ages)

    def _serves(self, policy: Policy) -> bool:
        served = set(self._fleet.options_of(policy.model))
        return all(
            option in served
            for row in (policy.overall, *policy.groups.values())
            for option, probability in row.items()
            if probability > 0
        )
