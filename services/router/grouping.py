"""Which prompt group a request belongs to: prompts that react alike to directives.

A policy says by which version of learned groups its rows go, or that they go by the producers' task labels. A router
that does not have that version serves by the policy's row for all traffic.
"""

from dataclasses import dataclass
from typing import Final

from shared.grouping import GroupingError, PromptGroups, prompt_text, unpack
from shared.messages import GenerationRequest, Policy, PromptGrouping
from shared.runtime.logs import get_logger

DEFAULT_GROUP: Final = "default"
"""The group of a request whose task is not known."""

VERSIONS_KEPT: Final = 3
"""Of each model's learned groups: policies follow a new version a moment later."""

_log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Assignment:
    """Where a request belongs.

    Attributes:
        group: its prompt group.
        row: of the policy, to draw from; null without a policy.
        missing: the policy goes by learned groups that are not known here.
    """

    group: str
    row: dict[str, float] | None
    missing: bool = False


class LearnedGroups:
    """The newest versions of every model's learned groups."""

    def __init__(self) -> None:
        self._versions: dict[str, dict[str, PromptGroups]] = {}
        self._newest: dict[str, PromptGrouping] = {}

    def learn(self, grouping: PromptGrouping) -> bool:
        """Take a version unless a newer one is known; returns whether it was taken."""
        known = self._newest.get(grouping.model)
        if known is not None and grouping.learned_at <= known.learned_at:
            return False
        self._newest[grouping.model] = grouping.model_copy(update={"arrays": {}, "evidence": (), "taken": ()})
        if grouping.version is None:
            return True
        try:
            groups = unpack(grouping)
        except GroupingError as error:
            _log.error("learned prompt groups cannot be used", model=grouping.model, reason=str(error))
            return False
        versions = self._versions.setdefault(grouping.model, {})
        versions[grouping.version] = groups
        while len(versions) > VERSIONS_KEPT:
            del versions[next(iter(versions))]
        return True

    def assign(self, request: GenerationRequest, *, model: str, policy: Policy | None) -> Assignment:
        """The group of a request, and the policy's row for it."""
        version = self._newest_version(model) if policy is None else policy.group_version
        groups = self._versions.get(model, {}).get(version or "")
        if groups is not None:
            group = groups.assign(prompt_text(request.conversation()))
        else:
            group = request.task or DEFAULT_GROUP
        if policy is None:
            return Assignment(group, None)
        if version is not None and groups is None:
            return Assignment(group, policy.overall, missing=True)
        return Assignment(group, policy.row(group))

    def _newest_version(self, model: str) -> str | None:
        newest = self._newest.get(model)
        return None if newest is None else newest.version
