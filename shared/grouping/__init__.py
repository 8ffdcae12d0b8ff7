"""Prompt groups that are learned from prompts: prompts in one group react alike to directives."""

from shared.grouping.features import FEATURES, feature_count, features, prompt_text
from shared.grouping.groups import CLASSIFIER, PromptGroups
from shared.grouping.packing import GroupingError, pack, unpack

__all__ = [
    "CLASSIFIER",
    "FEATURES",
    "GroupingError",
    "PromptGroups",
    "feature_count",
    "features",
    "pack",
    "prompt_text",
    "unpack",
]
