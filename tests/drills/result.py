"""What a scenario has shown, as an object for `drill.json` and as a row for people. Pure."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from tests.drills.accounting import Counts


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What a scenario has shown.

    Attributes:
        peak_rss_mb: largest resident set of any router process, MiB.
        seconds: wall time of the whole scenario, starting and stopping the routers included.
        faults: what struck, with the second at which it did.
        uncommitted: records of the topic `requests` that a next router would get again.
        longest_answer_s: from Kafka's acknowledgement of a request to its answer.
        triton_died, router_died: status and end of the log of those that ended by themselves.
        problems: why it did not pass.
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
    problems: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether nothing was lost or doubled, and the scenario could be played to its end."""
        return not self.problems

    def to_json(self) -> dict[str, Any]:
        """One flat object."""
        values = asdict(self)
        counts = values.pop("counts")
        return {"scenario": values.pop("scenario"), "passed": self.passed, **counts, **values}


def table(results: Sequence[Result]) -> Table:
    """All scenarios, a row each."""
    shown = Table()
    shown.add_column("scenario", no_wrap=True)
    headings = (
        "sent", "answered", "of them errors", "lost", "answered twice", "malformed", "dead letters", "peak RSS, MiB",
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
    """What a row has no room for: why a scenario failed, and what died by itself."""
    lines = []
    for result in results:
        lines += [f"{result.scenario}: {problem}" for problem in result.problems]
        lines += [f"{result.scenario}: {said.splitlines()[0]}" for said in (*result.triton_died, *result.router_died)]
    return lines
