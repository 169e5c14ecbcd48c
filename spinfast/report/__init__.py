"""`spinfast report RUN [RUN ...]`: one HTML file to look at, PNG and CSV of every plot, model cards."""

from spinfast.report.card import write_card
from spinfast.report.cli import main, write_report

__all__ = ["main", "write_card", "write_report"]
