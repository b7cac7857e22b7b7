"""The results as tables, in Markdown, HTML and CSV."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import polars as pl

from ehrseq.benchmark.results import RESULT_METRICS, TaskResult, mean_auroc
from ehrseq.benchmark.systems import SYSTEMS
from ehrseq.evaluation.report_tables import ReportTable
from ehrseq.evaluation.reports import NOT_ESTIMABLE


def overview(results: Sequence[TaskResult]) -> ReportTable:
    """The paper's table: a row a system, AUROC / AUPRC / F1 by task."""
    rows = []
    for name in _systems(results):
        cells = []
        for result in results:
            measured = result.systems.get(name)
            shown = [f"{measured.metrics[metric].value:.3f}" for metric in ("auroc", "auprc", "f1")] if measured else []
            cells.append(" / ".join(shown) or NOT_ESTIMABLE)
        rows.append([SYSTEMS[name].title, *cells, f"{mean_auroc(results, name):.3f}"])
    if any(result.best_possible is not None for result in results):
        best = ["" if result.best_possible is None else f"{result.best_possible:.3f}" for result in results]
        rows.append(["best possible AUROC", *best, ""])
    note = "AUROC / AUPRC / F1, means over the seeds; F1 at the threshold that is best on the tuning patients."
    return ReportTable("Overview", ["system", *(result.task for result in results), "mean AUROC"], rows, note)


def task_table(result: TaskResult, reference: str) -> ReportTable:
    """All metrics of one task."""
    counts = f"{result.labels:,} labels of {result.patients:,} test patients, {result.positives:,} positive."
    if result.reason is not None:
        return ReportTable(result.task, ["system", "AUROC"], [], f"{counts} {NOT_ESTIMABLE}: {result.reason}.")
    rows = []
    for name, measured in result.systems.items():
        over = [str(measured.differences.get(metric, "")) for metric in ("auroc", "auprc")]
        test = "" if measured.p_value is None else f"{measured.p_value:.2g}"
        rows.append([SYSTEMS[name].title, *(str(measured.metrics[metric]) for metric in RESULT_METRICS), *over, test])
    if result.best_possible is not None:
        blank = [""] * (len(RESULT_METRICS) + 2)
        rows.append(["best possible", f"{result.best_possible:.3f}", *blank])
    title = SYSTEMS[reference].title
    header = ["system", *RESULT_METRICS.values(), f"AUROC over {title}", f"AUPRC over {title}", "p (seeds)"]
    return ReportTable(result.task, header, rows, counts)


def cost_table(costs: Sequence[dict[str, Any]]) -> ReportTable:
    """What each system was given."""

    def text(name: str, value: Any) -> str:
        if value is None:
            return ""
        if name == "system":
            return SYSTEMS[value].title
        return f"{value:,.0f}"

    header = list(costs[0]) if costs else ["system"]
    rows = [[text(name, value) for name, value in entry.items()] for entry in costs]
    note = (
        "Of the first seed. Finetuning tokens are those of one configuration over all models of the system; a system "
        "without pretraining has its tokens in finetuning. Systems of one kind share their pretraining. Seconds are "
        "wall time of training alone, of all configurations."
    )
    return ReportTable("What each system was given", header, rows, note)


def data_table(described: dict[str, Any]) -> ReportTable:
    """Rows by part and task."""
    rows = [
        [entry["part"], entry["task"], *(f"{entry[name]:,}" for name in ("labels", "patients", "positives"))]
        for entry in described["rows"]
    ]
    coverage = described["coverage of the test events"]
    shares = ", ".join(f"{name} {value:.2%}" for name, value in coverage.items() if isinstance(value, float))
    note = f"{described['tokens']:,} tokens; of the test patients' events: {shares}."
    return ReportTable("Data", ["part", "task", "labels", "patients", "positives"], rows, note)


def long_table(results: Sequence[TaskResult]) -> pl.DataFrame:
    """Every number as a row: task, system, metric, value, low, high, and counts."""
    rows = []
    for result in results:
        counts = {"labels": result.labels, "patients": result.patients, "positives": result.positives}
        for name, measured in result.systems.items():
            for metric, interval in measured.metrics.items():
                rows.append({"task": result.task, "system": name, "metric": metric, **asdict(interval), **counts})
            for metric, interval in measured.differences.items():
                entry = {"task": result.task, "system": name, "metric": f"{metric} over the reference"}
                rows.append({**entry, **asdict(interval), **counts})
        if result.best_possible is not None:
            entry = {"task": result.task, "system": "best possible", "metric": "auroc"}
            rows.append({**entry, "value": result.best_possible, "low": None, "high": None, **counts})
        if result.reason is not None:
            entry = {"task": result.task, "system": "", "metric": f"{NOT_ESTIMABLE}: {result.reason}"}
            rows.append({**entry, "value": None, "low": None, "high": None, **counts})
    schema = {
        "task": pl.String(),
        "system": pl.String(),
        "metric": pl.String(),
        **dict.fromkeys(("value", "low", "high"), pl.Float64()),
        **dict.fromkeys(("labels", "patients", "positives"), pl.Int64()),
    }
    return pl.DataFrame(rows, schema=schema)


def _systems(results: Sequence[TaskResult]) -> list[str]:
    measured = {name for result in results for name in result.systems}
    return [name for name in SYSTEMS if name in measured]
