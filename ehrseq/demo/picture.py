"""The demo's picture: what happened to one patient, and what the model said at every prediction time."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

INK, SOFT, GRID = "#22303c", "#7b8794", "#e4e7eb"
MODEL, TRUTH, EVENT = "#1f6feb", "#9aa5b1", "#d1495b"
VISITS = {"admission": "#1f6feb", "emergency": "#e8a33d", "other visit": "#b8c4cf"}
KIND_NAMES = {
    "diagnosis": "diagnoses",
    "procedure": "procedures",
    "medication": "medications",
    "lab": "labs",
    "vital": "vitals",
}


def draw_patient(
    path: Path,
    events: pl.DataFrame,
    rows: pl.DataFrame,
    names: list[str],
    *,
    true_risk: np.ndarray | None = None,
) -> Path:
    """Draw one patient: a small panel per task over the record's timeline.

    Args:
        path: PNG to write.
        events: The patient's events.
        rows: The patient's labels with the model's risks: task, subject_id, prediction_time, boolean_value, score.
        names: Tasks to draw, from above.
        true_risk: `[n]` true risk of each row (simulated patients).

    Returns:
        The path.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.dates as mdates
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D
    from matplotlib.ticker import PercentFormatter

    tasks, all_times, all_scores = (rows[name].to_numpy() for name in ("task", "prediction_time", "score"))
    shown = [name for name in names if (tasks == name).any()]
    style: Any = {"font.size": 9, "text.color": INK, "axes.labelcolor": INK, "xtick.color": SOFT, "ytick.color": SOFT}
    with plt.rc_context(style):
        figure, axes = plt.subplots(
            len(shown) + 1,
            1,
            figsize=(10, 1.05 * len(shown) + 3.0),
            sharex=True,
            height_ratios=[1.0] * len(shown) + [2.0],
            layout="constrained",
        )
        for axis, name in zip(axes[:-1], shown, strict=True):
            own = np.flatnonzero(tasks == name)
            own = own[np.argsort(all_times[own])]
            times, risk = all_times[own], all_scores[own]
            if true_risk is not None:
                axis.plot(times, true_risk[own], color=TRUTH, lw=1.2, ls=(0, (3, 2)), zorder=2)
            axis.plot(times, risk, color=MODEL, lw=1.6, marker="o", ms=4.5, zorder=3)
            happened = rows["boolean_value"].to_numpy()[own]
            axis.plot(
                times[happened], risk[happened], ls="none", marker="o", ms=10, mfc="none", mec=EVENT, mew=1.8, zorder=4
            )
            top = max(0.1, float(risk.max()), float(true_risk[own].max()) if true_risk is not None else 0.0)
            axis.set_ylim(-0.06 * top, 1.25 * top)
            axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
            axis.locator_params(axis="y", nbins=3)
            axis.set_title(name.replace("_", " "), loc="left", fontsize=9, fontweight="bold", pad=3)
            axis.grid(axis="y", color=GRID, lw=0.8)
        _draw_timeline(axes[-1], events, mdates)
        for axis in axes:
            axis.spines[["top", "right", "left"]].set_visible(False)
            axis.spines["bottom"].set_color(GRID)
            axis.tick_params(length=0)
        axes[-1].xaxis.set_major_formatter(mdates.ConciseDateFormatter(axes[-1].xaxis.get_major_locator()))
        handles = [
            Line2D([], [], color=MODEL, marker="o", ms=4.5, label="model's risk"),
            Line2D([], [], ls="none", marker="o", ms=9, mfc="none", mec=EVENT, mew=1.8, label="it happened"),
        ]
        if true_risk is not None:
            handles.insert(1, Line2D([], [], color=TRUTH, ls=(0, (3, 2)), label="true risk"))
        axes[-1].legend(
            handles=[Line2D([], [], color=colour, lw=5, label=name) for name, colour in VISITS.items()],
            loc="lower right",
            bbox_to_anchor=(1, 0.97),
            ncols=len(VISITS),
            frameon=False,
            fontsize=8,
            handlelength=0.8,
        )
        figure.legend(handles=handles, loc="outside upper right", ncols=len(handles), frameon=False)
        figure.suptitle(
            f"Patient {rows['subject_id'][0]}: {events.height:,} events and the risks at each prediction time",
            x=0.01,
            ha="left",
            fontsize=12,
            fontweight="bold",
        )
        figure.savefig(path, dpi=150, facecolor="white")
        plt.close(figure)
    return path


def _draw_timeline(axis: Any, events: pl.DataFrame, mdates: Any) -> None:
    """Visits as bars, events as ticks, one line per kind."""
    from ehrseq.tasks.encounters import encounters
    from ehrseq.tokenization.ehr_codes import INPATIENT_CLASSES, code_kinds

    codes = events["code"].unique().to_list()
    kinds = dict(zip(codes, code_kinds(codes), strict=True))
    lines = [kind for kind in KIND_NAMES if kind in set(kinds.values())]
    timed = events.filter(pl.col("time").is_not_null()).with_columns(
        kind=pl.col("code").replace_strict(kinds, return_dtype=pl.String)
    )
    for height, kind in enumerate(lines):
        times = timed.filter(pl.col("kind") == kind)["time"].to_numpy()
        axis.plot(times, np.full(len(times), height), ls="none", marker="|", ms=9, mew=0.7, color=INK, alpha=0.45)
    bar = len(lines)
    visits = encounters(events)
    lived = timed.filter(pl.col("kind") != "birth")["time"].to_list()
    first, last = min(lived), max(lived)
    # A visit of an hour would be thinner than a pixel on an axis of years.
    span = max(1.0, (last - first) / timedelta(days=1))
    for row in visits.sort("start").iter_rows(named=True):
        group = "admission" if row["encounter_class"] in INPATIENT_CLASSES else "other visit"
        group = "emergency" if row["encounter_class"] == "EMER" else group
        start = mdates.date2num(row["start"])
        width = max(mdates.date2num(row["end"] or last) - start, span / 500)
        axis.broken_barh([(start, width)], (bar - 0.3, 0.6), facecolors=VISITS[group], linewidth=0)
    deaths = timed.filter(pl.col("kind") == "death")["time"].to_list()
    for death in deaths:
        axis.axvline(mdates.date2num(death), color=EVENT, lw=1.5)
        axis.annotate(" death", (mdates.date2num(death), bar + 0.55), color=EVENT, va="top")
    axis.set_yticks(range(bar + 1), [*(KIND_NAMES[kind] for kind in lines), "visits"])
    axis.set_ylim(-0.7, bar + 0.7)
    axis.set_xlim(mdates.date2num(first) - 0.01 * span, mdates.date2num(last) + 0.03 * span)
