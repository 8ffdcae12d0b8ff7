"""A generated prompt with its answers, as a family of `calculation.py`, `knowledge.py` or `writing.py` writes it."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One prompt. Answers are texts in which `{a}` stands for what is answered: `right`, or `wrong` in a wrong answer.

    Attributes:
        right: the right answer; None: the question has no particular one.
        wrong: a plausible mistake.
        full: the answer without a directive; up to two sentences of `more` follow.
        steps: the answer to the concise-reasoning directive; `brief` follows where there is a right answer.
        brief, shortest: the answers to "briefly" and "very briefly".
    """

    prompt: str
    right: str | None = None
    wrong: str | None = None
    full: str
    more: Sequence[str] = ()
    steps: str
    brief: str
    shortest: str

    def text(self, style: str, *, wrong: bool, chance: random.Random) -> str:
        """An answer in one of the four styles.

        Args:
            style: `full`, `steps`, `brief` or `shortest`.
            chance: chooses among the further sentences of `full`.
        """
        text: str = getattr(self, style)
        if style == "full":
            text = " ".join([text, *chance.sample(self.more, chance.randint(0, min(2, len(self.more))))])
        elif style == "steps" and self.right is not None:
            text = f"{text} {self.brief}"
        answered = (self.wrong if wrong else self.right) or ""
        return text.replace("{a}", answered)


Family = Callable[[random.Random], Case]
"""Writes a case from random numbers; the same numbers give the same case."""


def other(chance: random.Random, values: Sequence[T], *taken: T) -> T:
    """One of the values that is not taken."""
    return chance.choice([value for value in values if value not in taken])
