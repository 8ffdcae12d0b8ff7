"""Compares an answer with a known right answer (the reference) without a judge: numbers and letters of a choice.

Texts are only found to be right, never wrong, because the same can be said in other words; a judge decides the rest.
"""

import math
import re
import unicodedata
from collections.abc import Collection, Sequence
from typing import Final

from shared.messages import Sample

TOLERANCE: Final = 1e-3
"""Relative difference up to which two numbers are the same: answers are rounded."""

_NUMBER = r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|[-+]?\.\d+"
_REFERENCE_NUMBER: Final = re.compile(rf"[$€£]?\s*({_NUMBER})\s*%?\.?")
_IN_TEXT: Final = re.compile(rf"(?<![\w.])(?:{_NUMBER})(?!\w)")
_FINAL: Final = re.compile(r"####|\\boxed\{|\banswer(?:\s+is|\s*:)", re.IGNORECASE)
_WORDS: Final = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    *("eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty"),
)
_CHOICE: Final = re.compile(r"\(?([A-J])\)?(?:[.:)]+(?:\s.*)?)?", re.DOTALL)
_MARKED: Final = re.compile(r"####|\\boxed\{")
_LEADING_CHOICE: Final = re.compile(r"\W*(?:(?i:answer)\s*:?\s*)?\(?([A-J])(?:[.:)]|\W*\Z)")
_NAMED_CHOICE: Final = re.compile(r"\b(?i:answer|option|choice)\s*(?:is|:)?\s*:?\s*\**\(?([A-J])\b(?!')")
_PUNCTUATION: Final = re.compile(r"[^\w+./%-]|_|-(?!\d)")
_ARTICLES: Final = frozenset({"a", "an", "the"})


def is_right(answer: str, reference: str) -> bool | None:
    """Whether an answer agrees with a reference; None: it takes a judge to say.

    Args:
        answer: of a model, perhaps worked out: of several numbers a marked one counts, otherwise the last.
        reference: not blank; a number, a letter of a choice, a worked solution with its number after "####", or a text,
            perhaps several with semicolons between them.
    """
    if not answer.strip():
        return False
    given_text = normalised(answer)
    if given_text and given_text in {normalised(one) for one in reference.split(";")}:
        return True
    number = reference_number(reference)
    if number is not None:
        given = final_number(answer)
        return given is not None and math.isclose(given, number, rel_tol=TOLERANCE, abs_tol=TOLERANCE * 1e-3)
    choice = _CHOICE.fullmatch(reference.strip())
    if choice is not None:
        chosen = chosen_letter(answer)
        return None if chosen is None else chosen == choice.group(1)
    return None


def known_outcomes(answers: Sequence[str], reference: str) -> list[bool] | None:
    """`is_right` of every answer; None if a judge is needed for one of them."""
    found = [is_right(answer, reference) for answer in answers]
    known = [one for one in found if one is not None]
    return known if len(known) == len(found) else None


def reference_number(reference: str) -> float | None:
    """The number that a reference is, or that its worked solution marks as the result; None if it is a text."""
    marked = _MARKED.split(reference)
    found = _REFERENCE_NUMBER.fullmatch(marked[-1].strip(" \n\t}$"))
    return None if found is None else _value(found.group(1))


def final_number(answer: str) -> float | None:
    """The number that an answer arrives at: what follows "answer is", "####" or "="; otherwise its last number."""
    marked = list(_FINAL.finditer(answer))
    parts = [answer[marked[-1].end() :]] if marked else []
    for text in (*parts, answer):
        numbers = _IN_TEXT.findall(text)
        if numbers:
            return _value(numbers[0] if text is not answer else numbers[-1])
    words = [word for word in re.findall(r"[a-z]+", answer.lower()) if word in _WORDS]
    return float(_WORDS.index(words[-1])) if words else None


def chosen_letter(answer: str) -> str | None:
    """The letter of a choice that an answer names; None if it names none clearly."""
    leading = _LEADING_CHOICE.match(answer)
    if leading is not None:
        return leading.group(1)
    named = set(_NAMED_CHOICE.findall(answer))
    return named.pop() if len(named) == 1 else None


def normalised(text: str) -> str:
    """A text without case, accents' encoding, punctuation, articles and white space that do not change its meaning."""
    kept = _PUNCTUATION.sub(" ", unicodedata.normalize("NFKC", text).casefold())
    return " ".join(word for raw in kept.split() if (word := raw.strip(".")) and word not in _ARTICLES)


def contradicted(samples: Collection[Sample]) -> set[str]:
    """Identities of samples whose references differ although their conversations are the same."""
    references: dict[object, set[str]] = {}
    for sample in samples:
        if sample.reference is not None:
            references.setdefault(sample.messages, set()).add(normalised(sample.reference))
    return {one.identity for one in samples if len(references.get(one.messages, ())) > 1}


def _value(number: str) -> float:
    return float(number.replace(",", ""))
