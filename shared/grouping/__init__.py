"""Prompt groups that are learned from prompts: prompts in one group react alike to directives."""

from shared.grouping.features import feature_count, features
from shared.grouping.groups import PromptGroups

__all__ = ["PromptGroups", "feature_count", "features"]
