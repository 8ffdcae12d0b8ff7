"""The metric `correctness`: whether an answer is right.

With a reference, numbers and letters of a choice are compared here, and the judge says whether another text means the
same. Without one, the judge says whether an answer gives the same answer as the reference option's, in both orders:
yes in one of them counts half. Control checks, whose right reply is known, show whether the judge can be relied on.
"""

import asyncio
from collections.abc import Callable, Sequence
from typing import Final

from services.evaluator.answers import is_right, normalised
from services.evaluator.cost import CallContext
from services.evaluator.generate import all_or_first_error
from services.evaluator.judges import CheckReply, Judge, MeaningCheck, question_text
from shared.hashing import uniform
from shared.messages import JudgeCard, Sample

CORRECTNESS: Final = "correctness"

CONTROL_SHARE: Final = 0.1
"""Share of the checked prompts with a control check of each kind."""

UNRELATED: Final = "A blue bicycle stood in front of the old lighthouse."
"""A text that answers hardly any question: the right reply to a control check with it is no."""


class CorrectnessMetric:
    """Whether the answers are right; see `QualityMetric`."""

    name: Final = CORRECTNESS

    def __init__(self, judge: Judge, *, asks_judge: Callable[[str], bool]) -> None:
        """Create.

        Args:
            asks_judge: whether the judge may be asked about a model's answers. If not, only prompts count whose
                reference is a number or a letter: the others' right answers could not be distinguished from wrong ones.
        """
        self._judge = judge
        self._asks_judge = asks_judge

    async def score(self, sample: Sample, answers: Sequence[str], context: CallContext) -> list[float] | None:
        """1 for a right answer, 0 for a wrong one, between them for an answer that partly agrees.

        Raises:
            JudgeError: the judge did not reply.
        """
        reference = sample.reference
        known = [None if reference is None else is_right(answer, reference) for answer in answers]
        if None not in known:
            return [float(bool(one)) for one in known]
        if not self._asks_judge(context.model):
            return None
        checker = _Checker(self._judge, question_text(sample.messages), context)
        await self._control(checker, sample, answers[0])
        if reference is None:
            return await checker.agreement(answers)
        asked = dict.fromkeys(answer for answer, one in zip(answers, known, strict=True) if one is None)
        replies = await checker.ask_all([MeaningCheck(checker.question, reference, one, known=True) for one in asked])
        if None in replies:
            return None
        right = dict(zip(asked, (reply == "yes" for reply in replies), strict=True))
        return [float(right[answer] if one is None else one) for answer, one in zip(answers, known, strict=True)]

    @staticmethod
    async def _control(checker: "_Checker", sample: Sample, baseline: str) -> None:
        """Ask a check whose reply is known, for a share of the prompts."""
        known, first = sample.reference is not None, sample.reference or baseline
        draw = uniform("control", sample.identity)
        if draw < CONTROL_SHARE:
            reply = await checker.ask(MeaningCheck(checker.question, first, first, known))
            if reply in {"yes", "no"}:
                checker.context.work.card += JudgeCard(controls_same=1, controls_same_wrong=int(reply == "no"))
        elif draw < 2 * CONTROL_SHARE:
            reply = await checker.ask(MeaningCheck(checker.question, first, UNRELATED, known))
            if reply in {"yes", "no"}:
                checker.context.work.card += JudgeCard(controls_other=1, controls_other_wrong=int(reply == "yes"))


class _Checker:
    """Checks of the answers to one prompt; the replies are counted."""

    def __init__(self, judge: Judge, question: str, context: CallContext) -> None:
        self._judge = judge
        self.question = question
        self.context = context

    async def ask(self, check: MeaningCheck) -> CheckReply | None:
        """The reply to one check; None if it cannot be read."""
        reply = check.parse(await self._judge.reply(check.messages(), self.context))
        work = self.context.work
        work.judgements += 1
        work.card += JudgeCard(
            checks=1,
            checks_yes=int(reply == "yes"),
            checks_open=int(reply == "open"),
            checks_unreadable=int(reply is None),
        )
        return reply

    async def ask_all(self, checks: Sequence[MeaningCheck]) -> list[CheckReply | None]:
        """The replies to several checks; waits for all of them even if one fails.

        Raises:
            JudgeError: there was no reply to one of them.
        """
        return all_or_first_error(await asyncio.gather(*map(self.ask, checks), return_exceptions=True))

    async def agreement(self, answers: Sequence[str]) -> list[float] | None:
        """Share of both orders in which an answer agrees with the first one; None: the question is open, or unread."""
        baseline, *others = answers
        same = normalised(baseline)
        asked = list(dict.fromkeys(text for text in others if normalised(text) != same))
        orders = [pair for text in asked for pair in ((baseline, text), (text, baseline))]
        replies = await self.ask_all([MeaningCheck(self.question, *pair, known=False) for pair in orders])
        outcomes: dict[str, float] = {}
        for text, pair in zip(asked, zip(replies[::2], replies[1::2], strict=True), strict=True):
            readable = [reply for reply in pair if reply is not None]
            if "open" in readable or not readable:
                return None
            if len(readable) == len(pair):
                self.context.work.card += JudgeCard(check_repeats=1, check_flips=int(pair[0] != pair[1]))
            outcomes[text] = readable.count("yes") / len(readable)
        return [1.0 if normalised(text) == same else outcomes[text] for text in answers]
