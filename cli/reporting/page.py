"""A report as one HTML file that needs nothing else: style, plots and the plotting library are inside."""

from html import escape
from importlib import resources

from plotly.offline import get_plotlyjs

from cli.reporting.content import TextTable, summary_lines, tables
from cli.reporting.plots import figures
from cli.reporting.tables import headline
from cli.reporting.words import apart, energy, grams, percent, percent_between
from services.ledger.report.model import Report

TITLE = "Sprout: carbon report"


def render_html(report: Report, *, title: str = TITLE) -> str:
    """The page; about 5 MB, nearly all of it the plotting library. It fetches nothing when it is opened."""
    plots = figures(report)
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="about">{escape(headline(report))}</p>',
        f'<section class="tiles">{"".join(_tile(*tile) for tile in _tiles(report))}</section>',
        '<section class="plots">',
        *(_plot(name, note, figure.to_json()) for name, note, figure in plots),
        "</section>",
        _card("Summary", _summary(report)),
        *(_card(table.title, _table(table)) for table in tables(report)),
        _card("How these numbers were made", _resource("method.html")),
    ]
    library = f"<script>{get_plotlyjs()}</script>\n<script>{_resource('page.js')}</script>" if plots else ""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{_resource('page.css')}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(parts)
        + f"\n</main>\n{library}\n</body>\n</html>\n"
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


def _plot(title: str, note: str, figure_json: str) -> str:
    # Inside a script element only a closing tag could end the data.
    data = figure_json.replace("</", "<\\/")
    return _card(title, f'<div></div><script type="application/json" class="figure">{data}</script>', note=note)


def _card(title: str, body: str, *, note: str = "") -> str:
    about = f'<p class="note">{escape(note)}</p>' if note else ""
    return f'<section class="card"><h2>{escape(title)}</h2>{about}{body}</section>'


def _summary(report: Report) -> str:
    rows = "".join(f"<tr><td>{escape(label)}</td><td>{escape(text)}</td></tr>" for label, text in summary_lines(report))
    return f'<table class="summary"><tbody>{rows}</tbody></table>'


def _table(table: TextTable) -> str:
    def cells(tag: str, row: tuple[str, ...]) -> str:
        return "".join(
            f'<{tag} class="text">{escape(text)}</{tag}>' if number < table.labels else f"<{tag}>{escape(text)}</{tag}>"
            for number, text in enumerate(row)
        )

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in table.rows)
    return (
        f'<div class="scroll"><table><thead><tr>{cells("th", table.columns)}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _resource(name: str) -> str:
    return resources.files("cli.reporting").joinpath(name).read_text(encoding="utf-8")
