"""A page with plots as one HTML file that needs nothing else: style, plots and the plotting library are inside."""

from collections.abc import Sequence
from html import escape
from importlib import resources

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from tools.reporting.content import TextTable

NamedFigure = tuple[str, str, go.Figure]
"""Title, a note on how to read it, and the plot."""


def render_page(title: str, parts: Sequence[str], *, with_plots: bool) -> str:
    """The page; about 5 MB, nearly all of it the plotting library. It fetches nothing when it is opened."""
    library = f"<script>{get_plotlyjs()}</script>\n<script>{resource('page.js')}</script>" if with_plots else ""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{resource('page.css')}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join([f"<h1>{escape(title)}</h1>", *parts])
        + f"\n</main>\n{library}\n</body>\n</html>\n"
    )


def plot_cards(plots: Sequence[NamedFigure]) -> str:
    """All plots, each on a card."""
    return "\n".join(['<section class="plots">', *(_plot(*plot) for plot in plots), "</section>"])


def card(title: str, body: str, *, note: str = "") -> str:
    """HTML under a heading."""
    about = f'<p class="note">{escape(note)}</p>' if note else ""
    return f'<section class="card"><h2>{escape(title)}</h2>{about}{body}</section>'


def table_card(table: TextTable) -> str:
    """A table on a card."""

    def cells(tag: str, row: tuple[str, ...]) -> str:
        return "".join(
            f'<{tag} class="text">{escape(text)}</{tag}>' if number < table.labels else f"<{tag}>{escape(text)}</{tag}>"
            for number, text in enumerate(row)
        )

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in table.rows)
    return card(
        table.title,
        f'<div class="scroll"><table><thead><tr>{cells("th", table.columns)}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>",
    )


def resource(name: str) -> str:
    """The text of a file beside this one."""
    return resources.files("tools.reporting").joinpath(name).read_text(encoding="utf-8")


def _plot(title: str, note: str, figure: go.Figure) -> str:
    # Inside a script element only a closing tag could end the data.
    data = figure.to_json().replace("</", "<\\/")
    return card(title, f'<div></div><script type="application/json" class="figure">{data}</script>', note=note)
