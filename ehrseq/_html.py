"""A page that needs nothing else: one HTML file, its plots drawn inside it as SVG, equal data giving equal bytes."""

from __future__ import annotations

import base64
import hashlib
import html
import io
import re
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_INK, _SOFT, _GRID = "#22303c", "#6b7684", "#e4e7eb"
GUIDE = "#8a96a3"
"""Colour of lines to compare with."""

COLOURS = (
    "#1f6feb",
    "#d1495b",
    "#2a9d8f",
    "#e8a33d",
    "#7b5ea7",
    "#5c677d",
    "#9aa5b1",
    "#bc6c25",
    "#118ab2",
    "#73a942",
)
# A plot takes its colours from the page, so that it can be read in the dark as well.
_VARIABLES = {_INK: "var(--ink)", _SOFT: "var(--soft)", _GRID: "var(--grid)"}
_STYLE = """
:root { color-scheme: light dark; --ink: #22303c; --soft: #6b7684; --grid: #e4e7eb; --page: #fff }
@media (prefers-color-scheme: dark) { :root { --ink: #dde3ea; --soft: #97a3b0; --grid: #36404b; --page: #14191f } }
body {
  font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page);
  max-width: 1100px; margin: 2em auto; padding: 0 1em; overflow-wrap: break-word;
}
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums }
td, th { padding: .2em .7em; border-bottom: 1px solid var(--grid); text-align: right }
td:first-child, th:first-child { text-align: left } h2 { margin-top: 2em } svg { max-width: 100%; height: auto }
div.wide { overflow-x: auto } div.wide svg { min-width: 620px } div.wide td { white-space: nowrap }
div.texts td, div.texts th { text-align: left } div.texts td + td { white-space: normal; overflow-wrap: anywhere }
p.note { color: var(--soft); font-size: 13px }
@media print {
  :root { color-scheme: light; --ink: #22303c; --soft: #6b7684; --grid: #e4e7eb; --page: #fff }
  body { max-width: none; margin: 0; font-size: 11px } table { font-size: 9px }
  svg, tr { break-inside: avoid } h2, h3 { break-after: avoid } thead { display: table-header-group }
}
"""


def html_page(title: str, parts: Sequence[str], *, style: str = "", script: str = "") -> str:
    """The page.

    Args:
        title: Title, as text.
        parts: The body's elements, as HTML.
        style: CSS beside the house's.
        script: JavaScript that runs at the end of the body. A page that has one forbids every other script, and
            whatever would come from elsewhere or go there.
    """
    style = _STYLE + style
    policy = end = ""
    if script:
        sources = f"style-src {_source(style)}; script-src {_source(script)}; base-uri 'none'; form-action 'none'"
        policy = f'<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; {sources}">'
        policy += '<meta name="viewport" content="width=device-width, initial-scale=1">'
        end = f"<script>{script}</script>\n"
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">{policy}<title>{html.escape(title)}</title>'
        f"<style>{style}</style></head><body>\n" + "\n".join(parts) + f"\n{end}</body></html>\n"
    )


def _source(text: str) -> str:
    """How a policy names an element's text: by its hash."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def rows_as_html(columns: Sequence[str], rows: Iterable[Sequence[Any]], cell: Callable[[str, Any], str]) -> str:
    """A table; `cell` makes HTML of a column's name and a value. Nothing where there are no rows."""
    lines = []
    for row in rows:
        cells = "".join(f"<td>{cell(name, value)}</td>" for name, value in zip(columns, row, strict=True))
        lines.append(f"<tr>{cells}</tr>")
    if not lines:
        return ""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in columns)
    return f"<table><tr>{head}</tr>\n" + "\n".join(lines) + "\n</table>"


def note(text: str) -> str:
    """A paragraph in small print: text, not HTML."""
    return f"<p class=note>{html.escape(text)}</p>"


def figure(
    draw: Callable[[Sequence[Axes]], None], *, height: float, panels: int = 1, columns: int = 1, sharex: bool = True
) -> str:
    """A figure as inline SVG that names nothing outside.

    Args:
        draw: Draws on the axes, of which there are `panels`.
        height: Height in inches; the width is 9.
        panels: Number of axes.
        columns: How many of them stand side by side.
        sharex: Whether axes one above the other share their x axis.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure  # not pyplot's: a notebook keeps its backend
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    style: Any = {
        "font.size": 9,
        "text.color": _INK,
        "axes.labelcolor": _INK,
        "xtick.color": _SOFT,
        "ytick.color": _SOFT,
        "svg.hashsalt": "ehrseq",
        "svg.fonttype": "none",
    }
    with rc_context(style):
        canvas = Figure(figsize=(9, height), layout=ConstrainedLayoutEngine(h_pad=0.08, hspace=0.04))
        grid = canvas.subplots(-(-panels // columns), columns, sharex="col" if sharex else False, squeeze=False)
        axes = list(grid.flat)
        for axis in axes[panels:]:
            axis.set_visible(False)
        draw(axes[:panels])
        for axis in axes[:panels]:
            axis.spines[["top", "right", "left"]].set_visible(False)
            axis.spines["bottom"].set_color(_GRID)
            axis.grid(axis="y", color=_GRID, lw=0.8)
            axis.set_axisbelow(True)
            axis.tick_params(length=0)
        text = io.StringIO()
        canvas.savefig(
            text, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
        )
    picture = re.sub(r"^.*?(?=<svg)", "", text.getvalue(), flags=re.DOTALL)
    for colour, variable in _VARIABLES.items():
        picture = picture.replace(colour, variable)
    picture = re.sub(r' xmlns(:\w+)?="[^"]*"', "", picture)  # HTML knows these names without their addresses
    return f"<div class=wide>{picture}</div>"
