"""The messages of every topic, as pydantic models. JSON on the wire, additive evolution, UTC timestamps."""

from shared.messages.base import Message, UtcDatetime, Value, option_key, split_option
from shared.messages.carbon import CarbonIntensity, IntensityPoint
from shared.messages.dead_letters import DeadLetter
from shared.messages.evaluation import EvaluationCost, Paired, Quality, QualityCount, Sample, UsageRecord
from shared.messages.footprints import Footprint
from shared.messages.grouping import GroupEvidence, GroupTaken, PackedArray, PromptGrouping
from shared.messages.policies import OptionEstimate, Policy, PolicyInputs
from shared.messages.requests import ChatMessage, GenerationRequest, SamplingParameters
from shared.messages.responses import (
    Decision,
    ErrorDetail,
    GenerationResponse,
    ResponseChunk,
    Timing,
    Usage,
)

__all__ = [
    "CarbonIntensity",
    "ChatMessage",
    "DeadLetter",
    "Decision",
    "ErrorDetail",
    "EvaluationCost",
    "Footprint",
    "GenerationRequest",
    "GenerationResponse",
    "GroupEvidence",
    "GroupTaken",
    "IntensityPoint",
    "Message",
    "OptionEstimate",
    "PackedArray",
    "Paired",
    "Policy",
    "PolicyInputs",
    "PromptGrouping",
    "Quality",
    "QualityCount",
    "ResponseChunk",
    "Sample",
    "SamplingParameters",
    "Timing",
    "Usage",
    "UsageRecord",
    "UtcDatetime",
    "Value",
    "option_key",
    "split_option",
]
