"""A report as one HTML file that needs nothing else."""

from html import escape

from tools.reporting.content import summary_lines, tables
from tools.reporting.model import Report
from tools.reporting.plots import figures
from tools.reporting.shell import card, plot_cards, render_page, resource, table_card
from tools.reporting.tables import headline
from tools.reporting.words import apart, energy, grams, percent, percent_between

TITLE = "Sprout: carbon report"


def render_html(report: Report, *, title: str = TITLE) -> str:
    """The page; see `tools.reporting.shell`."""
    plots = figures(report)
    return render_page(
        title,
        [
            f'<p class="about">{escape(headline(report))}</p>',
            f'<section class="tiles">{"".join(_tile(*tile) for tile in _tiles(report))}</section>',
            plot_cards(plots),
            card("Summary", _summary(report)),
            *(table_card(table) for table in tables(report)),
            card("How these numbers were made", resource("method.html")),
        ],
        with_plots=bool(plots),
    )


def _tiles(report: Report) -> tuple[tuple[str, str, str], ...]:
    """Label, value and detail of what matters most."""
    saving, account, requests = report.saving, report.energy, report.requests
    difference = account.difference_pct
    return (
        ("carbon saved", percent(saving.saving_pct), f"95 %: {percent_between(saving.saving_interval)}"),
        (
            "grams saved",
            grams(saving.saved_g if saving.saving_pct is not None else None),
            f"{grams(saving.emitted_g)} emitted",
        ),
        (
            "implied saving",
            percent(report.implied_saving_pct),
            f"by the probabilities; promised {percent(report.promised_saving_pct)}",
        ),
        (
            "preference",
            percent(report.quality.preference_pct),
            f"of the reference's; {_bound(report)}",
        ),
        ("requests", f"{requests.answered:,}", f"{requests.refused:,} refused, {requests.unsettled:,} unsettled"),
        (
            "books and meters",
            "–" if difference is None else apart(difference).replace("under", "<"),
            f"apart; {energy(account.metered_j)} metered",
        ),
    )


def _bound(report: Report) -> str:
    if not report.policies_published:
        return "no policy"
    return "bound kept" if report.quality.bound_kept else "bound missed"


def _tile(label: str, value: str, detail: str) -> str:
    return (
        f'<div class="tile"><div class="label">{escape(label)}</div><div class="value">{escape(value)}</div>'
        f'<div class="detail">{escape(detail)}</div></div>'
    )


def _summary(report: Report) -> str:
    rows = "".join(f"<tr><td>{escape(label)}</td><td>{escape(text)}</td></tr>" for label, text in summary_lines(report))
    return f'<table class="summary"><tbody>{rows}</tbody></table>'
