"""What a run ends with: `results.md`, `results.csv`, predictions in the schema of MEDS evaluation, `report.html`."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl

from ehrseq._html import html_page, note
from ehrseq.benchmark.budget import Budget
from ehrseq.benchmark.data import DESCRIPTION, Source, load_data
from ehrseq.benchmark.results import TaskResult, TaskScores, costs, finished_cells, read_scores, task_result
from ehrseq.benchmark.systems import SYSTEMS
from ehrseq.benchmark.tables import cost_table, data_table, long_table, overview, task_table
from ehrseq.evaluation import assess_subgroups, row_attributes, write_meds_predictions
from ehrseq.evaluation.plots import risk_curves, subgroup_forest
from ehrseq.evaluation.report_tables import ReportTable
from ehrseq.version import __version__
from ehrseq.work.files import write_text, write_whole
from ehrseq.work.progress import progress_bar

logger = logging.getLogger(__name__)

SYSTEM_SUBGROUP_RESAMPLES = 300  # of each of many cells


def write_report(
    folder: Path, source: Source, budget: Budget, *, reference: str, num_resamples: int = 1000, seed: int = 0
) -> str:
    """Evaluate what is there and write it.

    Args:
        folder: The run's folder.
        source: Its data.
        budget: Its budget.
        reference: The system that the others are held against.
        num_resamples: Bootstrap resamples of patients.
        seed: Seed of the bootstrap.

    Returns:
        The results as Markdown.

    Raises:
        ValueError: There is no finished cell.
    """
    scores = read_scores(folder, source.tasks)
    results = [
        task_result(each, reference, num_resamples=num_resamples, seed=seed)
        for each in progress_bar(scores, desc="Evaluating", unit="task")
    ]
    described = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
    tables = [
        overview(results),
        *(task_table(result, reference) for result in results),
        cost_table(costs(folder)),
        data_table(described),
    ]
    words = _how(folder, source, budget, num_resamples)
    text = "\n".join(["# Benchmark", "", *words, "", *(table.to_markdown() for table in tables)])
    write_text(folder / "results.md", text)
    write_whole(folder / "results.csv", long_table(results).write_csv)
    _write_predictions(folder, scores)
    forests = _forests(source, budget, scores, results, reference, seed)
    write_text(folder / "report.html", _page(words, tables, scores, results, forests, reference))
    return text


def _how(folder: Path, source: Source, budget: Budget, num_resamples: int) -> list[str]:
    """How it was measured, in sentences."""
    run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    cells = finished_cells(folder)
    seeds = ", ".join(f"{SYSTEMS[name].title} {len(paths)}" for name, paths in cells.items())
    tested = f"all patients of {source.test}" if source.test else "its held-out patients"
    layers = "each model's own number of" if budget.num_layers is None else str(budget.num_layers)
    return [
        f"Trained on {source.train}, reported on {tested}. Budget `{budget.name}`: width {budget.hidden_size}, "
        f"{layers} layers, {budget.pretrain_tokens:,} tokens of pretraining and {budget.finetune_tokens:,} of "
        f"finetuning for each of {budget.num_trials} configuration(s); "
        f"labels of {' and '.join(budget.finetune_splits)}.",
        "",
        f"Seeds: {seeds}. Intervals are 95 % by {num_resamples:,} bootstrap resamples of patients; what is over the "
        "reference is paired, on the same resamples; p is of a t-test over seeds.",
        "",
        f"ehrseq {__version__}; begun by `{' '.join(['ehrseq', *run['command'][1:]])}`.",
    ]


def _write_predictions(folder: Path, scores: Sequence[TaskScores]) -> None:
    """`predictions/<system>/seed<k>/<task>.parquet` in the schema of MEDS evaluation."""
    cells = finished_cells(folder)
    for each in scores:
        for system, by_seed in each.scores.items():
            for path, values, limit in zip(cells[system], by_seed, each.thresholds[system], strict=True):
                table = each.rows.select("subject_id", "prediction_time", "label").with_columns(score=pl.Series(values))
                file = folder / "predictions" / system / path.name / f"{each.task}.parquet"
                write_meds_predictions(table, file, threshold=limit)


def _forests(
    source: Source,
    budget: Budget,
    scores: Sequence[TaskScores],
    results: Sequence[TaskResult],
    reference: str,
    seed: int,
) -> dict[str, str]:
    """Subgroups of the reference's scores, a plot a task."""
    events = load_data(source, budget).events("test")
    plots = {}
    for each, result in zip(scores, results, strict=True):
        if reference not in result.systems:
            continue
        table = each.rows.select("subject_id", "prediction_time", "label").with_columns(
            score=pl.Series(each.scores[reference].mean(axis=0))
        )
        groups = assess_subgroups(
            table,
            row_attributes(table, events),
            threshold=each.thresholds[reference][0],
            num_resamples=SYSTEM_SUBGROUP_RESAMPLES,
            seed=seed,
        )
        small = sum(group.reason is not None for group in groups)
        plot = subgroup_forest(groups)
        plots[each.task] = plot + note(
            f"{len(groups)} subgroups; {small} have too few patients or outcomes to be estimated and are not shown."
        )
    return plots


def _page(
    words: Sequence[str],
    tables: Sequence[ReportTable],
    scores: Sequence[TaskScores],
    results: Sequence[TaskResult],
    forests: dict[str, str],
    reference: str,
) -> str:
    parts: list[Any] = ["<h1>Benchmark</h1>", *(note(text) for text in words if text), tables[0].to_html()]
    for each, result, table in zip(scores, results, tables[1:-2], strict=True):
        parts.append(table.to_html())
        if result.reason is None:
            means = {SYSTEMS[name].title: by_seed.mean(axis=0) for name, by_seed in each.scores.items()}
            curves = risk_curves(each.rows["label"].to_numpy(), means)
            parts += [curves, note("Curves of the mean score of each system's seeds.")]
        if each.task in forests:
            parts += [f"<h4>{SYSTEMS[reference].title}: subgroups</h4>", forests[each.task]]
    parts += [table.to_html() for table in tables[-2:]]
    return html_page("ehrseq benchmark", parts)
