"""The picture of one patient: the record, the risk as it went, the largest contributions, as a PNG."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

from ehrseq._html import COLOURS
from ehrseq.interpretability.page import check_one_patient
from ehrseq.interpretability.record_timeline import (
    GRID,
    INK,
    SOFT,
    draw_record,
    explained_record,
    record_before,
    record_visits,
    visit_legend,
)
from ehrseq.work.files import write_whole

if TYPE_CHECKING:
    from ehrseq.interpretability.explanation import Explanation

RAISES, LOWERS = "#b3374a", "#1f6feb"
_MOST_LETTERS = 44


def save_picture(
    explanations: Explanation | Sequence[Explanation],
    file: str | Path,
    *,
    record: pl.DataFrame | None = None,
    most: int = 12,
    panels: Sequence[tuple[float, Callable[[Any], object]]] = (),
) -> Path:
    """Draw what the page shows: the record's timeline, the risk after every event, the largest contributions.

    Args:
        explanations: Explanations of one patient at one time; two panels of contributions stand side by side.
        file: PNG, replaced where it is there.
        record: The patient's events, for the class of every visit and for events that the model did not see.
        most: Contributions of each explanation.
        panels: What else is drawn below, each its height in inches and what draws on its axes.

    Returns:
        The file.

    Raises:
        ValueError: No explanation, or those of several patients or times, or twice the same task and method; `most` is
            no count.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure  # not pyplot's: a notebook keeps its backend

    from ehrseq.interpretability.explanation import Explanation

    chosen = [explanations] if isinstance(explanations, Explanation) else list(explanations)
    check_one_patient(chosen)
    if isinstance(most, bool) or not isinstance(most, int) or most < 1:
        raise ValueError(f"most got {most!r}; expected a whole number of contributions from 1 on.")
    known, visits = _known(chosen, record)
    curves = _courses(chosen)
    columns = min(2, len(chosen))
    lines = -(-len(chosen) // columns)
    rows = [chosen[line * columns : (line + 1) * columns] for line in range(lines)]
    rooms = [0.7 + 0.2 * most if any(_is_explained(each) for each in row) else 0.6 for row in rows]
    heights = [2.0, *([1.3] if curves else []), *rooms, *(height for height, _ in panels)]
    style: Any = {"font.size": 9, "text.color": INK, "axes.labelcolor": INK, "xtick.color": SOFT, "ytick.color": INK}
    with rc_context(style):
        figure = Figure(figsize=(10, 0.7 + sum(heights)), layout="constrained")
        grid = figure.add_gridspec(len(heights), columns, height_ratios=heights)
        timeline = figure.add_subplot(grid[0, :])
        draw_record(timeline, known, visits, chosen[0].prediction_time)
        if record is not None:
            visit_legend(timeline)
        axes = [timeline]
        if curves:
            axes.append(figure.add_subplot(grid[1, :], sharex=timeline))
            _draw_courses(axes[-1], curves, chosen[0].prediction_time)
        _date_axes(axes)
        for place, explanation in enumerate(chosen):
            line, column = divmod(place, columns)
            axes.append(figure.add_subplot(grid[len(heights) - len(panels) - lines + line, column]))
            _draw_largest(axes[-1], explanation, most)
        for place, (_, draw) in enumerate(panels):
            axes.append(figure.add_subplot(grid[len(heights) - len(panels) + place, :]))
            draw(axes[-1])
        for axis in axes:
            axis.spines[["top", "right", "left"]].set_visible(False)
            axis.spines["bottom"].set_color(GRID)
            axis.tick_params(length=0)
            axis.set_axisbelow(True)
        figure.suptitle(_title(chosen[0]), x=0.01, ha="left", fontsize=12, fontweight="bold")
        write_whole(file, lambda path: figure.savefig(path, format="png", dpi=150, facecolor="white"))
    return Path(file)


def _title(first: Explanation) -> str:
    at = "" if first.prediction_time is None else f" at {first.prediction_time:%Y-%m-%d %H:%M}"
    return f"Patient {first.subject_id}{at}" if first.subject_id is not None else f"Patient{at}"


def _is_explained(explanation: Explanation) -> bool:
    return not explanation.contributions.is_empty()


def _known(chosen: Sequence[Explanation], record: pl.DataFrame | None) -> tuple[pl.DataFrame, pl.DataFrame]:
    if record is None:
        return explained_record(max((each.contributions for each in chosen), key=len))
    known = record_before(record, chosen[0].prediction_time)
    return known, record_visits(known, chosen[0].prediction_time)


def _courses(chosen: Sequence[Explanation]) -> dict[str, pl.DataFrame]:
    """Task -> time and risk after it, where a method told them."""
    curves = {}
    for each in chosen:
        table = each.contributions.filter(pl.col("score_after").is_not_null(), pl.col("time").is_not_null())
        if table.height and each.task not in curves:
            curves[each.task] = table.select("time", "score_after").sort("time", maintain_order=True)
    return curves


def _draw_courses(axis: Any, curves: dict[str, pl.DataFrame], until: datetime | None) -> None:
    from matplotlib.ticker import PercentFormatter

    most = 0.0
    for (task, table), colour, dashes in zip(curves.items(), COLOURS, _dashes(len(curves)), strict=False):
        times, scores = table["time"].to_list(), table["score_after"].to_list()
        if until is not None:
            times, scores = [*times, until], [*scores, scores[-1]]
        axis.plot(times, scores, drawstyle="steps-post", color=colour, lw=1.4, ls=dashes, label=task.replace("_", " "))
        most = max(most, *scores)
    axis.set_ylim(0, min(1.02, 1.15 * max(most, 0.01)))
    axis.yaxis.set_major_formatter(PercentFormatter(1.0))
    axis.locator_params(axis="y", nbins=3)
    axis.grid(axis="y", color=GRID, lw=0.8)
    axis.set_title("risk after every event", loc="left", fontsize=9, fontweight="bold", pad=3)
    axis.legend(loc="lower right", bbox_to_anchor=(1, 0.97), ncols=4, frameon=False, fontsize=8)


def _dashes(count: int) -> list[Any]:
    """Kinds of lines, which can be told apart in grey."""
    kinds: list[Any] = ["-", (0, (4, 2)), (0, (1, 1)), (0, (6, 2, 1, 2))]
    return [kinds[place % len(kinds)] for place in range(count)]


def _date_axes(axes: Sequence[Any]) -> None:
    import matplotlib.dates as mdates

    for axis in axes[:-1]:
        axis.tick_params(labelbottom=False)
    axes[-1].xaxis.set_major_formatter(mdates.ConciseDateFormatter(axes[-1].xaxis.get_major_locator()))


def _draw_largest(axis: Any, explanation: Explanation, most: int) -> None:
    """Bars of the largest contributions, from above; hatched ones lower the risk."""
    task = explanation.task.replace("_", " ")
    if not _is_explained(explanation):
        axis.set_title(task, loc="left", fontsize=9, fontweight="bold")
        reason = (explanation.reason or "no event").replace("_", " ")
        axis.text(0.0, 0.95, f"no explanation: {reason}", transform=axis.transAxes, va="top", color=SOFT)
        axis.set_axis_off()
        return
    table = (
        explanation.contributions.filter(pl.col("event").is_not_null() | pl.col("group").is_not_null())
        .sort(pl.col("contribution").abs(), descending=True, maintain_order=True)
        .head(most)
        .reverse()
    )
    values = table["contribution"].to_list()
    bars = axis.barh(range(len(values)), values, height=0.62, color=[RAISES if v > 0 else "white" for v in values])
    for bar, value in zip(bars, values, strict=True):
        if value <= 0:
            bar.set(hatch="/////", edgecolor=LOWERS, linewidth=0.8)
        axis.annotate(
            f"{value:+.{2 if abs(value) >= 0.1 else 3}f}".replace("-", "−"),
            (value, bar.get_y() + bar.get_height() / 2),
            xytext=(3 if value > 0 else -3, 0),
            textcoords="offset points",
            ha="left" if value > 0 else "right",
            va="center",
            fontsize=7.5,
        )
    axis.set_yticks(range(len(values)), [_name(row) for row in table.iter_rows(named=True)], fontsize=7.5)
    axis.axvline(0, color=SOFT, lw=0.8)
    axis.margins(x=0.25)
    axis.locator_params(axis="x", nbins=4)
    axis.grid(axis="x", color=GRID, lw=0.8)
    axis.set_ylim(len(values) - most - 0.6, len(values) - 0.4)  # bars of one height, from above, in all panels
    score = "" if math.isnan(explanation.score) else f", risk {explanation.score:.1%}"
    axis.set_title(
        f"{task}{score}\nby {explanation.method.replace('_', ' ')}", loc="left", fontsize=9, fontweight="bold", pad=3
    )
    axis.set_xlabel("contribution, log-odds", fontsize=8)


def _name(row: dict[str, Any]) -> str:
    """An event in the room of a label; `$` would begin a formula."""
    name = row["group"] or row["display"] or row["code"] or ""
    value = row["value"]
    extra = "" if value is None else f" {value:.4g}" + (f" {row['unit']}" if row["unit"] else "")
    when = "" if row["time"] is None else f", {row['time']:%Y-%m-%d}"
    room = _MOST_LETTERS - len(extra) - len(when)
    name = name if len(name) <= room else name[: max(1, room - 1)] + "…"
    return f"{name}{extra}{when}".replace("$", r"\$")
