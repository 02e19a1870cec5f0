"""Results for people: one self-contained HTML page, its PNG, CSV and JSON, and tables for the terminal.

Everything is made of the JSON objects of `eval` and of verdicts; nothing is measured or decided here.
"""

from ropelab.report.page import headline
from ropelab.report.terminal import terminal_table, verdict_table
from ropelab.report.write import write_report

__all__ = [
    "headline",
    "terminal_table",
    "verdict_table",
    "write_report",
]
