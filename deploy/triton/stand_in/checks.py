"""Checks of meaning by the stand-in judge: whether an answer means the same as a reference, or as another answer.

The workload records which of its answers agree with the `reference` of their prompt. A text that it does not know is
right if it contains the reference.
"""

import re
from dataclasses import dataclass
from typing import Final

from deploy.triton.stand_in.answers import recorded_text
from deploy.triton.stand_in.prompt import normalised
from deploy.triton.stand_in.workload import Entry, Workload

YES: Final = "Yes"
NO: Final = "No"
OPEN: Final = "Open"
"""The question has no particular answer: the workload has no reference for it."""

_FORM: Final = re.compile(
    r"\[Question\]\n(?P<question>.*?)\n\n\[(?P<heading>Reference|Answer A)\]\n(?P<first>.*?)\n\n\[Answer(?: B)?\]\n"
    r"(?P<second>.*)\n\n(?P<closing>Does the answer mean the same|Do both answers give the same)[^\n]*",
    re.DOTALL,
)


@dataclass(frozen=True, slots=True)
class CheckPrompt:
    """A parsed check.

    Attributes:
        first: the reference if `known`, otherwise an answer.
    """

    question: str
    first: str
    second: str
    known: bool


def parse_check(text: str) -> CheckPrompt | None:
    """Parse the user's turn of a check; None if it is none."""
    found = _FORM.fullmatch(text.strip())
    if found is None:
        return None
    parts = found.groupdict()
    return CheckPrompt(parts["question"].strip(), parts["first"], parts["second"], parts["heading"] == "Reference")


def check_reply(workload: Workload, check: CheckPrompt) -> str:
    """The right reply to a check, as far as the workload knows it."""
    if normalised(check.first) == normalised(check.second):
        return YES
    entry = workload.find(check.question)
    if check.known:
        recorded = entry is not None and normalised(entry.reference or "") == normalised(check.first)
        right = _is_right(entry, check.second) if recorded and entry is not None else None
        return YES if (_contains(check.second, check.first) if right is None else right) else NO
    both = [None if entry is None else _is_right(entry, text) for text in (check.first, check.second)]
    if None in both:
        return OPEN
    return YES if all(both) else NO


def _is_right(entry: Entry, answer: str) -> bool | None:
    """Whether an answer is right; None if the prompt has no reference."""
    wanted = normalised(answer)
    recorded = {
        one.correct
        for (model, level), one in entry.responses.items()
        if one.correct is not None and normalised(recorded_text(entry, model, level, one)) == wanted
    }
    if len(recorded) == 1:
        return recorded.pop()
    return None if entry.reference is None else _contains(answer, entry.reference)


def _contains(answer: str, reference: str) -> bool:
    wanted = re.escape(normalised(reference).casefold())
    return re.search(rf"(?<!\w){wanted}(?!\w)", normalised(answer).casefold()) is not None
