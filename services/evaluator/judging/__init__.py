"""Which of several answers is best: the judges, their prompt, and verdicts that no position bias can decide.

See `docs/decisions/0005-evaluator-judging.md`.
"""

from services.evaluator.judging.ballot import Ballot, Verdict
from services.evaluator.judging.judge import Comparison, Judge, JudgeError, Opinion
from services.evaluator.judging.openai import OpenAIJudge
from services.evaluator.judging.triton import TritonJudge

__all__ = [
    "Ballot",
    "Comparison",
    "Judge",
    "JudgeError",
    "OpenAIJudge",
    "Opinion",
    "TritonJudge",
    "Verdict",
]
