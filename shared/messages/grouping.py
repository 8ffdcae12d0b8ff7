"""Topic `prompt-groups`: prompt groups learned from judged prompts, with what is known of them."""

from typing import Literal, Self

from pydantic import Field, model_validator

from shared.messages.base import Identifier, Message, Probability, UtcDatetime, Value
from shared.messages.evaluation import QualityCount


class PackedArray(Value):
    """An array: little-endian bytes in C order, compressed by zlib, in base64."""

    dtype: Literal["<f2", "<f4", "<f8", "<i8"]
    shape: tuple[int, ...]
    data: str = Field(repr=False)


class GroupEvidence(Value):
    """What evaluations of one day found, counted by the learned groups."""

    evaluated_at: UtcDatetime = Field(description="Event time that the counts are forgotten from")
    counts: tuple[QualityCount, ...]


class GroupTaken(Value):
    """What the judged answers of one group under one option took."""

    group: Identifier
    option: str = Field(description="`<pool>/<level>`")
    requests: float = Field(gt=0)
    energy_kwh: float = Field(ge=0)
    processing_s: float = Field(ge=0)


class PromptGrouping(Message):
    """A version of a model's prompt groups; the newest is in force once a policy refers to it.

    It restates all that was judged by the new groups, so that a reader needs nothing that was counted by others.
    Without a version there are no learned groups: a request's group is its task label.
    """

    model: Identifier
    version: Identifier | None = Field(description="Names the version; null: learned groups are given up")
    learned_at: UtcDatetime
    prompts: int = Field(default=0, ge=0, description="Judged prompts learned from")
    names: tuple[Identifier, ...] = Field(default=(), description="Of the groups; no two versions share one")
    families: dict[str, Identifier] = Field(
        default={}, description="By group: the family of groups that are about alike things; none: all are of one"
    )
    features: int = Field(default=0, ge=0, description="Version of the features that prompts are described by")
    classifier: int = Field(default=1, ge=1, description="Version of how a prompt's group is found")
    arrays: dict[str, PackedArray] = Field(default={}, description="The classifier: see shared/grouping/packing.py")
    traffic: dict[str, Probability] = Field(default={}, description="Share of the traffic by group, as sampled")
    evidence: tuple[GroupEvidence, ...] = Field(default=(), description="Oldest first")
    taken: tuple[GroupTaken, ...] = ()

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.version is not None and not (self.names and self.arrays):
            raise ValueError("a version of prompt groups must carry 'names' and 'arrays'")
        return self
