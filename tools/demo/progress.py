"""The progress of a demo: a live display on a terminal, otherwise a line every two event hours."""

import asyncio
from datetime import datetime, timedelta

from rich.console import Console, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from shared.messages import Policy
from shared.runtime.clock import Clock
from shared.runtime.logs import printable
from tools.demo.clients import Producer, Tally
from tools.demo.day import DemoDay

REFRESH_S = 0.25
PLAIN_INTERVAL = timedelta(hours=2)
BARS = "▁▂▃▄▅▆▇█"
LEVEL_STYLES = ("green", "yellow", "magenta", "cyan", "blue")
MIX_WIDTH = 40


class Progress:
    """Shows the progress of a demo, from the messages that clients see."""

    def __init__(self, day: DemoDay, clock: Clock, tally: Tally, producer: Producer, console: Console) -> None:
        self._day = day
        self._clock = clock
        self._tally = tally
        self._producer = producer
        self._console = console

    async def show(self) -> None:
        """Show the progress until cancelled."""
        if self._console.is_terminal:
            await self._show_live()
        else:
            await self._show_lines()

    def render(self, now: datetime) -> RenderableType:
        """The live display at an event time."""
        table = Table.grid(padding=(0, 2))
        table.add_column(style="bold", no_wrap=True)
        table.add_column()
        table.add_row("event time", self._day_bar(now))
        table.add_row("grid", self._grid(now))
        table.add_row("requests", self._requests())
        table.add_row("directives", mix_bar(self._tally))
        table.add_row("policy", _plain(describe_policy(self._tally.policies.get(self._day.model))))
        table.add_row("evaluator", _plain(describe_evaluations(self._tally)))
        title = _plain(f"{self._day.hours:g} hours in {self._day.zone}, {self._day.rate:,.0f} times real time")
        return Panel(table, title=title, title_align="left", border_style="green")

    def line(self, now: datetime) -> str:
        """The progress at an event time in one line."""
        grid = self._tally.intensities.get(self._day.zone)
        intensity = f"{grid.latest.intensity_g_per_kwh:.0f} g/kWh" if grid else "no intensity yet"
        levels = ", ".join(f"{level} {count}" for level, count in sorted(self._tally.levels.items()))
        return printable(
            f"{now:%d %b %H:%M}  {intensity}  sent {self._producer.sent}, answered {self._tally.answered}"
            f"  ({levels or 'none yet'})  policies {self._tally.policies_published}"
            f"  evaluations {self._tally.evaluations}"
        )

    async def _show_live(self) -> None:
        with Live(console=self._console, auto_refresh=False, transient=True) as live:
            while True:
                live.update(self.render(self._clock.now()), refresh=True)
                await asyncio.sleep(REFRESH_S)

    async def _show_lines(self) -> None:
        due = self._day.start
        while True:
            await self._clock.sleep_until(due)
            self._console.print(self.line(self._clock.now()), markup=False, soft_wrap=True)
            due += PLAIN_INTERVAL

    def _day_bar(self, now: datetime) -> RenderableType:
        passed = min(max((now - self._day.start) / (self._day.end - self._day.start), 0.0), 1.0)
        bar = Table.grid(padding=(0, 2))
        bar.add_row(f"{now:%a %d %b %H:%M} UTC", ProgressBar(total=1.0, completed=passed, width=MIX_WIDTH))
        return bar

    def _grid(self, now: datetime) -> str:
        known = self._tally.intensities.get(self._day.zone)
        if known is None:
            return "no carbon intensity yet"
        window = [point for point in (*known.history, known.latest) if point.at > now - timedelta(hours=24)]
        picture = sparkline([point.intensity_g_per_kwh for point in window])
        return f"{known.latest.intensity_g_per_kwh:4.0f} gCO2eq/kWh  {picture}  last 24 hours"

    def _requests(self) -> str:
        tally = self._tally
        failed = sum(tally.errors.values())
        return (
            f"{self._producer.sent:,} of {self._day.requests:,} sent, {tally.answered:,} answered"
            + (f", {failed} failed" if failed else "")
            + (f", {tally.duplicates} answered twice" if tally.duplicates else "")
            + (f", {tally.dead_letters} dead letters" if tally.dead_letters else "")
        )


def _plain(text: str) -> Text:
    """Text of messages for the terminal: without control characters, and not read as markup."""
    return Text(printable(text))


def sparkline(values: list[float]) -> str:
    """Bars scaled from the minimum to the maximum of the values."""
    if not values:
        return ""
    low, high = min(values), max(values)
    step = (high - low) / (len(BARS) - 1) or 1.0
    return "".join(BARS[round((value - low) / step)] for value in values)


def mix_bar(tally: Tally) -> Text:
    """The share of each level in the answers, as a bar."""
    total = sum(tally.levels.values())
    if total == 0:
        return Text("no answers yet")
    bar, legend = Text(), Text("  ")
    for number, (level, count) in enumerate(sorted(tally.levels.items())):
        style = LEVEL_STYLES[number % len(LEVEL_STYLES)]
        bar.append("█" * round(MIX_WIDTH * count / total), style=style)
        legend.append(printable(f"{level} {100 * count / total:.0f} %  "), style=style)
    return bar + legend


def describe_policy(policy: Policy | None) -> str:
    """A policy in one line."""
    if policy is None:
        return "none yet: requests are served without a directive"
    if policy.status == "reference" or policy.reference_g_per_request == 0:
        return f"v{policy.version}: baseline only, no directives ({policy.reason})"
    saving = 100 * (1 - policy.expected_g_per_request / policy.reference_g_per_request)
    quality = ", ".join(
        f"{metric} {100 * policy.expected_quality[metric]:.1f} % of the baseline's (bound {100 * bound:.1f} %)"
        for metric, bound in policy.bounds.items()
        if metric in policy.expected_quality
    )
    return f"v{policy.version}: {saving:.0f} % less carbon expected; {quality}"


def describe_evaluations(tally: Tally) -> str:
    """The evaluations so far in one line."""
    last = tally.last_evaluation
    if last is None:
        return "waiting for samples"
    count = f"{tally.evaluations} evaluation{'s' if tally.evaluations != 1 else ''}"
    return f"{count}; last at {last.evaluated_at:%H:%M} ({last.trigger}), {last.prompts} prompts"
