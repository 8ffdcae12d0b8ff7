"""Shows a report: tables for a terminal, one self-contained page with plots, a JSON document."""

from cli.reporting.document import to_json
from cli.reporting.page import render_html
from cli.reporting.tables import render_tables

__all__ = ["render_html", "render_tables", "to_json"]
