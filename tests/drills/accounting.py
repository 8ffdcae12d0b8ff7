"""The messages of a drill, the counts of lost and duplicate answers, and the results."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.table import Table

Position = tuple[int, int]
"""Partition and offset of a record of the topic `requests`."""


@dataclass(frozen=True, slots=True)
class Letter:
    """A dead letter.

    Attributes:
        position: of the original message.
        value: bytes of the original message.
    """

    position: Position
    value: bytes
    reason: str


@dataclass(slots=True)
class Messages:
    """The messages of a scenario.

    Attributes:
        sent: ids of the valid requests that Kafka acknowledged.
        unsent: ids of the valid requests that Kafka did not acknowledge.
        answers: number of records on the topic `responses`, by request id.
        errors: error code by request id, for error responses.
        records: the record of every acknowledged request, by its id.
        answered_records: the records that the answers name, by request id.
        malformed: bytes and expected reason of every malformed message, by its position.
        letters: dead letters in the order of their topic.
    """

    sent: set[str] = field(default_factory=set)
    unsent: set[str] = field(default_factory=set)
    answers: Counter[str] = field(default_factory=Counter)
    errors: dict[str, str] = field(default_factory=dict)
    records: dict[str, str] = field(default_factory=dict)
    answered_records: dict[str, set[str]] = field(default_factory=dict)
    malformed: dict[Position, tuple[bytes, str]] = field(default_factory=dict)
    letters: list[Letter] = field(default_factory=list)

    @property
    def answered(self) -> int:
        """Number of valid requests with an answer."""
        return len(self.sent & self.answers.keys())


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """The counts of a scenario.

    Attributes:
        answered: valid requests with an answer, including error responses.
        answered_error: valid requests with an error response.
        errors: number of error responses by code.
        lost: valid requests without an answer.
        answered_twice: valid requests with more than one answer.
        misattributed: valid requests with an answer that names another record.
        orphans: answers to requests that were not sent; not those to malformed ones with a readable id.
        dead_lettered: malformed messages with a correct dead letter (bytes and reason).
        dead_lettered_wrong: dead letters with wrong bytes or reason, or of valid requests.
        dead_lettered_twice: malformed messages with several dead letters.
    """

    sent: int
    unsent: int
    answered: int
    answered_error: int
    errors: dict[str, int]
    lost: int
    answered_twice: int
    misattributed: int
    orphans: int
    malformed_sent: int
    dead_lettered: int
    dead_lettered_wrong: int
    dead_lettered_twice: int

    def problems(self) -> tuple[str, ...]:
        """The failed checks; empty if the scenario passed."""
        undelivered = self.malformed_sent - self.dead_lettered
        checks = [
            (self.unsent, "requests were not acknowledged by Kafka"),
            (self.lost, "requests lost"),
            (self.answered_twice, "requests answered twice"),
            (self.misattributed, "requests with an answer that names another record"),
            (self.orphans, "orphan answers, to requests that were not sent"),
            (undelivered, "malformed messages without a correct dead letter"),
            (self.dead_lettered_wrong, "dead letters that are wrong or unexpected"),
            (self.dead_lettered_twice, "malformed messages with several dead letters"),
        ]
        return tuple(f"{number} {what}" for number, what in checks if number)


def count(messages: Messages) -> Counts:
    """Count the messages of a scenario."""
    answered = messages.sent & messages.answers.keys()
    known = messages.sent | messages.unsent
    errors = Counter(code for name, code in messages.errors.items() if name in answered)
    letters = Counter(letter.position for letter in messages.letters)
    correct = {letter.position for letter in messages.letters if _is_correct(letter, messages)}
    return Counts(
        sent=len(messages.sent),
        unsent=len(messages.unsent),
        answered=len(answered),
        answered_error=errors.total(),
        errors=dict(sorted(errors.items())),
        lost=len(messages.sent - answered),
        answered_twice=sum(messages.answers[name] > 1 for name in answered),
        misattributed=sum(
            messages.answered_records.get(name, {record}) != {record} for name, record in messages.records.items()
        ),
        orphans=sum(
            times
            for name, times in messages.answers.items()
            if name not in known and messages.errors.get(name) != "invalid_request"
        ),
        malformed_sent=len(messages.malformed),
        dead_lettered=len(correct),
        dead_lettered_wrong=sum(not _is_correct(letter, messages) for letter in messages.letters),
        dead_lettered_twice=sum(letters[position] > 1 for position in messages.malformed),
    )


def _is_correct(letter: Letter, messages: Messages) -> bool:
    return messages.malformed.get(letter.position) == (letter.value, letter.reason)


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """The result of a scenario.

    Attributes:
        peak_rss_mb: largest resident memory of a router process, MiB.
        seconds: wall time of the scenario, including the start and stop of the routers.
        faults: the injected faults with their times.
        uncommitted: records of the topic `requests` without a committed offset.
        longest_answer_s: longest time from Kafka's acknowledgement of a request to its answer.
        triton_died, router_died, service_died: exit status and end of the log of processes that exited unexpectedly.
        figures: of the scenario, by name.
        problems: the failed checks.
    """

    scenario: str
    seed: int
    scale: float
    counts: Counts
    peak_rss_mb: float
    seconds: float
    faults: tuple[str, ...]
    uncommitted: int
    longest_answer_s: float
    triton_died: tuple[str, ...] = ()
    router_died: tuple[str, ...] = ()
    service_died: tuple[str, ...] = ()
    figures: dict[str, float] = field(default_factory=dict)
    problems: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether no check failed and the scenario ran to its end."""
        return not self.problems

    def to_json(self) -> dict[str, Any]:
        """A flat object for `drill.json`."""
        values = asdict(self)
        counts = values.pop("counts")
        return {"scenario": values.pop("scenario"), "passed": self.passed, **counts, **values}


def table(results: Sequence[Result]) -> Table:
    """The results, one row per scenario."""
    shown = Table()
    shown.add_column("scenario", no_wrap=True)
    headings = (
        "sent", "answered", "errors", "lost", "answered twice", "malformed", "dead letters", "peak RSS, MiB",
        "slowest, s", "seconds",
    )  # fmt: skip
    for heading in headings:
        shown.add_column(heading, justify="right")
    shown.add_column("")
    for result in results:
        counts = result.counts
        numbers = (
            counts.sent, counts.answered, counts.answered_error, counts.lost, counts.answered_twice,
            counts.malformed_sent, counts.dead_lettered,
        )  # fmt: skip
        shown.add_row(
            result.scenario,
            *(f"{number:,}" for number in numbers),
            f"{result.peak_rss_mb:.0f}",
            f"{result.longest_answer_s:.1f}",
            f"{result.seconds:.0f}",
            "[green]passed[/green]" if result.passed else "[bold red]FAILED[/bold red]",
        )
    return shown


def remarks(results: Sequence[Result]) -> list[str]:
    """Failed checks, unexpected exits and further figures, one line each."""
    lines = []
    for result in results:
        lines += [f"{result.scenario}: {problem}" for problem in result.problems]
        lines += [
            f"{result.scenario}: {description.splitlines()[0]}"
            for description in (*result.triton_died, *result.router_died, *result.service_died)
        ]
        if result.figures:
            lines.append(f"{result.scenario}: " + ", ".join(f"{name} {one:g}" for name, one in result.figures.items()))
    return lines
