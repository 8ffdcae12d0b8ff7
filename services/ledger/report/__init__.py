"""The report: how much carbon was saved, at which quality, and where every joule went.

`queries` reads a snapshot of the ledger's tables into `books`; `assemble` works the report out of it; the rest is the
arithmetic. Nothing here prints or draws: see `cli.reporting`.
"""

from services.ledger.report.collect import collect_report
from services.ledger.report.model import Report
from services.ledger.report.queries import NoBooksError, TooManyCallsError

__all__ = ["NoBooksError", "Report", "TooManyCallsError", "collect_report"]
