"""Learned prompt groups: prompts of one group react alike to directives."""

from shared.grouping.features import FEATURES, PromptFeatures, extract_features, prompt_text
from shared.grouping.model import CLASSIFIER, DEFAULT_GROUP, FeatureScaling, PromptGroups
from shared.grouping.packing import GroupingError, pack, unpack

__all__ = [
    "CLASSIFIER",
    "DEFAULT_GROUP",
    "FEATURES",
    "FeatureScaling",
    "GroupingError",
    "PromptFeatures",
    "PromptGroups",
    "extract_features",
    "pack",
    "prompt_text",
    "unpack",
]
