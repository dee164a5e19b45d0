"""The evaluation report: ``report.json`` with every number, ``report.md`` and one self-contained ``report.html``."""

from tasks.core.report.callback import ReportCallback
from tasks.core.report.cost import environment, measure_cost
from tasks.core.report.curves import read_metrics_csv
from tasks.core.report.document import Picture, Report, ReportParts, Table
from tasks.core.report.writer import write_report

__all__ = [
    "Picture",
    "Report",
    "ReportCallback",
    "ReportParts",
    "Table",
    "environment",
    "measure_cost",
    "read_metrics_csv",
    "write_report",
]
