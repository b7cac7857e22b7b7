"""`ehrseq demo`: from records to risks in a few minutes, on simulated patients or on a FHIR or MEDS folder.

It is what a user would type, and nothing of its own:

    ehrseq simulate OUT/fhir && ehrseq prepare OUT/fhir OUT/dataset && ehrseq label OUT/dataset
    ehrseq train OUT/dataset --out OUT/checkpoint --recipe demo
    ehrseq predict --model OUT/checkpoint ...

and then a picture of one patient. The model is tiny so that two cores train it in minutes; the steps are those of a
real run. Each is kept: a demo that was stopped goes on when it is begun again.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl

from ehrseq.evaluation import TaskMetrics, metrics_table
from ehrseq.tasks import list_tasks
from ehrseq.training.named_recipes import read_recipe
from ehrseq.training.recipe import Recipe
from ehrseq.training.run import TrainedModel, train_model
from ehrseq.version import __version__
from ehrseq.work.engine import Engine
from ehrseq.work.files import remove, write_json, write_whole

logger = logging.getLogger(__name__)

SETTINGS = "demo.json"
RESAMPLES = 300  # of the bootstrap: a thousand take a tenth of the demo
_MADE = ("fhir", "dataset", "checkpoint", "predictions.parquet", "patient.png", "metrics.json", SETTINGS)
_UNFINISHED = (".dataset.preparing", ".checkpoint.training")


@dataclass
class DemoResult:
    """What the demo measured.

    Attributes:
        metrics: Metrics on held-out patients by task.
        best_possible: Best possible AUROC by task, None on real data.
        checkpoint: Folder of the finetuned checkpoint.
        picture: The PNG, None when no held-out patient has a label.
        seconds: Seconds by step.
        counts: Patients, events, labels and coverage.
    """

    metrics: dict[str, TaskMetrics]
    best_possible: dict[str, float] | None
    checkpoint: Path
    picture: Path | None
    seconds: dict[str, float] = field(default_factory=dict)
    counts: dict[str, Any] = field(default_factory=dict)


class _Steps:
    """Announces the steps and times them."""

    def __init__(self, say: Callable[[str], object]) -> None:
        self.say = say
        self.seconds: dict[str, float] = {}
        self._name: str | None = None
        self._since = time.perf_counter()

    def start(self, name: str, text: str) -> None:
        self.stop()
        self._name, self._since = name, time.perf_counter()
        self.say(f"\n[{len(self.seconds) + 1}] {text}")

    def stop(self) -> None:
        if self._name is not None:
            self.seconds[self._name] = round(time.perf_counter() - self._since, 1)
            self._name = None


def run_demo(
    output: str | Path,
    *,
    data: str | Path | None = None,
    num_patients: int = 4000,
    seed: int = 0,
    recipe: str | Recipe = "demo",
    engine: Engine | None = None,
    say: Callable[[str], object] = logger.info,
) -> DemoResult:
    """Run the whole path.

    Args:
        output: Folder for everything that is written; what a demo with other settings left there is replaced.
        data: FHIR or MEDS folder or file; None simulates patients.
        num_patients: Simulated patients.
        seed: Seed of the patients, the splits and training.
        recipe: What is trained.
        engine: Where records are read and labelled; default: all cores of this machine.
        say: Receives every line of the report.

    Returns:
        What was measured.

    Raises:
        ValueError: Unreadable data, or data from which no task can be labelled.
    """
    from ehrseq.data.simulate.cohort import simulated_cohort

    output = Path(output)
    chosen = read_recipe(recipe) if isinstance(recipe, str) else recipe
    _claim(output, data, num_patients, seed, chosen)
    steps = _Steps(say)
    dataset = _prepare(output, data, num_patients, seed, engine, steps)
    steps.start("label", "Labels with explicit prediction times")
    labels = _label(dataset, engine, say)
    steps.start("train", "Training, thresholds on tuning patients, evaluation on held-out patients")
    trained = train_model(dataset, output / "checkpoint", recipe=chosen, seed=seed, num_resamples=RESAMPLES, say=say)
    steps.start("predict", "Risks of a few patients by the checkpoint, reloaded")
    picture = _predict(output, dataset, trained, labels, simulated_cohort(dataset), say)
    steps.stop()
    counts = {
        **_sizes(dataset),
        "labels": {task: table.height for task, table in labels.items()},
        "coverage": trained.coverage,
    }
    result = DemoResult(trained.metrics, trained.best_possible, trained.folder, picture, steps.seconds, counts)
    _close(result, output, say)
    return result


def _claim(output: Path, data: str | Path | None, num_patients: int, seed: int, recipe: Recipe) -> None:
    """Go on with a demo of the same settings; what another one left is removed."""
    settings: dict[str, Any] = {"ehrseq": __version__, "seed": seed, "recipe": recipe.to_dict()}
    settings |= {"patients": num_patients} if data is None else {"data": str(data), "files": _files(Path(data))}
    settings = json.loads(json.dumps(settings))
    file = output / SETTINGS
    if file.is_file() and json.loads(file.read_text(encoding="utf-8")) == settings:
        return
    for name in (*_MADE, *_UNFINISHED):
        remove(output / name)
    write_json(file, settings)


def _files(data: Path) -> list[Any]:
    """Name, size and time of every file, which tell whether the data are those of before."""
    files = [data] if data.is_file() else sorted(path for path in data.rglob("*") if path.is_file())
    return [[str(file.relative_to(data)), file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def _prepare(
    output: Path, data: str | Path | None, num_patients: int, seed: int, engine: Engine | None, steps: _Steps
) -> Path:
    """Simulate where no data are given, and prepare a dataset with splits. Returns its folder."""
    from ehrseq.data.simulate.cohort import simulate, simulated_name
    from ehrseq.prepare import prepare_dataset

    source, name = (output / "fhir", simulated_name(seed)) if data is None else (Path(data), None)
    if data is None:
        steps.start("simulate", f"Simulating {num_patients:,} patients as FHIR R4 (seed {seed})")
        if not source.is_dir():
            write_whole(source, simulate(num_patients, seed).write_fhir)
    dataset = output / "dataset"
    steps.start("prepare", f"Reading {source}")
    if not dataset.is_dir():
        steps.say(str(prepare_dataset(source, dataset, seed=seed, dataset_name=name, engine=engine)))
    return dataset


def _label(dataset: Path, engine: Engine | None, say: Callable[[str], object]) -> dict[str, pl.DataFrame]:
    """Label every task on every patient, where that is not done."""
    from ehrseq.data.simulate.cohort import simulated_cohort
    from ehrseq.tasks import read_labels
    from ehrseq.tasks.shards import label_dataset
    from ehrseq.tasks.storage import labelled_tasks

    tasks = list_tasks()
    if {task["name"] for task in labelled_tasks(dataset)} < set(tasks):
        cohort = simulated_cohort(dataset)
        end = None if cohort is None else cohort.end_of_data
        say(str(label_dataset(dataset, tasks, end_of_data=end, engine=engine)))
    labels: dict[str, pl.DataFrame] = read_labels(dataset, tasks)
    return labels


def _predict(
    output: Path,
    dataset: Path,
    trained: TrainedModel,
    labels: dict[str, pl.DataFrame],
    cohort: Any,
    say: Callable[[str], object],
) -> Path | None:
    """Score three patients by the saved checkpoint, and draw the one with the most to show."""
    from ehrseq.data.dataset import EventDataset
    from ehrseq.data.simulate.cohort import true_risks
    from ehrseq.demo.picture import draw_patient
    from ehrseq.prediction.risks import predict_risks

    scores = trained.scores()
    if scores.is_empty():
        say("No held-out patient has a label; no patient is shown.")
        return None
    subjects = _patients_to_show(scores)
    events = EventDataset(dataset).events("held_out").filter(pl.col("subject_id").is_in(subjects))
    learnt = {task: table for task, table in labels.items() if task in trained.metrics}
    asked = pl.concat(table.with_columns(task=pl.lit(task)) for task, table in learnt.items())
    asked = asked.filter(pl.col("subject_id").is_in(subjects))
    times = asked.select("subject_id", "prediction_time").unique()
    risks, _ = predict_risks(trained.folder, events, prediction_times=times, progress=False)
    write_whole(output / "predictions.parquet", risks.write_parquet)

    keys = ["task", "subject_id", "prediction_time"]
    both = scores.join(risks.select(*keys, reloaded="score"), on=keys)
    difference: Any = (both["score"] - both["reloaded"]).abs().max()
    say(f"Risks after the reload differ by at most {float(difference):.7f}.")
    for subject in subjects:
        answers = risks.filter(pl.col("subject_id") == subject)
        answers = answers.filter(pl.col("prediction_time") == answers["prediction_time"].max())
        shown = (
            f"{task} {'-' if score is None else format(score, '.1%')}"
            for task, score in answers.select("task", "score").iter_rows()
        )
        say(f"  patient {subject} at {answers['prediction_time'][0]:%Y-%m-%d %H:%M}: {', '.join(shown)}")

    rows = asked.filter(pl.col("subject_id") == subjects[0]).join(risks.select(*keys, "score"), on=keys)
    truth = None
    if cohort is not None:
        at = rows["subject_id"].to_numpy(), rows["prediction_time"].to_numpy()
        truth = true_risks(cohort, rows["task"].to_list(), *at)
    own_events = events.filter(pl.col("subject_id") == subjects[0])
    return draw_patient(output / "patient.png", own_events, rows, list(learnt), true_risk=truth)


def _patients_to_show(scores: pl.DataFrame, count: int = 3) -> list[int]:
    """Held-out patients with several prediction times and, first, both outcomes."""
    table = (
        scores.group_by("subject_id")
        .agg(rows=pl.len(), positives=pl.col("boolean_value").sum())
        .with_columns(worth=pl.col("positives").clip(upper_bound=4) * 10 + pl.col("rows").clip(upper_bound=40))
        .sort("worth", "subject_id", descending=[True, False])
    )
    return table["subject_id"].head(count).to_list()


def _sizes(dataset: Path) -> dict[str, int]:
    from ehrseq.data.dataset import EventDataset

    events = EventDataset(dataset)
    rows = events.scan().select(pl.len()).collect().item()
    return {"patients": events.splits["subject_id"].n_unique(), "events": rows}


def _close(result: DemoResult, output: Path, say: Callable[[str], object]) -> None:
    """The closing table, and the same as files."""
    say("\n" + metrics_table(result.metrics, best_possible=result.best_possible))
    for metrics in result.metrics.values():
        if metrics.reason:
            say(f"  {metrics.task}: not estimable, {metrics.reason}")
    write_json(
        output / "metrics.json",
        {
            "metrics": {name: metrics.to_dict() for name, metrics in result.metrics.items()},
            "best_possible": result.best_possible,
            "seconds": result.seconds,
            "counts": result.counts,
        },
    )
    total = sum(result.seconds.values())
    say(
        f"\n{total:.0f} s in all ("
        + ", ".join(f"{name} {seconds:.0f}" for name, seconds in result.seconds.items())
        + f")\nCheckpoint: {result.checkpoint}"
        + (f"\nPicture:    {result.picture}" if result.picture else "")
    )
