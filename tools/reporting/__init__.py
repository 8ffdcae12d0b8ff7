"""Reports from the ledger's tables: on a terminal, as one self-contained HTML page with plots, as JSON and CSV."""

from tools.reporting.collect import collect_report
from tools.reporting.csv_files import to_csv
from tools.reporting.json_report import to_json
from tools.reporting.metrics import render_metrics
from tools.reporting.model import Report
from tools.reporting.page import render_html
from tools.reporting.query import NoLedgerError, TooManyCallsError
from tools.reporting.tables import render_tables

__all__ = [
    "NoLedgerError",
    "Report",
    "TooManyCallsError",
    "collect_report",
    "render_html",
    "render_metrics",
    "render_tables",
    "to_csv",
    "to_json",
]
