"""The demo's picture: what happened to one patient, and what the model said at every prediction time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from ehrseq.interpretability.record_timeline import (
    DEATH_COLOUR,
    GRID,
    INK,
    SOFT,
    draw_record,
    record_before,
    record_visits,
    visit_legend,
)

MODEL, TRUTH = "#1f6feb", "#9aa5b1"


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
                times[happened],
                risk[happened],
                ls="none",
                marker="o",
                ms=10,
                mfc="none",
                mec=DEATH_COLOUR,
                mew=1.8,
                zorder=4,
            )
            top = max(0.1, float(risk.max()), float(true_risk[own].max()) if true_risk is not None else 0.0)
            axis.set_ylim(-0.06 * top, 1.25 * top)
            axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
            axis.locator_params(axis="y", nbins=3)
            axis.set_title(name.replace("_", " "), loc="left", fontsize=9, fontweight="bold", pad=3)
            axis.grid(axis="y", color=GRID, lw=0.8)
        known = record_before(events, None)
        draw_record(axes[-1], known, record_visits(known))
        for axis in axes:
            axis.spines[["top", "right", "left"]].set_visible(False)
            axis.spines["bottom"].set_color(GRID)
            axis.tick_params(length=0)
        axes[-1].xaxis.set_major_formatter(mdates.ConciseDateFormatter(axes[-1].xaxis.get_major_locator()))
        handles = [
            Line2D([], [], color=MODEL, marker="o", ms=4.5, label="model's risk"),
            Line2D([], [], ls="none", marker="o", ms=9, mfc="none", mec=DEATH_COLOUR, mew=1.8, label="it happened"),
        ]
        if true_risk is not None:
            handles.insert(1, Line2D([], [], color=TRUTH, ls=(0, (3, 2)), label="true risk"))
        visit_legend(axes[-1])
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
