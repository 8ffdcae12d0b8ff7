"""A judge on a Triton server of the fleet."""

from services.evaluator.calls import CallError, ModelCalls
from services.evaluator.judging.judge import Comparison, JudgeError, Opinion
from services.evaluator.judging.prompt import judge_messages, read_verdict
from services.evaluator.spending import Errand
from shared.messages import SamplingParameters


class TritonJudge:
    """Asks the model of the fleet's judge pool for one token."""

    def __init__(self, calls: ModelCalls, *, pool: str, max_tokens: int = 1) -> None:
        self._calls = calls
        self._pool = pool
        # The likeliest token: the same answers in the same order get the same verdict.
        self._sampling = SamplingParameters(max_tokens=max_tokens, top_k=1)

    async def best(self, comparison: Comparison, errand: Errand) -> Opinion:
        """Ask once; see `Judge`."""
        messages = judge_messages(comparison.question, comparison.answers, reference=comparison.reference)
        try:
            answer = await self._calls.make(
                errand, purpose="judge", pool=self._pool, level=None, messages=messages, sampling=self._sampling
            )
        except CallError as error:
            raise JudgeError(str(error)) from error
        return Opinion(read_verdict(answer.text, answers=len(comparison.answers)), answer.call)
