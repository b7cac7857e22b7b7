"""The results as tables, in Markdown, HTML and CSV."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import polars as pl

from ehrseq.benchmark.results import METRICS, TaskResult, mean_auroc
from ehrseq.benchmark.systems import SYSTEMS
from ehrseq.evaluation.reports import NOT_ESTIMABLE


@dataclass(frozen=True)
class Table:
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
        return (
            f"<h3>{html.escape(self.title)}</h3>\n{remark}<table><thead>{cells(self.header, 'th')}</thead>\n"
            f"<tbody>{body}</tbody></table>"
        )


def overview(results: Sequence[TaskResult]) -> Table:
    """The paper's table: a row a system, AUROC / AUPRC / F1 by task."""
    rows = []
    for name in _systems(results):
        cells = []
        for result in results:
            found = result.systems.get(name)
            shown = [f"{found.metrics[metric].value:.3f}" for metric in ("auroc", "auprc", "f1")] if found else []
            cells.append(" / ".join(shown) or NOT_ESTIMABLE)
        rows.append([SYSTEMS[name].title, *cells, f"{mean_auroc(results, name):.3f}"])
    if any(result.best_possible is not None for result in results):
        best = ["" if result.best_possible is None else f"{result.best_possible:.3f}" for result in results]
        rows.append(["best possible AUROC", *best, ""])
    note = "AUROC / AUPRC / F1, means over the seeds; F1 at the threshold that is best on the tuning patients."
    return Table("Overview", ["system", *(result.task for result in results), "mean AUROC"], rows, note)


def task_table(result: TaskResult, reference: str) -> Table:
    """All metrics of one task."""
    counts = f"{result.labels:,} labels of {result.patients:,} test patients, {result.positives:,} positive."
    if result.reason is not None:
        return Table(result.task, ["system", "AUROC"], [], f"{counts} {NOT_ESTIMABLE}: {result.reason}.")
    rows = []
    for name, found in result.systems.items():
        over = [str(found.differences[metric]) if metric in found.differences else "" for metric in ("auroc", "auprc")]
        test = "" if found.p_value is None else f"{found.p_value:.2g}"
        rows.append([SYSTEMS[name].title, *(str(found.metrics[metric]) for metric in METRICS), *over, test])
    if result.best_possible is not None:
        blank = [""] * (len(METRICS) + 2)
        rows.append(["best possible", f"{result.best_possible:.3f}", *blank])
    title = SYSTEMS[reference].title
    header = ["system", *METRICS.values(), f"AUROC over {title}", f"AUPRC over {title}", "p (seeds)"]
    return Table(result.task, header, rows, counts)


def cost_table(costs: Sequence[dict[str, Any]]) -> Table:
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
    return Table("What each system was given", header, rows, note)


def data_table(described: dict[str, Any]) -> Table:
    """Rows by part and task."""
    rows = [
        [entry["part"], entry["task"], *(f"{entry[name]:,}" for name in ("labels", "patients", "positives"))]
        for entry in described["rows"]
    ]
    coverage = described["coverage of the test events"]
    shares = ", ".join(f"{name} {value:.2%}" for name, value in coverage.items() if isinstance(value, float))
    note = f"{described['tokens']:,} tokens; of the test patients' events: {shares}."
    return Table("Data", ["part", "task", "labels", "patients", "positives"], rows, note)


def long_table(results: Sequence[TaskResult]) -> pl.DataFrame:
    """Every number as a row: task, system, metric, value, low, high, and counts."""
    rows = []
    for result in results:
        counts = {"labels": result.labels, "patients": result.patients, "positives": result.positives}
        for name, found in result.systems.items():
            for metric, interval in found.metrics.items():
                rows.append({"task": result.task, "system": name, "metric": metric, **asdict(interval), **counts})
            for metric, interval in found.differences.items():
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
    found = {name for result in results for name in result.systems}
    return [name for name in SYSTEMS if name in found]
