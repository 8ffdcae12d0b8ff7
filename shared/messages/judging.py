"""How the judge of an evaluation voted: counts that add up over prompts and evaluations."""

from collections.abc import Mapping
from typing import Any, Self

from pydantic import Field

from shared.messages.base import Value


class LengthSums(Value):
    """Sums over compared prompts, for the dependence of an option's preference on the length of its answers.

    x = ln(length of the option's answer / length of the reference's), d = the option's outcome minus the reference's.
    """

    prompts: int = Field(default=0, ge=0)
    x: float = 0.0
    xx: float = 0.0
    d: float = 0.0
    xd: float = 0.0

    def __add__(self, other: Self) -> "LengthSums":
        return LengthSums(**_sums(self, other))


class JudgeCard(Value):
    """Counts of a judge's votes and checks."""

    votes: int = Field(default=0, ge=0, description="Comparisons of all answers to a prompt in one order")
    unreadable: int = Field(default=0, ge=0, description="Votes that named no answer")
    positions: dict[str, int] = Field(default={}, description="Votes by the letter that they named")
    first_expected: float = Field(default=0.0, ge=0, description="Votes for A if the position had no influence")
    comparisons: int = Field(default=0, ge=0, description="Prompts whose answers were compared")
    ties: int = Field(default=0, ge=0, description="Comparisons without a majority")
    repeats: int = Field(
        default=0,
        ge=0,
        description="Pairs of votes on the same answers in different orders, of those that are always asked",
    )
    flips: int = Field(default=0, ge=0, description="Of these, pairs that named different answers")
    flips_at_random: float = Field(default=0.0, ge=0, description="The same, if votes were drawn at random")
    length_pairs: int = Field(default=0, ge=0, description="Pairs of answers of different length, one of them better")
    longer_preferred: int = Field(default=0, ge=0, description="Of these, pairs whose longer answer was better")
    gold: int = Field(
        default=0, ge=0, description="Comparisons of right with wrong answers, known without the judge, and no tie"
    )
    gold_agreeing: int = Field(default=0, ge=0, description="Of these, comparisons in which a right answer won")
    checks: int = Field(default=0, ge=0, description="Questions whether two texts mean the same")
    checks_yes: int = Field(default=0, ge=0)
    checks_open: int = Field(default=0, ge=0, description="Replies that the question has no particular answer")
    checks_unreadable: int = Field(default=0, ge=0, description="Replies of another form")
    check_repeats: int = Field(default=0, ge=0, description="Pairs of checks of the same answers in both orders")
    check_flips: int = Field(default=0, ge=0, description="Of these, pairs with different replies")
    controls_same: int = Field(default=0, ge=0, description="Control checks of a text with itself")
    controls_same_wrong: int = Field(default=0, ge=0, description="Of these, checks with the reply no")
    controls_other: int = Field(default=0, ge=0, description="Control checks with an unrelated text")
    controls_other_wrong: int = Field(default=0, ge=0, description="Of these, checks with the reply yes")
    lengths: dict[str, LengthSums] = Field(default={}, description="By option; lengths in characters")

    def __add__(self, other: Self) -> "JudgeCard":
        return JudgeCard(**_sums(self, other))


def _sums(first: Value, second: Value) -> dict[str, Any]:
    return {name: _sum(getattr(first, name), getattr(second, name)) for name in type(first).model_fields}


def _sum(first: Any, second: Any) -> Any:  # noqa: ANN401 - numbers, messages or mappings of these
    if isinstance(first, Mapping):
        both = {**first, **second}
        return {key: _sum(first[key], second[key]) if key in first and key in second else both[key] for key in both}
    return first + second
