"""The metric `preference`: a judge compares the answers in every position, and the majority of the votes decides.

A judge that only considers the position names another answer in each rotation, so no answer gets a majority and the
prompt has no verdict. Position bias costs prompts, but it causes no wrong verdict.
"""

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from services.evaluator.cost import CallContext
from services.evaluator.generate import all_or_first_error
from services.evaluator.judges import LETTERS, Judge, JudgeTask, JudgeVote, question_text
from services.evaluator.metrics import EvaluatorMetrics
from shared.messages import Sample

PREFERENCE: Final = "preference"


@dataclass(frozen=True, slots=True)
class Verdict:
    """Result of the votes on one prompt.

    Attributes:
        winners: indices of the winning answers: one, or several with the same text; empty: no verdict.
        votes: votes that named an answer.
        agreeing: votes that named the winner.
    """

    winners: tuple[int, ...]
    votes: int
    agreeing: int


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

    def orders(self) -> list[tuple[int, ...]]:
        """All cyclic rotations of the distinct answers, as indices into them; empty if there is only one."""
        count = len(self._texts)
        return [tuple((start + step) % count for step in range(count)) for start in range(count if count > 1 else 0)]

    def shown(self, order: Sequence[int]) -> tuple[str, ...]:
        """The answers in the order of a rotation."""
        return tuple(self._texts[index] for index in order)

    def verdict(self, choices: Sequence[int | None]) -> Verdict:
        """Count the votes. An answer wins with more than half of all rotations.

        Args:
            choices: for each of `orders`, the position that the judge named; None: it named no answer.
        """
        orders = self.orders()
        if not orders:
            return Verdict(self._indices[0], votes=0, agreeing=0)
        named = Counter(
            order[position] for order, position in zip(orders, choices, strict=True) if position is not None
        )
        votes = sum(named.values())
        best, agreeing = max(named.items(), key=lambda item: item[1], default=(0, 0))
        if 2 * agreeing <= len(orders):
            return Verdict((), votes=votes, agreeing=0)
        return Verdict(self._indices[best], votes=votes, agreeing=agreeing)


class PreferenceMetric:
    """Which answer the judge prefers; see `QualityMetric`."""

    name: Final = PREFERENCE

    def __init__(self, judge: Judge, metrics: EvaluatorMetrics) -> None:
        self._judge = judge
        self._metrics = metrics

    async def score(self, sample: Sample, answers: Sequence[str], context: CallContext) -> list[float] | None:
        """Compare the answers: the winner's outcome is 1; winners with the same text share it.

        Raises:
            JudgeError: a vote failed.
        """
        comparison = Comparison(answers)
        question = question_text(sample.messages)
        replies = await asyncio.gather(
            *(self._judge.vote(JudgeTask(question, comparison.shown(order)), context) for order in comparison.orders()),
            return_exceptions=True,
        )
        context.work.judgements += sum(isinstance(one, JudgeVote) for one in replies)
        votes = all_or_first_error(replies)
        for vote in votes:
            self._metrics.judge_positions.labels("none" if vote.choice is None else LETTERS[vote.choice]).inc()
        verdict = comparison.verdict([one.choice for one in votes])
        if not verdict.winners:
            return None
        self._metrics.judge_votes.labels("yes").inc(verdict.agreeing)
        self._metrics.judge_votes.labels("no").inc(verdict.votes - verdict.agreeing)
        return [1.0 / len(verdict.winners) if index in verdict.winners else 0.0 for index in range(len(answers))]
