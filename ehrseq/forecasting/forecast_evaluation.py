"""All about the forecasts of a model on records that it has not seen: tables, and the same as JSON and CSV."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import polars as pl

from ehrseq.evaluation.report_tables import ReportTable
from ehrseq.evaluation.reports import NOT_ESTIMABLE
from ehrseq.forecasting.evaluation import EVENT_MEASURES, ForecastReport, KindForecast
from ehrseq.forecasting.forecast_times import GapForecast
from ehrseq.forecasting.incidence_calibration import IncidenceCalibration
from ehrseq.forecasting.plausibility import FutureRate, PlausibilityReport

READING_EVENTS = (
    "First occurrences are events whose code, whatever its value, stands nowhere earlier in the patient's record; the "
    "others are repeats, which whoever repeats the record foretells well. Recall at k: share of the events that are "
    "among the k likeliest. NLL: mean negative log-likelihood in nats, less is better. Most frequent and last visit "
    "count what the record holds so far, then what is frequent in training."
)
READING_TIMES = (
    "PIT: the predicted probability of a gap at most as long as the one that came; of a calibrated model its histogram "
    "is flat. The distance is the largest one of its distribution from the uniform one."
)
READING_INCIDENCE = (
    "Predicted: mean cumulative incidence of the trajectories. Observed: Aalen-Johansen, death competing, censored "
    "where the data end. Difference: observed minus predicted, with its 95 % interval over patients; 0 is right."
)
READING_PLAUSIBILITY = (
    "Distances of drawn trajectories from what came to the same patients: Jensen-Shannon divergence in bits of codes "
    "and intervals, Kolmogorov distance of the others. The yardstick is the distance of two random halves of the "
    "recorded patients: at or below it, drawn and recorded cannot be told apart by that measure."
)


@dataclass(frozen=True)
class ForecastEvaluation:
    """What `evaluate_forecast_files` measured.

    Attributes:
        events: Next events and times.
        incidence: Calibration of each outcome, of all predictions and of its parts; empty where none was asked.
        plausibility: Of the trajectories, None where none were drawn.
        skipped: What was left out -> why or how much.
        settings: What was asked.
        words: How it was made, a paragraph each.
    """

    events: ForecastReport
    incidence: Sequence[IncidenceCalibration] = ()
    plausibility: PlausibilityReport | None = None
    skipped: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    words: Sequence[str] = ()

    def sections(self) -> Iterator[tuple[str, str, list[ReportTable]]]:
        """Title, how to read it, and its tables."""
        yield "Next events", READING_EVENTS, list(event_tables(self.events))
        gaps = [each for each in (self.events.visit_gaps, self.events.event_gaps) if each is not None]
        if gaps:
            yield "Times", READING_TIMES, [gap_table(each) for each in gaps]
        if self.incidence:
            yield "Incidence", READING_INCIDENCE, [incidence_table(self.incidence)]
        if self.plausibility is not None:
            yield "Trajectories", READING_PLAUSIBILITY, list(plausibility_tables(self.plausibility))

    def to_markdown(self) -> str:
        """The report."""
        lines = ["# Forecasts", "", *(f"{text}\n" for text in self.words)]
        for title, reading, tables in self.sections():
            lines += [f"## {title}", "", reading, "", *(table.to_markdown() for table in tables)]
        if self.skipped:
            lines.append(skipped_table(self.skipped).to_markdown())
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary."""
        return {
            "settings": dict(self.settings),
            "next_events": self.events.to_dict(),
            "incidence": [each.to_dict() for each in self.incidence],
            "plausibility": None if self.plausibility is None else self.plausibility.to_dict(),
            "skipped": dict(self.skipped),
        }

    def to_table(self) -> pl.DataFrame:
        """Every number as a row: section, part, name, measure, value, low, high, count."""
        rows = [*_event_rows(self.events), *_incidence_rows(self.incidence), *_plausibility_rows(self.plausibility)]
        text, number = pl.String(), pl.Float64()
        schema = {
            **dict.fromkeys(("section", "part", "name", "measure"), text),
            **dict.fromkeys(("value", "low", "high"), number),
            "count": pl.Int64(),
        }
        return pl.DataFrame(rows, schema=schema, orient="row")


def event_tables(report: ForecastReport) -> Iterator[ReportTable]:
    """One table a part, first occurrences first."""
    header = ["next event", "events", *EVENT_MEASURES]
    for title, kinds in report.parts.items():
        if kinds:
            rows = [[kind, f"{each.events:,}", *map(_cell(each), EVENT_MEASURES)] for kind, each in kinds.items()]
            yield ReportTable(title.capitalize(), header, rows)


def _cell(forecast: KindForecast) -> Any:
    def cell(measure: str) -> str:
        return _spread(forecast.value(measure), forecast.low.get(measure), forecast.high.get(measure))

    return cell


def _spread(value: float, low: float | None, high: float | None, digits: int = 3) -> str:
    if not math.isfinite(value):
        return NOT_ESTIMABLE
    known = low is not None and high is not None and math.isfinite(low) and math.isfinite(high)
    return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]" if known else f"{value:.{digits}f}"


def gap_table(gaps: GapForecast) -> ReportTable:
    """Errors of a kind of gap."""
    rows = [[who, _spread(value, gaps.low.get(who), gaps.high.get(who), 2)] for who, value in gaps.off.items()]
    note = f"{gaps.gaps:,} gaps. Distance of the PIT from uniform: {gaps.pit_distance:.3f}."
    if gaps.at_once is not None:
        note += f" At the same instant: {gaps.at_once[1]:.1%} of them, {gaps.at_once[0]:.1%} expected."
    return ReportTable(gaps.title, ["forecast", f"mean absolute error, {gaps.unit}"], rows, note)


def incidence_table(found: Sequence[IncidenceCalibration]) -> ReportTable:
    """One row an outcome, part and day."""
    header = ["outcome", "predictions", "events", "deaths before", "not followed", "day", "predicted", "observed"]
    header += ["difference"]
    rows = []
    for each in found:
        counts = [f"{each.rows:,}", f"{each.events:,}", f"{each.deaths:,}", f"{each.censored:,}"]
        group = each.everybody
        columns = zip(
            each.grid_days, group.predicted, group.observed, group.low, group.high, each.difference, strict=True
        )
        for day, predicted, observed, low, high, difference in columns:
            gap = _spread(difference.value, difference.low, difference.high)
            cells = [f"{day:g}", f"{predicted:.3f}", _spread(observed, low, high), gap]
            rows.append([f"{each.outcome}, {each.part}", *counts, *cells])
    return ReportTable("Cumulative incidence, predicted and observed", header, rows)


def plausibility_tables(report: PlausibilityReport) -> Iterator[ReportTable]:
    """Distances, rates by kind, rates by age, codes."""
    note = (
        f"{report.trajectories:,} trajectories of {report.horizon_days:g} days at {report.predictions:,} times of "
        f"{report.patients:,} patients; {report.left_out:,} times were not followed as long. "
        f"{report.cut:.1%} of the trajectories were cut at the longest length."
    )
    header = ["measure", "distance", "yardstick", "values drawn", "recorded", "mean drawn", "recorded mean"]
    rows = [
        [
            each.measure,
            _spread(each.distance, None, None),
            _spread(each.yardstick, None, None),
            f"{each.drawn:,}",
            f"{each.recorded:,}",
            f"{each.drawn_mean:.2f}" if math.isfinite(each.drawn_mean) else "",
            f"{each.recorded_mean:.2f}" if math.isfinite(each.recorded_mean) else "",
        ]
        for each in report.distances
    ]
    yield ReportTable("Marginals", header, rows, note)
    columns = ["per 100 patient-days", "patients", "drawn", "recorded", "drawn / recorded"]
    for title, rates in (("Rates by kind", report.kinds), ("Rates by age", report.ages)):
        yield ReportTable(title, columns, [_rate_cells(rate) for rate in rates])
    cells = [[code, f"{drawn:.3f}", f"{recorded:.3f}"] for code, (drawn, recorded) in report.codes.items()]
    title = "Codes whose number differs most"
    yield ReportTable(title, ["code, per 100 patient-days", "drawn", "recorded"], cells)


def _rate_cells(rate: FutureRate) -> list[str]:
    ratio = "" if rate.ratio is None else _spread(rate.ratio.value, rate.ratio.low, rate.ratio.high, 2)
    return [rate.group, f"{rate.patients:,}", f"{rate.drawn:.3f}", f"{rate.recorded:.3f}", ratio]


def skipped_table(skipped: Mapping[str, str]) -> ReportTable:
    """What was left out."""
    return ReportTable("Left out", ["what", "why"], [[name, reason] for name, reason in skipped.items()])


Row = tuple[str, str, str, str, float | None, float | None, float | None, int]


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _event_rows(report: ForecastReport) -> Iterator[Row]:
    for part, kinds in report.parts.items():
        for kind, each in kinds.items():
            for measure in EVENT_MEASURES:
                ends = _finite(each.low.get(measure)), _finite(each.high.get(measure))
                yield "next events", part, kind, measure, _finite(each.value(measure)), *ends, each.events
    for gaps in (report.visit_gaps, report.event_gaps):
        if gaps is not None:
            for who, value in gaps.off.items():
                ends = _finite(gaps.low.get(who)), _finite(gaps.high.get(who))
                yield "times", gaps.unit, gaps.title, f"mean absolute error: {who}", value, *ends, gaps.gaps
            yield "times", gaps.unit, gaps.title, "distance of the PIT", gaps.pit_distance, None, None, gaps.gaps


def _incidence_rows(found: Sequence[IncidenceCalibration]) -> Iterator[Row]:
    for each in found:
        for place, day in enumerate(each.grid_days):
            group, difference = each.everybody, each.difference[place]
            name = f"{each.outcome} by day {day:g}"
            yield "incidence", each.part, name, "predicted", group.predicted[place], None, None, each.rows
            ends = _finite(group.low[place]), _finite(group.high[place])
            yield "incidence", each.part, name, "observed", _finite(group.observed[place]), *ends, each.rows
            ends = _finite(difference.low), _finite(difference.high)
            yield "incidence", each.part, name, "difference", _finite(difference.value), *ends, each.rows


def _plausibility_rows(report: PlausibilityReport | None) -> Iterator[Row]:
    if report is None:
        return
    for each in report.distances:
        for measure in ("distance", "yardstick"):
            value = _finite(getattr(each, measure))
            yield "trajectories", "marginals", each.measure, measure, value, None, None, each.recorded
    for part, rates in (("kind", report.kinds), ("age", report.ages)):
        for rate in rates:
            for measure in ("drawn", "recorded"):
                value = _finite(getattr(rate, measure))
                yield (
                    "trajectories",
                    part,
                    rate.group,
                    f"{measure} per 100 patient-days",
                    value,
                    None,
                    None,
                    rate.patients,
                )
