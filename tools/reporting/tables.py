"""A report on the terminal."""

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tools.reporting.content import TextTable, summary_lines, tables
from tools.reporting.model import Report
from tools.reporting.words import moment

HEADLINES = {"carbon saved": "bold green", "preference": "bold"}


def render_tables(report: Report, console: Console, *, hours: bool = True) -> None:
    """Print the summary, then a table each per zone, hour, prompt group and evaluation."""
    console.print(Text(headline(report), style="bold"))
    summary = Table.grid(padding=(0, 2))
    for label, text in summary_lines(report):
        summary.add_row(Text(label, style="dim"), Text(text, style=HEADLINES.get(label, "")))
    console.print(summary)
    for table in tables(report, hours=hours):
        console.print()
        console.print(rich_table(table))


def headline(report: Report) -> str:
    """Which requests the report is about."""
    scope = report.scope
    models = ", ".join(scope.models) or scope.model or "no model"
    zones = ", ".join(scope.zones) or scope.zone or "no zone"
    return f"{models} in {zones}, {moment(scope.first)} to {moment(scope.last)} UTC"


def rich_table(table: TextTable) -> Table:
    """A table for a terminal."""
    shown = Table(title=table.title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, show_edge=False)
    for number, name in enumerate(table.columns):
        shown.add_column(name, justify="left" if number < table.labels else "right", no_wrap=number == 0)
    for row in table.rows:
        shown.add_row(*(Text(cell) for cell in row))
    return shown
