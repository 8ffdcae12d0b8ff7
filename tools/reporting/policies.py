"""The policies that requests were drawn from: their reference, and what they promised when they were solved."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime

from shared.messages import Policy


@dataclass(frozen=True, slots=True)
class PolicyBook:
    """Policies by model and version."""

    by_version: Mapping[tuple[str, int], Policy]

    @classmethod
    def of(cls, policies: Iterable[Policy]) -> "PolicyBook":
        """A book of these policies."""
        ordered = sorted(policies, key=lambda policy: (policy.model, policy.version))
        return cls({(policy.model, policy.version): policy for policy in ordered})

    def __len__(self) -> int:
        return len(self.by_version)

    def get(self, model: str, version: int) -> Policy | None:
        """A policy; None where the book does not have it."""
        return self.by_version.get((model, version))

    def reference_of(self, model: str, version: int) -> str | None:
        """The reference option under a policy; the model's latest one where that policy is not in the book."""
        policy = self.get(model, version)
        if policy is not None:
            return policy.reference
        known = [policy for (name, _), policy in self.by_version.items() if name == model]
        return known[-1].reference if known else None

    def created_between(self, since: datetime | None, until: datetime | None, model: str | None) -> list[Policy]:
        """The policies published in a period, [since, until)."""
        return [
            policy
            for policy in self.by_version.values()
            if (since is None or policy.created_at >= since)
            and (until is None or policy.created_at < until)
            and (model is None or policy.model == model)
        ]
