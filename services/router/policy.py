"""Decides how a request is served: the current policy, the prompt group of the request, and the draw of an option.

The draw depends only on the request's record, the model and a secret key of the deployment, so a redelivered request
draws the same option, and no client can choose its draw. The response states the drawn option, its probability and the
distribution it was drawn from: savings are estimated from them.
Without a usable policy, requests are served by the reference (baseline, no directive), so quality is never at risk.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final, Literal

from shared.carbon import LatestIntensities
from shared.fleet import Fleet
from shared.grouping import DEFAULT_GROUP, PromptGroups, prompt_text, unpack
from shared.hashing import uniform
from shared.messages import (
    FORBIDDEN,
    Decision,
    GenerationRequest,
    Policy,
    PromptGrouping,
    option_key,
    split_option,
)
from shared.messages.generation import DecisionSource
from shared.runtime.logs import get_logger

FallbackReason = Literal["no_policy", "expired", "unknown_options", "stale_intensity"]
"""Reason why a model has no usable policy."""

GROUP_VERSIONS_KEPT: Final = 3
"""Versions of each model's prompt groups that are kept: a policy refers to a new version some time later."""

_OPTION_SALT: Final = "option:"

_log = get_logger(__name__)


class UnknownLevelError(ValueError):
    """A request forces or forbids a directive level that cannot be; the message names the available ones."""


@dataclass(frozen=True, slots=True)
class ActivePolicy:
    """The usable policy of a model.

    Attributes:
        policy: None if there is none.
        fallback: the reason why there is none.
    """

    policy: Policy | None
    fallback: FallbackReason | None = None


@dataclass(frozen=True, slots=True)
class GroupAssignment:
    """The prompt group of a request.

    Attributes:
        group: name of the group.
        probabilities: the policy's probabilities by option for this group; None without a policy.
        unknown_version: the prompt groups of the policy are not loaded here.
    """

    group: str
    probabilities: dict[str, float] | None
    unknown_version: bool = False


class PromptGroupCache:
    """The newest versions of the prompt groups of every model, from the compacted topic `prompt-groups`."""

    def __init__(self) -> None:
        self._versions: dict[str, dict[str, PromptGroups]] = {}
        self._newest: dict[str, PromptGrouping] = {}

    def update(self, grouping: PromptGrouping) -> bool:
        """Store a version unless a newer one is known.

        Returns:
            Whether it was stored.

        Raises:
            GroupingError: it cannot be used; what was known stays valid.
        """
        known = self._newest.get(grouping.model)
        if known is not None and grouping.learned_at <= known.learned_at:
            return False
        groups = None if grouping.version is None else unpack(grouping)
        self._newest[grouping.model] = grouping.model_copy(update={"arrays": {}, "evidence": (), "taken": ()})
        if grouping.version is None or groups is None:
            return True
        versions = self._versions.setdefault(grouping.model, {})
        versions[grouping.version] = groups
        while len(versions) > GROUP_VERSIONS_KEPT:
            del versions[next(iter(versions))]
        return True

    def assign(self, request: GenerationRequest, *, model: str, policy: Policy | None) -> GroupAssignment:
        """Assign a request to a prompt group: by the version that the policy names, otherwise by its task label.

        A version of groups takes the label into account.
        """
        version = self._newest_version(model) if policy is None else policy.group_version
        groups = self._versions.get(model, {}).get(version or "")
        if groups is not None:
            group = groups.assign(prompt_text(request.conversation()), request.task)
        else:
            group = request.task or DEFAULT_GROUP
        if policy is None:
            return GroupAssignment(group, None)
        if version is not None and groups is None:
            return GroupAssignment(group, policy.overall, unknown_version=True)
        return GroupAssignment(group, policy.row(group))

    def _newest_version(self, model: str) -> str | None:
        newest = self._newest.get(model)
        return None if newest is None else newest.version


@dataclass(frozen=True, slots=True)
class _CachedPolicy:
    policy: Policy
    served: bool
    """Whether the fleet serves all options of the policy."""


class PolicyCache:
    """The newest policy of every model, and the state that decides whether it is usable.

    Attributes:
        groups: prompt groups, which policies refer to.
        intensities: carbon intensities of all zones.
    """

    def __init__(self, fleet: Fleet, *, max_intensity_age_s: float | None) -> None:
        """Create an empty cache.

        Args:
            max_intensity_age_s: event seconds after which a carbon intensity is stale; None: never.
        """
        self.groups = PromptGroupCache()
        self.intensities = LatestIntensities()
        self._fleet = fleet
        self._max_intensity_age_s = max_intensity_age_s
        self._zones = {model.name: {pool.zone for pool in fleet.pools_of(model.name)} for model in fleet.models}
        self._policies: dict[str, _CachedPolicy] = {}

    def update(self, policy: Policy) -> bool:
        """Store a policy unless a newer one of its model is known.

        The time of creation decides, not the version: an optimizer that lost its state restarts the versions.

        Returns:
            Whether it was stored.
        """
        known = self.policy(policy.model)
        if known is not None and (policy.created_at, policy.version) <= (known.created_at, known.version):
            return False
        self._policies[policy.model] = _CachedPolicy(policy, self._serves(policy))
        return True

    def active(self, model: str, now: datetime) -> ActivePolicy:
        """The usable policy of a model at an event time, or the reason why there is none."""
        cached = self._policies.get(model)
        if cached is None:
            return ActivePolicy(None, "no_policy")
        if now > cached.policy.valid_until:
            return ActivePolicy(None, "expired")
        if not cached.served:
            return ActivePolicy(None, "unknown_options")
        if not self._intensities_fresh(model, now):
            return ActivePolicy(None, "stale_intensity")
        return ActivePolicy(cached.policy)

    def policy(self, model: str) -> Policy | None:
        """The newest policy of a model, usable or not."""
        cached = self._policies.get(model)
        return None if cached is None else cached.policy

    def _intensities_fresh(self, model: str, now: datetime) -> bool:
        """Whether the carbon intensities of all zones that serve the model are recent."""
        if self._max_intensity_age_s is None:
            return True
        ages = [self.intensities.age_s(zone, now) for zone in self._zones.get(model, ())]
        return all(age is not None and age <= self._max_intensity_age_s for age in ages)

    def _serves(self, policy: Policy) -> bool:
        served = set(self._fleet.options_of(policy.model))
        return all(
            option in served
            for probabilities in (policy.overall, *policy.groups.values())
            for option, probability in probabilities.items()
            if probability > 0
        )


def draw(probabilities: Mapping[str, float], point: float) -> str:
    """The option whose interval contains `point`.

    The options divide [0, 1) in the order of their names, so the order of a message's fields has no effect.

    Args:
        probabilities: by option; the sum is 1 within rounding, at least one is positive.
        point: in [0, 1).
    """
    total = sum(probabilities.values())
    cumulative = 0.0
    last = ""
    for option in sorted(probabilities):
        if probabilities[option] <= 0.0:
            continue
        last = option
        cumulative += probabilities[option] / total
        if point < cumulative:
            return option
    return last


def select_option(
    *,
    record: str,
    draw_key: bytes = b"",
    model: str,
    assignment: GroupAssignment,
    policy: Policy | None,
    fleet: Fleet,
    requested_directive: str | None = None,
    zone: str | None = None,
    reference_block: bool = False,
) -> Decision:
    """Decide how a request is served.

    Args:
        record: identifies the request.
        draw_key: secret of the deployment; empty: none.
        model: a model that the fleet serves.
        assignment: the request's prompt group, with the policy's probabilities.
        policy: the usable policy of the model; None: the reference serves the request.
        requested_directive: the client's: a level that is forced, so the policy only chooses the pool, or a forbidden
            level.
        zone: of a pool of the model, in which the request must run; None: in any.
        reference_block: the whole fleet serves without Sprout: the reference serves in place of the policy.

    Raises:
        UnknownLevelError: the level does not exist, or it is forbidden and there is no other.
    """
    source: DecisionSource = "fallback" if policy is None else "policy"
    if reference_block:
        source, policy = "switchback", None
    probabilities = assignment.probabilities
    if probabilities is None or policy is None:
        probabilities = {fleet.reference_of(model): 1.0}
    if requested_directive is not None:
        probabilities = _restrict(probabilities, requested_directive, fleet.levels)
    if zone is not None:
        probabilities = _in_zone(probabilities, [pool.name for pool in fleet.pools_of(model) if pool.zone == zone])
    option = draw(probabilities, uniform(_OPTION_SALT + model, record, draw_key))
    pool, level = split_option(option)
    return Decision(
        source=source if requested_directive is None and zone is None else "forced",
        group=assignment.group,
        pool=pool,
        level=level,
        zone=fleet.pool(pool).zone,
        policy_version=None if policy is None else policy.version,
        propensity=min(1.0, probabilities[option]),
        propensities=probabilities,
    )


def _restrict(
    probabilities: Mapping[str, float], requested_directive: str, levels: tuple[str, ...]
) -> dict[str, float]:
    """The probabilities with one level forced or forbidden."""
    level = requested_directive.removeprefix(FORBIDDEN)
    if level not in levels:
        raise UnknownLevelError(
            f"'directive' {requested_directive!r} does not exist; available levels: {', '.join(levels)}. Use one of "
            "them, or omit 'directive'"
        )
    if level == requested_directive:
        return _at_level(probabilities, level)
    others = [other for other in levels if other != level]
    if not others:
        raise UnknownLevelError(f"'directive' {requested_directive!r} forbids the only level: omit 'directive'")
    left = {
        option: share for option, share in probabilities.items() if split_option(option)[1] != level and share > 0.0
    }
    if not left:
        return _at_level(probabilities, others[0])
    total = sum(left.values())
    return {option: share / total for option, share in left.items()}


def _in_zone(probabilities: Mapping[str, float], pools: Sequence[str]) -> dict[str, float]:
    """The probabilities with the options of other pools left out; all of it moved to the first pool if none is left."""
    left = {
        option: share for option, share in probabilities.items() if split_option(option)[0] in pools and share > 0.0
    }
    if left:
        total = sum(left.values())
        return {option: share / total for option, share in left.items()}
    moved: dict[str, float] = {}
    for option, probability in probabilities.items():
        key = option_key(pools[0], split_option(option)[1])
        moved[key] = min(1.0, moved.get(key, 0.0) + probability)
    return moved


def _at_level(probabilities: Mapping[str, float], level: str) -> dict[str, float]:
    """All probability moved to one level; pools keep their shares."""
    moved: dict[str, float] = {}
    for option, probability in probabilities.items():
        key = option_key(split_option(option)[0], level)
        moved[key] = min(1.0, moved.get(key, 0.0) + probability)
    return moved
