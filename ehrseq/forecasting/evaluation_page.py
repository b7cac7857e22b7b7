"""The page of an evaluation of forecasts: every table, and what can be seen better than read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ehrseq._html import COLOURS, GUIDE, figure, html_page, note
from ehrseq.forecasting.evaluation import FORECASTERS, ForecastReport
from ehrseq.forecasting.forecast_evaluation import ForecastEvaluation, skipped_table
from ehrseq.forecasting.forecast_times import PIT_BINS, GapForecast
from ehrseq.forecasting.incidence_calibration import IncidenceCalibration
from ehrseq.forecasting.plausibility import PlausibilityReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_GUIDE: dict[str, Any] = {"color": GUIDE, "lw": 0.9, "ls": ":"}
_K = 10  # length of the lists that the picture of next events shows


def forecast_evaluation_page(evaluation: ForecastEvaluation) -> str:
    """The page as HTML; equal data give equal bytes."""
    parts = ["<h1>Evaluation of forecasts</h1>", *(note(text) for text in evaluation.words)]
    for title, reading, tables in evaluation.sections():
        parts += [f"<h2>{title}</h2>", *_pictures(title, evaluation), note(reading)]
        parts += [table.to_html() for table in tables]
    if evaluation.skipped:
        parts.append(f"<div class=texts>{skipped_table(evaluation.skipped).to_html()}</div>")
    return html_page("ehrseq evaluation of forecasts", parts)


def _pictures(title: str, evaluation: ForecastEvaluation) -> list[str]:
    if title == "Next events":
        return [recall_bars(evaluation.events)]
    if title == "Times":
        gaps = [each for each in (evaluation.events.visit_gaps, evaluation.events.event_gaps) if each is not None]
        return [pit_histograms(gaps)]
    if title == "Incidence":
        return [incidence_curves(evaluation.incidence)]
    return [] if evaluation.plausibility is None else [distance_dots(evaluation.plausibility)]


def recall_bars(report: ForecastReport) -> str:
    """Recall of first occurrences and of repeats by kind, model and counting forecasts, as inline SVG."""
    parts = [(title, kinds) for title, kinds in report.parts.items() if kinds][:2]

    def draw(axes: Sequence[Axes]) -> None:
        for axis, (title, kinds) in zip(axes, parts, strict=True):
            for number, who in enumerate(FORECASTERS):
                measure = f"recall at {_K}: {who}"
                places = np.arange(len(kinds)) + 0.27 * (number - 1)
                axis.bar(
                    places, [each.value(measure) for each in kinds.values()], 0.25, color=COLOURS[number], label=who
                )
                for place, each in zip(places, kinds.values(), strict=True):
                    if measure in each.low:
                        axis.vlines(place, each.low[measure], each.high[measure], color=GUIDE, lw=1)
            axis.set_xticks(range(len(kinds)), [f"{kind}\n{each.events:,}" for kind, each in kinds.items()])
            axis.set_ylim(0, 1)
            axis.set_ylabel(f"recall at {_K}")
            axis.set_title(title.capitalize(), loc="left", fontsize=9, fontweight="bold")
        axes[0].legend(frameon=False, fontsize=8, ncols=3, loc="upper right")

    return figure(draw, height=2.6 * len(parts), panels=len(parts), sharex=False) if parts else ""


def pit_histograms(gaps: Sequence[GapForecast]) -> str:
    """PITs of the gaps, as inline SVG."""

    def draw(axes: Sequence[Axes]) -> None:
        for axis, each in zip(axes, gaps, strict=True):
            edges = np.arange(PIT_BINS) / PIT_BINS
            axis.bar(edges, np.array(each.pit) * PIT_BINS, 0.9 / PIT_BINS, align="edge", color=COLOURS[0])
            axis.axhline(1, **_GUIDE)
            axis.annotate(
                "calibrated", (1, 1), (-2, 3), ha="right", color=GUIDE, fontsize=8, textcoords="offset points"
            )
            axis.set_title(each.title, loc="left", fontsize=9, fontweight="bold")
            axis.set(xlabel=f"PIT of {each.gaps:,} gaps", ylabel="density")

    return figure(draw, height=2.6, panels=len(gaps), columns=len(gaps), sharex=False)


def incidence_curves(found: Sequence[IncidenceCalibration]) -> str:
    """Predicted and observed incidence over the days, and by predicted risk at the horizon, as inline SVG."""
    shown = [each for each in found if each.events][:8] or list(found[:1])

    def draw(axes: Sequence[Axes]) -> None:
        for number, each in enumerate(shown):
            draw_incidence(axes[2 * number], axes[2 * number + 1], each)

    return figure(draw, height=2.7 * len(shown), panels=2 * len(shown), columns=2, sharex=False)


def draw_incidence(over_days: Axes, by_risk: Axes, found: IncidenceCalibration) -> None:
    """Draw one outcome on two axes: its curves, and its groups at the horizon."""
    group = found.everybody
    days = [0.0, *found.grid_days]
    over_days.plot(days, [0, *group.predicted], color=COLOURS[0], lw=1.4, marker="o", ms=3, label="predicted")
    over_days.plot(days, [0, *group.observed], color=COLOURS[1], lw=1.4, marker="o", ms=3, label="observed")
    over_days.fill_between(days, [0, *group.low], [0, *group.high], color=COLOURS[1], alpha=0.15, lw=0)
    over_days.set(xlabel="days", ylabel="cumulative incidence", ylim=(0, None))
    title = f"{found.outcome}, {found.part}: {found.rows:,} predictions, {found.events:,} events"
    over_days.set_title(title, loc="left", fontsize=9, fontweight="bold")
    over_days.legend(frameon=False, fontsize=8, loc="upper left")
    predicted = [each.predicted[-1] for each in found.groups]
    by_risk.plot(predicted, [each.observed[-1] for each in found.groups], color=COLOURS[0], lw=1.4, marker="o", ms=4)
    by_risk.vlines(
        predicted, [each.low[-1] for each in found.groups], [each.high[-1] for each in found.groups],
        color=COLOURS[0], lw=1,
    )  # fmt: skip
    top = min(1.0, 1.05 * max(by_risk.get_xlim()[1], by_risk.get_ylim()[1]))
    by_risk.plot([0, top], [0, top], **_GUIDE)
    by_risk.set(xlim=(-0.02 * top, top), ylim=(-0.02 * top, top))
    by_risk.set(xlabel=f"predicted by day {found.grid_days[-1]:g}", ylabel="observed")
    by_risk.set_title("by predicted risk", loc="left", fontsize=9, fontweight="bold")


def distance_dots(report: PlausibilityReport) -> str:
    """Distances of drawn from recorded beside that of two halves of the records, as inline SVG."""

    def draw(axes: Sequence[Axes]) -> None:
        axis = axes[0]
        rows = list(reversed(report.distances))
        places = np.arange(len(rows))
        axis.plot([each.yardstick for each in rows], places, "D", color=GUIDE, ms=5, label="two halves of the records")
        axis.plot([each.distance for each in rows], places, "o", color=COLOURS[0], ms=6, label="drawn from recorded")
        axis.set_yticks(places, [each.measure for each in rows])
        axis.set(xlabel="distance", xlim=(0, None), ylim=(-0.6, len(rows) - 0.4))
        axis.legend(frameon=False, fontsize=8)

    return figure(draw, height=0.9 + 0.3 * len(report.distances))
