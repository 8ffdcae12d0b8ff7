"""What was sent, what came of it, and whether anything was lost or doubled. Pure."""

from collections import Counter
from dataclasses import dataclass, field

Place = tuple[int, int]
"""Partition and offset of a record of the topic `requests`."""


@dataclass(frozen=True, slots=True)
class Letter:
    """A dead letter: whose it is, the bytes that it keeps, and why."""

    place: Place
    value: bytes
    reason: str


@dataclass(slots=True)
class Books:
    """All that is known of a scenario's traffic.

    Attributes:
        sent: ids of the valid requests that Kafka acknowledged.
        unsent: ids of those that it did not; nobody may rely on them.
        answers: records on the topic `responses`, by the request's id.
        errors: the code of a request's error, where it was answered with one.
        malformed: bytes and expected reason of every malformed message, by its place.
        letters: dead letters, as they came.
    """

    sent: set[str] = field(default_factory=set)
    unsent: set[str] = field(default_factory=set)
    answers: Counter[str] = field(default_factory=Counter)
    errors: dict[str, str] = field(default_factory=dict)
    malformed: dict[Place, tuple[bytes, str]] = field(default_factory=dict)
    letters: list[Letter] = field(default_factory=list)

    @property
    def answered(self) -> int:
        """Distinct valid requests that were answered."""
        return len(self.sent & self.answers.keys())


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """The books, counted.

    Attributes:
        answered: distinct valid requests with an answer, errors included.
        answered_error: those of them that got an error.
        errors: how often each code.
        lost: valid requests without any answer.
        answered_twice: valid requests with more than one answer.
        strays: answers to what nobody sent.
        dead_lettered: malformed messages with a dead letter that has their bytes and the right reason.
        dead_lettered_wrong: dead letters with other bytes or another reason, or of a valid request.
        dead_lettered_twice: malformed messages with more than one.
    """

    sent: int
    unsent: int
    answered: int
    answered_error: int
    errors: dict[str, int]
    lost: int
    answered_twice: int
    strays: int
    malformed_sent: int
    dead_lettered: int
    dead_lettered_wrong: int
    dead_lettered_twice: int

    def problems(self) -> tuple[str, ...]:
        """What was lost, doubled or muddled; empty when all is well."""
        undelivered = self.malformed_sent - self.dead_lettered
        checks = [
            (self.unsent, "requests were not acknowledged by Kafka"),
            (self.lost, "requests lost"),
            (self.answered_twice, "requests answered twice"),
            (self.strays, "answers to requests that nobody sent"),
            (undelivered, "malformed messages without a dead letter of their bytes and reason"),
            (self.dead_lettered_wrong, "dead letters that should not be, or not be so"),
            (self.dead_lettered_twice, "malformed messages with several dead letters"),
        ]
        return tuple(f"{number} {what}" for number, what in checks if number)


def count(books: Books) -> Counts:
    """Count the books."""
    answered = books.sent & books.answers.keys()
    known = books.sent | books.unsent
    errors = Counter(code for name, code in books.errors.items() if name in answered)
    letters = Counter(letter.place for letter in books.letters)
    right = {letter.place for letter in books.letters if _is_right(letter, books)}
    return Counts(
        sent=len(books.sent),
        unsent=len(books.unsent),
        answered=len(answered),
        answered_error=errors.total(),
        errors=dict(sorted(errors.items())),
        lost=len(books.sent - answered),
        answered_twice=sum(books.answers[name] > 1 for name in answered),
        strays=sum(times for name, times in books.answers.items() if name not in known),
        malformed_sent=len(books.malformed),
        dead_lettered=len(right),
        dead_lettered_wrong=sum(not _is_right(letter, books) for letter in books.letters),
        dead_lettered_twice=sum(letters[place] > 1 for place in books.malformed),
    )


def _is_right(letter: Letter, books: Books) -> bool:
    return books.malformed.get(letter.place) == (letter.value, letter.reason)
