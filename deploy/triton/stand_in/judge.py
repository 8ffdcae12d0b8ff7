"""The stand-in judge: reads only the judge prompt, and prefers the level that the workload names as `preferred`.

Of two answers, one of them the baseline's, it prefers the baseline's if the workload calls the other one `worse`. Asked
whether two texts mean the same, it replies by the workload too (checks.py).

It looks the question up in the workload, recognises each answer's level by its text, and names the answer of the
preferred level. With given probabilities it names the first answer instead (the position bias of LLM judges), or gives
no verdict. Every draw is a hash of the prompt: the same prompt gets the same verdict, and the same answers in another
order get another draw.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import log

from deploy.triton.request import GenerationRequest
from deploy.triton.stand_in.answers import PlannedAnswer, estimated_tokens, recorded_text
from deploy.triton.stand_in.checks import YES, check_reply, parse_check
from deploy.triton.stand_in.prompt import REFERENCE_LEVEL, normalised, parse_chat
from deploy.triton.stand_in.workload import Entry, Workload, unit_hash

LETTERS = "ABCDEFGH"
"""Two to eight answers."""

NO_VERDICT = "Unclear"
"""A word that names no answer."""

_QUESTION = "[Question]\n"
_REFERENCE = "\n\n[Reference]\n"
_CLOSING = "\n\nWhich answer is best?"
_SHORTEST_RECOGNISED = 8
"""Least number of characters by which the beginning of a recorded text, cut by a token limit, is recognised."""


class JudgePromptError(ValueError):
    """The text is not a judge prompt; the message says what is missing."""


@dataclass(frozen=True, slots=True)
class JudgePrompt:
    """A parsed judge prompt."""

    question: str
    answers: tuple[str, ...]
    reference: str | None = None


def parse_judge_prompt(text: str) -> JudgePrompt:
    """Parse the user's turn of a judge prompt.

    Raises:
        JudgePromptError: a section is missing, or there are fewer than two answers.
    """
    start = text.find(_QUESTION)
    if start < 0:
        raise JudgePromptError("no '[Question]' section")
    closing = text.rfind(_CLOSING)
    rest = text[start + len(_QUESTION) : closing if closing >= 0 else len(text)]
    question, *answers = _split_answers(rest)
    if len(answers) < 2:
        raise JudgePromptError(f"{len(answers)} answers; '[Answer A]' and '[Answer B]' at least are needed")
    question, reference_follows, reference = question.partition(_REFERENCE)
    return JudgePrompt(question.strip(), tuple(answers), reference.strip() if reference_follows else None)


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgeRules:
    """The judge's error rates, energy and time.

    Attributes:
        position_bias: probability that it names the first answer regardless of the texts.
        unparseable: probability that it names no answer.
        yes_bias: probability that it replies yes to a check of meaning regardless of the texts.
        prefill_j_per_token, prefill_s_per_token: for each token of the prompt.
        decode_j_per_token, decode_s_per_token: for each token of the verdict.
    """

    position_bias: float = 0.15
    unparseable: float = 0.0
    yes_bias: float = 0.0
    prefill_j_per_token: float = 0.3
    prefill_s_per_token: float = 0.0003
    decode_j_per_token: float = 30.0
    decode_s_per_token: float = 0.05

    def __post_init__(self) -> None:
        for name in ("position_bias", "unparseable", "yes_bias"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ValueError(f"'{name}' is a probability between 0 and 1, got {value}")
        for name in ("prefill_j_per_token", "prefill_s_per_token", "decode_j_per_token", "decode_s_per_token"):
            value = getattr(self, name)
            if not value > 0:
                raise ValueError(f"'{name}' must be greater than 0, got {value}")


class Judge:
    """Judges answers to the prompts of a workload."""

    def __init__(self, workload: Workload, rules: JudgeRules) -> None:
        self._workload = workload
        self._rules = rules

    def plan(self, request: GenerationRequest) -> PlannedAnswer:
        """Plan the verdict, one token; a text that is not a judge prompt gets no verdict."""
        tokens = estimated_tokens(request.text)
        rules = self._rules
        return PlannedAnswer(
            text=self.verdict(parse_chat(request.text).user),
            tokens=1,
            input_tokens=tokens,
            energy_j=tokens * rules.prefill_j_per_token + rules.decode_j_per_token,
            time_s=tokens * rules.prefill_s_per_token + rules.decode_s_per_token,
        )

    def verdict(self, prompt: str) -> str:
        """A letter; the reply to a check of meaning; or `NO_VERDICT`."""
        check = parse_check(prompt)
        if check is not None:
            if unit_hash("unparseable", prompt) < self._rules.unparseable:
                return NO_VERDICT
            return YES if unit_hash("yes", prompt) < self._rules.yes_bias else check_reply(self._workload, check)
        try:
            parsed = parse_judge_prompt(prompt)
        except JudgePromptError:
            return NO_VERDICT
        if unit_hash("unparseable", prompt) < self._rules.unparseable:
            return NO_VERDICT
        if unit_hash("position", prompt) < self._rules.position_bias:
            return LETTERS[0]
        return LETTERS[self.best(parsed, key=prompt)]

    def best(self, prompt: JudgePrompt, *, key: str) -> int:
        """Index of the best answer, without position bias.

        Args:
            key: decides between answers with the same text.
        """
        entry = self._workload.find(prompt.question)
        if entry is None:
            return self._by_hash(range(len(prompt.answers)), prompt, key)
        compared = _compared_with_baseline(entry, prompt.answers)
        if compared is not None:
            return compared
        levels = [recognised_levels(entry, answer) for answer in prompt.answers]
        preferred = self._preferred_level(entry, sorted(set().union(*levels)))
        matching = [index for index, found in enumerate(levels) if preferred in found]
        if matching:
            return self._by_hash(matching, prompt, key)
        return self._closest_in_length(entry, preferred, prompt, key)

    def _preferred_level(self, entry: Entry, presented: Sequence[str]) -> str | None:
        """The recorded preference; for a prompt without one, a draw from its task's shares by the prompt's hash."""
        if entry.preferred is not None and (entry.preferred in presented or not presented):
            return entry.preferred
        if not presented:
            presented = sorted({level for _, level in entry.responses})
        shares = self._workload.preference_shares(entry.task, presented)
        draw = unit_hash("preference", normalised(entry.prompt))
        for level, share in shares.items():
            draw -= share
            if draw < 0:
                return level
        return presented[-1]

    @staticmethod
    def _closest_in_length(entry: Entry, preferred: str | None, prompt: JudgePrompt, key: str) -> int:
        """The answer whose length is closest to the preferred level's, where no text of that level is recognised."""
        wanted = next(
            (
                len(recorded_text(entry, model, level, recorded))
                for (model, level), recorded in sorted(entry.responses.items(), key=lambda item: item[0])
                if level == preferred
            ),
            1,
        )
        distance = [abs(log((len(answer) + 1) / (wanted + 1))) for answer in prompt.answers]
        nearest = min(distance)
        return Judge._by_hash([i for i, far in enumerate(distance) if far == nearest], prompt, key)

    @staticmethod
    def _by_hash(indices: Sequence[int], prompt: JudgePrompt, key: str) -> int:
        """Select one answer by the texts, so that their order does not matter; among equal texts by `key`."""
        ranked = sorted(indices, key=lambda i: unit_hash("tie", prompt.question, normalised(prompt.answers[i])))
        first = normalised(prompt.answers[ranked[0]])
        equal = [index for index in ranked if normalised(prompt.answers[index]) == first]
        return equal[int(unit_hash("equal", key) * len(equal))]


def recognised_levels(entry: Entry, answer: str) -> frozenset[str]:
    """Levels at which some model gave this answer; the beginning of a recorded text is recognised as well."""
    return frozenset(level for _, level in _recognised(entry, answer))


def _recognised(entry: Entry, answer: str) -> set[tuple[str, str]]:
    """Models and levels that gave this answer, or one that begins like it."""
    wanted = normalised(answer)
    cut: set[tuple[str, str]] = set()
    same: set[tuple[str, str]] = set()
    for (model, level), recorded in entry.responses.items():
        text = normalised(recorded_text(entry, model, level, recorded))
        if text == wanted:
            same.add((model, level))
        elif len(wanted) >= _SHORTEST_RECOGNISED and text.startswith(wanted):
            cut.add((model, level))
    return same or cut


def _compared_with_baseline(entry: Entry, answers: Sequence[str]) -> int | None:
    """Index of the better of two answers, one of them the baseline's; None if the workload has not compared them."""
    if len(answers) != 2:
        return None
    verdicts = [{entry.responses[key].worse for key in _recognised(entry, answer)} for answer in answers]
    levels = [recognised_levels(entry, answer) for answer in answers]
    for baseline, other in ((0, 1), (1, 0)):
        if REFERENCE_LEVEL in levels[baseline] and None in verdicts[baseline] and verdicts[other] in ({True}, {False}):
            return baseline if verdicts[other] == {True} else other
    return None


def _split_answers(text: str) -> list[str]:
    """Split into the question and the answers, which must be in the order of their letters."""
    parts: list[str] = []
    rest = text
    for letter in LETTERS:
        head, marker, tail = _partition(rest, letter)
        if not marker:
            break
        parts.append(head.strip() if parts else head)
        rest = tail
    return [*parts, rest.strip()] if parts else [text]


def _partition(text: str, letter: str) -> tuple[str, str, str]:
    found = re.search(rf"\n+\[Answer {letter}\]\n", text)
    return (text, "", "") if found is None else (text[: found.start()], found.group(), text[found.end() :])
