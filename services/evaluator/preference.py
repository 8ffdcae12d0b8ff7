"""The metric `preference`: a judge compares the answers in every position, and the majority of the votes decides.

Orders that cannot change the verdict are not asked: of three, the third only if the first two votes differ. A hash
chooses with which order to begin, so that over the prompts every answer is shown in every position equally often.

A judge that only considers the position names another answer in each rotation, so no answer gets a majority: a tie, in
which the answers share the win in proportion to their votes (docs/decisions/0037-correctness-and-the-judges-card.md).

The metric `not_worse` compares every answer with the reference option's alone, in both orders. If both votes name the
reference option's answer, the other one is worse; a tie counts as not worse. So an option's quality does not depend on
which other options there are, as its share of an n-way choice does (docs/decisions/0044-not-worse.md).
"""

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from services.evaluator.card import card_of_votes
from services.evaluator.cost import CallContext
from services.evaluator.generate import all_or_first_error
from services.evaluator.judges import DEFAULT_RUBRIC, LETTERS, Judge, JudgeTask, JudgeVote, majority, question_text
from services.evaluator.metrics import EvaluatorMetrics
from shared.hashing import uniform
from shared.messages import Sample

NOT_WORSE: Final = "not_worse"

PREFERENCE: Final = "preference"

_SALT: Final = "first order"


@dataclass(frozen=True, slots=True)
class Verdict:
    """Result of the votes on one prompt.

    Attributes:
        shares: of the win, by answer: its indices (several with the same text), its share. One answer with a majority
            of the votes, several in a tie; empty: no verdict, because too few votes could be read.
        votes: votes that named an answer, of the orders that were asked.
        agreeing: votes that named the winner; 0 without a majority.
    """

    shares: tuple[tuple[tuple[int, ...], float], ...]
    votes: int
    agreeing: int

    @property
    def is_tie(self) -> bool:
        """Whether no answer has a majority."""
        return len(self.shares) > 1

    def outcomes(self, answers: int) -> list[float]:
        """Outcome of each of the answers: its share, divided among those with the same text."""
        found = {index: share / len(same) for same, share in self.shares for index in same}
        return [found.get(index, 0.0) for index in range(answers)]


class Comparison:
    """Position-balanced comparison of the answers to one prompt."""

    def __init__(self, answers: Sequence[str]) -> None:
        """Prepare.

        Args:
            answers: as generated. Answers that differ only in white space are shown once and win together.
        """
        indices: dict[str, list[int]] = {}
        for index, answer in enumerate(answers):
            indices.setdefault(" ".join(answer.split()), []).append(index)
        self._indices = [tuple(same) for same in indices.values()]
        self._texts = [answers[same[0]] for same in self._indices]

    def orders(self, draw: float = 0.0) -> list[tuple[int, ...]]:
        """All cyclic rotations of the distinct answers, as indices into them; empty if there is only one.

        Args:
            draw: in [0, 1); chooses the first rotation.
        """
        count = len(self._texts)
        first = int(draw * count)
        return [
            tuple((first + shift + step) % count for step in range(count)) for shift in range(count if count > 1 else 0)
        ]

    @staticmethod
    def is_decided(orders: Sequence[Sequence[int]], choices: Sequence[int | None]) -> bool:
        """Whether votes on the first orders, all for the same answer, decide whatever the others would be."""
        named = {None if choice is None else order[choice] for order, choice in zip(orders, choices, strict=False)}
        return None not in named and len(named) == 1 and len(choices) >= majority(len(orders))

    def shown(self, order: Sequence[int]) -> tuple[str, ...]:
        """The answers in the order of a rotation."""
        return tuple(self._texts[index] for index in order)

    def verdict(self, orders: Sequence[Sequence[int]], choices: Sequence[int | None]) -> Verdict:
        """Count the votes. An answer wins with more than half of all rotations; otherwise votes share the win.

        There is no verdict if half of the votes or more named no answer.

        Args:
            orders: all of them.
            choices: for each of the orders, or for the first ones that decide, the position that the judge named; None:
                it named no answer.
        """
        if not orders:
            return Verdict(((self._indices[0], 1.0),), votes=0, agreeing=0)
        named = Counter(
            order[position] for order, position in zip(orders, choices, strict=False) if position is not None
        )
        votes, most = sum(named.values()), max(named.values(), default=0)
        if 2 * votes <= len(orders):
            return Verdict((), votes=votes, agreeing=0)
        if 2 * most > len(orders):
            winner = max(named, key=named.__getitem__)
            return Verdict(((self._indices[winner], 1.0),), votes=votes, agreeing=most)
        shares = tuple((self._indices[text], count / votes) for text, count in sorted(named.items()))
        return Verdict(shares, votes=votes, agreeing=0)


class PreferenceMetric:
    """Which answer the judge prefers; see `QualityMetric`."""

    name: Final = PREFERENCE

    def __init__(
        self, judge: Judge, metrics: EvaluatorMetrics, *, rubric: str | None = None, draw_key: bytes = b""
    ) -> None:
        """Create.

        Args:
            rubric: what makes an answer the best one; None: `DEFAULT_RUBRIC`.
            draw_key: secret of the deployment, for the order that is asked first; empty: none.
        """
        self._judge = judge
        self._metrics = metrics
        self._rubric = rubric or DEFAULT_RUBRIC
        self._draw_key = draw_key

    async def score(self, sample: Sample, answers: Sequence[str], context: CallContext) -> list[float] | None:
        """Compare the answers: the winner's outcome is 1; winners with the same text share it, and so
        do the answers of a tie.

        Raises:
            JudgeError: a vote failed.
        """
        comparison = Comparison(answers)
        orders = comparison.orders(uniform(_SALT, sample.identity, self._draw_key))
        first = majority(len(orders)) if orders else 0
        choices = await self._ask(comparison, orders[:first], sample, context)
        if not comparison.is_decided(orders, choices):
            choices += await self._ask(comparison, orders[first:], sample, context)
        verdict = comparison.verdict(orders, choices)
        context.work.card += card_of_votes(orders[: len(choices)], choices, tie=verdict.is_tie)
        if not verdict.shares:
            return None
        if not verdict.is_tie:
            self._metrics.judge_votes.labels("yes").inc(verdict.agreeing)
            self._metrics.judge_votes.labels("no").inc(verdict.votes - verdict.agreeing)
        return verdict.outcomes(len(answers))

    async def _ask(
        self, comparison: Comparison, orders: Sequence[Sequence[int]], sample: Sample, context: CallContext
    ) -> list[int | None]:
        """The position that the judge names in each of some orders; waits for all votes even if one fails."""
        question = question_text(sample.messages)
        replies = await asyncio.gather(
            *(
                self._judge.reply(JudgeTask(question, comparison.shown(order)).messages(self._rubric), context)
                for order in orders
            ),
            return_exceptions=True,
        )
        context.work.judgements += sum(isinstance(one, str) for one in replies)
        votes = [JudgeVote.parse(one, answers=len(orders[0])) for one in all_or_first_error(replies)]
        for vote in votes:
            self._metrics.judge_positions.labels("none" if vote.choice is None else LETTERS[vote.choice]).inc()
        return [one.choice for one in votes]


class NotWorseMetric:
    """Which answers are not worse than the reference option's; see `QualityMetric`."""

    name: Final = NOT_WORSE

    def __init__(self, preference: PreferenceMetric, *, asks_judge: Callable[[str], bool]) -> None:
        """Create.

        Args:
            preference: compares two answers.
            asks_judge: whether the judge may be asked about a model's answers; if not, the metric is undefined.
        """
        self._preference = preference
        self._asks_judge = asks_judge

    async def score(self, sample: Sample, answers: Sequence[str], context: CallContext) -> list[float] | None:
        """1 for an answer that is not worse, 0 for a worse one; the reference option's is the first, and has 1.

        None if one of the comparisons has no verdict.

        Raises:
            JudgeError: a vote failed.
        """
        if not self._asks_judge(context.model):
            return None
        reference = answers[0]
        others = list(dict.fromkeys(answers[1:]))
        replies = await asyncio.gather(
            *(self._preference.score(sample, (reference, one), context) for one in others), return_exceptions=True
        )
        outcomes = {reference: 1.0}
        for answer, shares in zip(others, all_or_first_error(replies), strict=True):
            if shares is None:
                return None
            outcomes[answer] = float(shares[1] >= shares[0])
        return [outcomes[answer] for answer in answers]
