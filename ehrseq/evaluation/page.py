"""The page of an evaluation: one self-contained HTML file with every table and plot."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import polars as pl

from ehrseq._html import html_page, note
from ehrseq.evaluation.assessment import ALERT_COLUMNS, METRIC_TITLES, RiskAssessment, alert_cells
from ehrseq.evaluation.plots import risk_curves, subgroup_forest
from ehrseq.evaluation.report_tables import ReportTable
from ehrseq.evaluation.reports import NOT_ESTIMABLE
from ehrseq.evaluation.subgroups import Subgroup, subgroup_columns

_READING = (
    "AUROC: the chance that a row with the outcome scores above one without (0.5 = chance). AUPRC: mean precision over "
    "all sensitivities; chance gives the prevalence. Brier score: mean squared error of the risk, less is better. "
    "Calibration slope: 1 is right, below 1 the risks are too extreme. Calibration in the large: 0 is right, above 0 "
    "the risk is underestimated."
)
_READING_CURVES = (
    "The diamond and the dashed line are F1's threshold. Calibration: bins of equal mass, bars are 95 % intervals over "
    "patients. Net benefit: true positives per row, less the false ones at the odds of the threshold; a score is of "
    "use where it lies above treating everybody and treating nobody."
)


@dataclass(frozen=True)
class EvaluatedTask:
    """What the page says of one task.

    Attributes:
        assessment: Its numbers.
        rows: subject_id, prediction_time, label, score.
        groups: Its subgroups.
        outcome: The outcome in words, empty where nobody said them.
    """

    assessment: RiskAssessment
    rows: pl.DataFrame
    groups: Sequence[Subgroup]
    outcome: str = ""


def evaluation_page(tasks: Sequence[EvaluatedTask], not_evaluated: Mapping[str, str], words: Sequence[str]) -> str:
    """The page as HTML; equal data give equal bytes.

    Args:
        tasks: What was evaluated.
        not_evaluated: Task -> why it was not.
        words: How it was made, a paragraph each.
    """
    parts = ["<h1>Evaluation</h1>", *(note(text) for text in words), _overview(tasks).to_html(), note(_READING)]
    if not_evaluated:
        rows = [[name, reason] for name, reason in not_evaluated.items()]
        parts.append(f"<div class=texts>{ReportTable('Not evaluated', ['task', 'reason'], rows).to_html()}</div>")
    for task in tasks:
        parts += _task(task)
    return html_page("ehrseq evaluation", parts)


def _overview(tasks: Sequence[EvaluatedTask]) -> ReportTable:
    """A row a task."""
    metrics = ("auroc", "auprc", "calibration_slope", "calibration_intercept")
    header = ["task", "patients", "labels", "positive", *(METRIC_TITLES[name] for name in metrics)]
    rows = []
    for task in tasks:
        known = task.assessment
        share = "" if known.prevalence is None else f" ({known.prevalence:.1%})"
        counts = [f"{known.patients:,}", f"{known.labels:,}", f"{known.positives:,}{share}"]
        rows.append([known.task, *counts, *(_value(known, name) for name in metrics)])
    return ReportTable("Overview", header, rows, "Each value with its 95 % interval over patients.")


def _value(known: RiskAssessment, name: str) -> str:
    return str(known.metrics[name]) if name in known.metrics else NOT_ESTIMABLE


def _task(task: EvaluatedTask) -> list[str]:
    """The elements of one task."""
    known = task.assessment
    title = html.escape(known.task) + (f": {html.escape(task.outcome)}" if task.outcome else "")
    counts = f"{known.labels:,} labels of {known.patients:,} patients, {known.positives:,} of them positive"
    share = "" if known.prevalence is None else f" ({known.prevalence:.1%}); the mean risk is {known.mean_score:.1%}"
    parts = [f"<h2>{title}</h2>", f"<p>{counts}{share}.</p>"]
    rows = [
        [title, _value(known, name) if name in known.metrics else f"{NOT_ESTIMABLE}: {known.missing[name]}"]
        for name, title in METRIC_TITLES.items()
    ]
    parts.append(ReportTable("Metrics", ["metric", "value [95 %]"], rows).to_html())
    if known.calibration is None:
        return parts
    threshold = f"F1's threshold is {known.threshold:.3g} ({known.threshold_from})."
    alerts = [alert_cells(each) for each in known.alerts]
    parts.append(ReportTable("Alerts", ALERT_COLUMNS, alerts, threshold).to_html())
    remarks = {
        "roc": f"AUROC {_value(known, 'auroc')}",
        "recall": f"AUPRC {_value(known, 'auprc')}",
        "calibration": f"slope {_value(known, 'calibration_slope')}",
    }
    curves = risk_curves(
        task.rows["label"].to_numpy(),
        {known.task: task.rows["score"].to_numpy()},
        calibration=known.calibration,
        threshold=known.threshold,
        remarks=remarks,
    )
    parts += ["<h3>Curves</h3>", curves, note(_READING_CURVES)]
    return [*parts, "<h3>Subgroups</h3>", *_subgroups(task.groups)]


def _subgroups(groups: Sequence[Subgroup]) -> list[str]:
    """The forest, and the table behind it."""
    plot = subgroup_forest(groups)
    small = sum("auroc" not in group.differences for group in groups)
    hidden = f"Not drawn: {small} of {len(groups)} subgroups, which have or leave too few patients or outcomes."
    header, rows = subgroup_columns(groups)
    table = ReportTable("All subgroups", header, rows).to_html()
    return [plot, note(hidden), f"<details><summary>All subgroups</summary>{table}</details>"]
