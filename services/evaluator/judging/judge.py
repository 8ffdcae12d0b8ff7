"""What a judge is: whoever names the best of several answers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from services.evaluator.spending import Call, Errand


class JudgeError(RuntimeError):
    """The judge could not be asked; the message says why and quotes neither prompt nor answer."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """What is asked of a judge.

    Attributes:
        question: the conversation that was answered, as text.
        answers: 2 to 8, in the order in which they are to be shown.
        reference: the right answer, where it is known.
    """

    question: str
    answers: Sequence[str]
    reference: str | None = None


@dataclass(frozen=True, slots=True)
class Opinion:
    """A judge's answer.

    Attributes:
        choice: the position it named; null: no usable verdict.
        call: what it took; null where the judge runs on no server of the fleet.
    """

    choice: int | None
    call: Call | None = None


class Judge(Protocol):
    """Names the best of several answers."""

    async def best(self, comparison: Comparison, errand: Errand) -> Opinion:
        """Ask once.

        Raises:
            JudgeError: there was no answer at all.
        """
