"""One prompt's verdict: every answer is shown once in every position, and the majority of the readings decides.

A judge that goes by position alone names another answer in each rotation, so that none has a majority and the prompt
abstains: position bias costs prompts, and never a wrong verdict.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the readings of one prompt came to.

    Attributes:
        winners: places of the answers that won: one, or several that are the same text; empty: an abstention.
        votes: readings that named an answer.
        agreeing: of these, how many named the winner.
    """

    winners: tuple[int, ...]
    votes: int
    agreeing: int


class Ballot:
    """The orders in which to show the answers to one prompt, and what follows from the judge's choices."""

    def __init__(self, answers: Sequence[str]) -> None:
        """Prepare.

        Args:
            answers: as generated; those that differ in blank space only are shown once, and win together.
        """
        places: dict[str, list[int]] = {}
        for place, answer in enumerate(answers):
            places.setdefault(" ".join(answer.split()), []).append(place)
        self._places = [tuple(same) for same in places.values()]
        self._texts = [answers[same[0]] for same in self._places]

    def orders(self) -> list[tuple[int, ...]]:
        """All cyclic rotations of the distinct answers, each as indices into them; empty if there is but one."""
        count = len(self._texts)
        return [tuple((start + step) % count for step in range(count)) for start in range(count if count > 1 else 0)]

    def shown(self, order: Sequence[int]) -> tuple[str, ...]:
        """The answers in the order of a rotation."""
        return tuple(self._texts[index] for index in order)

    def verdict(self, choices: Sequence[int | None]) -> Verdict:
        """Count the choices.

        Args:
            choices: for each of `orders`, the position that the judge named; null where it named none.
        """
        orders = self.orders()
        if not orders:
            return Verdict(self._places[0], votes=0, agreeing=0)
        named = Counter(
            order[position] for order, position in zip(orders, choices, strict=True) if position is not None
        )
        votes = sum(named.values())
        best, agreeing = max(named.items(), key=lambda item: item[1], default=(0, 0))
        if 2 * agreeing <= len(orders):
            return Verdict((), votes=votes, agreeing=0)
        return Verdict(self._places[best], votes=votes, agreeing=agreeing)
