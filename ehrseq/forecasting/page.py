"""The page of a forecast: cumulative incidence over time, of all patients and of some, one HTML file that needs nothing
else.

A curve's band is the error of the trajectories (95 %): how far off the number is that the model would give after
endless ones. It says nothing of how right the model is; `ehrseq evaluate-forecast` does.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from ehrseq._html import COLOURS, figure, html_page, note
from ehrseq.work.files import write_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from ehrseq.forecasting.datasets import ForecastTables

PATIENTS_SHOWN = 6
"""Patients with curves of their own, where none are named."""

_Z = 1.959963984540054
_KEYS = ["subject_id", "prediction_time"]


def write_forecast_page(tables: ForecastTables, file: str | Path, *, patients: Sequence[int] | None = None) -> Path:
    """Write the page; equal forecasts give equal bytes.

    Args:
        tables: Forecasts with their cumulative incidence (`ForecastSettings.steps`).
        file: HTML file, replaced where it is there.
        patients: Who is shown with curves of their own; None = some of the highest probability, for each outcome.

    Returns:
        The file.

    Raises:
        ValueError: Forecasts without a probability or without incidence, or of none of these patients.
    """
    given = tables.forecasts.filter(pl.col("score").is_not_null())
    if given.is_empty():
        raise ValueError("there is no forecast to show: nobody has a probability. See the column reason.")
    if tables.incidence.is_empty():
        raise ValueError("the forecasts hold no cumulative incidence to draw; ask for some steps up to the horizon.")
    shown = _chosen(given, tables.incidence, patients)
    names = [each.name for each in tables.asked]
    colours = {name: COLOURS[place % len(COLOURS)] for place, name in enumerate(names)}
    curves = [name for name in names if name in set(tables.incidence["task"].to_list())]
    people = given.select(_KEYS).unique()
    without = tables.forecasts.filter(pl.col("score").is_null()).select(_KEYS).unique().height
    parts = [
        "<h1>What comes next</h1>",
        f"<p>{people['subject_id'].n_unique():,} patients, {people.height:,} forecasts; {without:,} without one (the "
        "patient is dead, or nothing is known).</p>",
        *([f"<p><b>{html.escape(tables.notice)}</b></p>"] if tables.notice else []),
        "<h2>All patients</h2>",
        figure(
            lambda axes: _draw_means(axes, tables.incidence, curves, colours),
            height=0.4 + 2.6 * -(-len(curves) // 2),
            panels=len(curves),
            columns=min(2, len(curves)),
            sharex=False,
        ),
        note(
            "Lines: mean over the forecasts of the probability that the outcome has happened by then, with the 95 % "
            "interval that the trajectories leave. Dotted: 10 % and 90 % of the patients lie below."
        ),
        _summary_table(given, names, tables),
        "<h2>Some of the patients</h2>",
        note(
            "Each outcome's curve with the 95 % interval that its trajectories leave. The error of the model itself is "
            "not in it."
        ),
        figure(
            lambda axes: _draw_patients(axes, tables.incidence, shown, curves, colours),
            height=0.5 + 2.5 * -(-shown.height // 2),
            panels=shown.height,
            columns=min(2, shown.height),
            sharex=False,
        ),
        _patients_table(given, shown, names),
        *_notes(tables),
    ]
    file = Path(file)
    write_text(file, html_page("What comes next", parts))
    return file


def _chosen(given: pl.DataFrame, incidence: pl.DataFrame, patients: Sequence[int] | None) -> pl.DataFrame:
    """subject_id and prediction_time of those who are shown: in turn the highest of each outcome, each once."""
    with_curve = given.join(incidence.select(*_KEYS, "task").unique(), on=[*_KEYS, "task"], how="semi")
    if patients is not None:
        named = with_curve.filter(pl.col("subject_id").is_in(list(patients)))
        if named.is_empty():
            raise ValueError(f"none of the patients {list(patients)[:5]} has a forecast to show.")
        return named.select(_KEYS).unique().sort(_KEYS)
    ranked = with_curve.sort(["score", *_KEYS], descending=[True, False, False]).with_columns(
        rank=pl.int_range(pl.len()).over("task")
    )
    keys = ranked.sort(["rank", "task"]).select(_KEYS).unique(maintain_order=True)
    return keys.unique("subject_id", keep="first", maintain_order=True).head(PATIENTS_SHOWN)


def _draw_means(axes: Sequence[Axes], incidence: pl.DataFrame, names: Sequence[str], colours: dict[str, str]) -> None:
    for axis, name in zip(axes, names, strict=True):
        of_task = (
            incidence.filter(pl.col("task") == name)
            .group_by("days")
            .agg(
                mean=pl.col("probability").mean(),
                error=(pl.col("standard_error") ** 2).sum().sqrt() / pl.len(),
                low=pl.col("probability").quantile(0.1, "linear"),
                high=pl.col("probability").quantile(0.9, "linear"),
            )
        )
        table = of_task.sort("days")
        days = _from_zero(table["days"])
        colour = colours[name]
        low, high = _from_zero(table["low"]), _from_zero(table["high"])
        axis.fill_between(days, low, high, color=colour, alpha=0.08, lw=0)
        axis.plot(days, high, color=colour, lw=0.8, ls=":")
        axis.plot(days, low, color=colour, lw=0.8, ls=":")
        mean, error = _from_zero(table["mean"]), _from_zero(table["error"])
        low, high = np.maximum(mean - _Z * error, 0), np.minimum(mean + _Z * error, 1)
        axis.fill_between(days, low, high, color=colour, alpha=0.35, lw=0)
        axis.plot(days, mean, color=colour, lw=1.6)
        axis.set_title(name, loc="left", fontsize=9, fontweight="bold")
        axis.set_xlim(0, days[-1])
        axis.set_ylim(bottom=0)
        axis.yaxis.set_major_formatter(_percent)
        axis.set_xlabel("days after the prediction time")


def _draw_patients(
    axes: Sequence[Axes], incidence: pl.DataFrame, shown: pl.DataFrame, names: Sequence[str], colours: dict[str, str]
) -> None:
    ends = incidence.join(shown, on=_KEYS, how="semi").select(pl.col("probability") + _Z * pl.col("standard_error"))
    top = min(1.0, 1.05 * float(ends.to_series().to_numpy().max()))
    for number, (axis, (subject, time)) in enumerate(zip(axes, shown.iter_rows(), strict=True)):
        own = incidence.filter((pl.col("subject_id") == subject) & (pl.col("prediction_time") == time))
        last = 0.0
        for name in names:
            table = own.filter(pl.col("task") == name).sort("days")
            if table.is_empty():
                continue
            days, value, error = (_from_zero(table[column]) for column in ("days", "probability", "standard_error"))
            low, high = np.maximum(value - _Z * error, 0), np.minimum(value + _Z * error, 1)
            high = np.maximum.accumulate(high)  # what may have happened by a day, may have by the next
            axis.fill_between(days, low, high, color=colours[name], alpha=0.18, lw=0)
            axis.plot(days, value, color=colours[name], lw=1.4, label=name)
            last = max(last, float(days[-1]))
        axis.set_title(f"{subject}, {_minute(time)}", loc="left", fontsize=9, fontweight="bold")
        axis.set_xlim(0, last)
        axis.set_ylim(0, top)
        axis.yaxis.set_major_formatter(_percent)
        if number == 0:
            axis.legend(frameon=False, fontsize=7, loc="upper left")


def _percent(value: float, _: object) -> str:
    return f"{100 * value:.3g} %"


def _from_zero(column: pl.Series) -> np.ndarray:
    """Values at the days of the grid, with the 0 at day 0 where every curve begins."""
    return np.concatenate([[0.0], column.to_numpy()])


def _summary_table(given: pl.DataFrame, names: Sequence[str], tables: ForecastTables) -> str:
    rows = []
    days = {each.name: each.horizon_days for each in tables.asked}
    for name in names:
        of_task = given.filter(pl.col("task") == name)
        if of_task.is_empty():
            continue
        scores, errors = of_task["score"].to_numpy(), of_task["standard_error"].to_numpy()
        quantiles = np.quantile(scores, [0.1, 0.5, 0.9])
        rows.append(
            [
                name,
                f"{days[name]:g} days",
                f"{len(scores):,}",
                _share(scores.mean()),
                _share(float(np.sqrt((errors**2).sum()) / len(errors))),
                *map(_share, quantiles),
                _share(scores.max()),
                _share(float(np.median(errors))),
                f"{of_task['num_trajectories'].to_numpy().mean():,.0f}",
            ]
        )
    head = [
        *("outcome", "horizon", "forecasts", "mean", "its error", "10 % below", "median", "90 % below", "highest"),
        *("error of one, median", "trajectories"),
    ]
    return _table(head, rows)


def _patients_table(given: pl.DataFrame, shown: pl.DataFrame, names: Sequence[str]) -> str:
    rows = []
    for subject, time in shown.iter_rows():
        own = given.filter((pl.col("subject_id") == subject) & (pl.col("prediction_time") == time))
        cells = {
            task: f"{_share(score)} ± {_share(error)}"
            for task, score, error in own.select("task", "score", "standard_error").iter_rows()
        }
        rows.append([str(subject), _minute(time), *(cells.get(name, "") for name in names)])
    return _table(["patient", "prediction time", *(f"{name} ± error" for name in names)], rows)


def _notes(tables: ForecastTables) -> list[str]:
    """What is approximated, outcome by outcome."""
    lines = [f"{each.name}: {words}" for each in tables.asked for words in each.notes]
    lines += [f"{words}: {count:,}" for words, count in sorted(tables.report.notes.items()) if count]
    if not lines:
        return []
    return ["<h2>What is approximated, and what was left out</h2>", *map(note, dict.fromkeys(lines))]


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    cells = "".join(f"<th>{html.escape(text)}</th>" for text in head)
    body = "".join(f"<tr>{''.join(f'<td>{html.escape(str(cell))}</td>' for cell in row)}</tr>" for row in rows)
    return f"<div class=wide><table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table></div>"


def _share(value: float) -> str:
    """A probability in per cent, with digits for small ones."""
    return f"{100 * value:.1f} %" if value >= 0.0995 else f"{100 * value:.2f} %"


def _minute(time: datetime) -> str:
    return time.isoformat(sep=" ", timespec="minutes")
