"""What reports are made of: tables of texts, in Markdown and in HTML, and values as JSON holds them."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


def json_ready(value: Any) -> Any:
    """A value as JSON holds it: tuples and arrays as lists, None where a number is not finite."""
    if isinstance(value, dict):
        return {key: json_ready(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [json_ready(each) for each in value]
    if isinstance(value, np.ndarray):
        return value.tolist()
    return None if isinstance(value, float) and not math.isfinite(value) else value


@dataclass(frozen=True)
class ReportTable:
    """A table of texts.

    Attributes:
        title: What it shows.
        header: Names of the columns.
        rows: Cells, as texts.
        note: What a reader must know.
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""

    def to_markdown(self) -> str:
        """A heading, the note, the table."""
        head = ["| " + " | ".join(self.header) + " |", "|---|" + "---:|" * (len(self.header) - 1)]
        lines = [*head, *("| " + " | ".join(row) + " |" for row in self.rows)] if self.rows else []
        return "\n".join([f"### {self.title}", "", *([self.note, ""] if self.note else []), *lines, ""])

    def to_html(self) -> str:
        """The same as HTML."""

        def cells(texts: Sequence[str], tag: str) -> str:
            return "<tr>" + "".join(f"<{tag}>{html.escape(text)}</{tag}>" for text in texts) + "</tr>"

        body = "\n".join(cells(row, "td") for row in self.rows)
        remark = f"<p>{html.escape(self.note)}</p>\n" if self.note else ""
        if not self.rows:
            return f"<h3>{html.escape(self.title)}</h3>\n{remark}"
        head = f"<thead>{cells(self.header, 'th')}</thead>"
        return (
            f"<h3>{html.escape(self.title)}</h3>\n{remark}"
            f"<div class=wide><table>{head}\n<tbody>{body}</tbody></table></div>"
        )
