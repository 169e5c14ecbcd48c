"""A study's tables as HTML and Markdown: headings and rows of texts, those that stand out as `Strong`; rows as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from html import escape


class Strong(str):
    """A cell in bold."""

    __slots__ = ()


def markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "".join(
        "| " + " | ".join(_marked(cell.replace("|", "\\|"), cell, "**", "**") for cell in line) + " |\n"
        for line in lines
    )


def html(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """In a box that scrolls; a heading's line ends are kept."""
    head = "".join(f"<th>{escape(each).replace(chr(10), '<br>')}</th>" for each in headings)
    body = "".join(
        "<tr>" + "".join(f"<td>{_marked(escape(cell), cell, '<b>', '</b>')}</td>" for cell in row) + "</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def to_csv(rows: Sequence[Mapping]) -> str:
    """The first row has all columns; what another lacks is empty there."""
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _marked(text: str, cell: str, before: str, after: str) -> str:
    return before + text + after if isinstance(cell, Strong) else text
