"""Reports from the ledger's tables: as tables for a terminal, one self-contained page with plots, a JSON document."""

from tools.reporting.collect import collect_report
from tools.reporting.document import to_json
from tools.reporting.model import Report
from tools.reporting.page import render_html
from tools.reporting.queries import NoBooksError, TooManyCallsError
from tools.reporting.tables import render_tables

__all__ = [
    "NoBooksError",
    "Report",
    "TooManyCallsError",
    "collect_report",
    "render_html",
    "render_tables",
    "to_json",
]
