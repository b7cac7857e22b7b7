"""`ehrseq train` as a function: from a labelled dataset to a folder with a model and what it is worth.

    trained = train_model("dataset", "model", recipe="demo")
    print(metrics_table(trained.metrics))

The stages (pretraining, finetuning) and the scores stand in a hidden folder beside the model's, `.model.training`; a
run that was stopped goes on there, and a stage that was begun with other settings is begun anew. A finished model that
is to be evaluated otherwise is evaluated anew, by the scores that it keeps. The model's folder appears whole, when all
is done:

    config.json, model.safetensors, tokenizer or extractor    the checkpoint, with the code that loads it
    pretrained/                                               the model of the first stage, which forecasts; its encoder
    README.md                                                 its card, filled from the evaluation
    thresholds.json                                           task -> score with the best F1 on the tuning patients
    evaluation/                                               the report on held-out patients, and their scores
    training.json                                             recipe, data, seed, and what every stage reached
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from ehrseq.data.dataset import EventDataset, make_folder
from ehrseq.data.shards import dataset_shards
from ehrseq.data.simulate.cohort import simulated_cohort, true_risks
from ehrseq.encode import is_encoded
from ehrseq.evaluation import Interval, TaskMetrics, auroc, choose_thresholds, evaluate_tasks
from ehrseq.evaluation.files import evaluate_files
from ehrseq.hub.cards import DataDescription, EhrModelCard
from ehrseq.tasks.storage import labelled_tasks, read_labels
from ehrseq.training.families import FamilyTraining, Say, TrainingData, family_training, finetune_splits
from ehrseq.training.named_recipes import read_recipe
from ehrseq.training.prompts import present_splits
from ehrseq.training.recipe import Recipe
from ehrseq.training.stages import disk_errors
from ehrseq.training.trainer import is_main_process, join_process_group, wait_for_all
from ehrseq.version import __version__
from ehrseq.work.files import file_digest, remove, remove_unfinished, write_json, write_text, write_whole
from ehrseq.work.parts import settings_key

logger = logging.getLogger(__name__)

TRAINING = "training.json"
THRESHOLDS_FILE = "thresholds.json"
EVALUATION = "evaluation"
PRETRAINED = "pretrained"
"""Folder of the model that forecasts, beside the one that tells risks."""
HELD_OUT, TUNING = "held_out", "tuning"
DEFAULT_RECIPE = "ehrmamba_quick"


@dataclass(frozen=True)
class TrainedModel:
    """A trained model and what it is worth.

    Attributes:
        folder: The model's folder.
        metrics: Metrics on held-out patients by task.
        best_possible: Best possible AUROC by task, None where the patients are not simulated.
        thresholds: Score with the best F1 on the tuning patients, by task.
        left_out: Task -> why it was not learnt.
        stages: What every stage reached.
        coverage: How much of the held-out events the tokenizer knows, None where that is no question.
        evaluation: How it was evaluated.
    """

    folder: Path
    metrics: dict[str, TaskMetrics]
    best_possible: dict[str, float] | None
    thresholds: dict[str, float]
    left_out: dict[str, str]
    stages: dict[str, dict[str, Any]]
    coverage: dict[str, Any] | None
    evaluation: dict[str, Any]

    @classmethod
    def read(cls, folder: str | Path) -> TrainedModel:
        """What `train_model` wrote."""
        content = json.loads((Path(folder) / TRAINING).read_text(encoding="utf-8"))
        intervals = ("auroc", "auprc", "f1")
        metrics = {}
        for name, values in content["metrics"].items():
            known = {key: Interval(**values[key]) for key in intervals if values[key] is not None}
            metrics[name] = TaskMetrics(**{**values, **known})
        parts = {name: content[name] for name in ("best_possible", "thresholds", "left_out", "stages", "coverage")}
        return cls(Path(folder), metrics, **parts, evaluation=content.get("evaluation", {}))

    def scores(self, split: str = HELD_OUT) -> pl.DataFrame:
        """task, subject_id, prediction_time, boolean_value, score of the held-out or the tuning patients."""
        return pl.read_parquet(self.folder / EVALUATION / f"{split}.parquet")


@dataclass(frozen=True)
class _Finished:
    """A run that is done, in the place of its training: only the evaluation is made anew.

    Attributes:
        trained: What it wrote.
    """

    trained: TrainedModel

    @property
    def checkpoint(self) -> Path:
        return self.trained.folder

    @property
    def pretrained(self) -> None:
        return None  # it stands in the checkpoint's folder already

    def train(self, say: Say) -> dict[str, dict[str, Any]]:
        return self.trained.stages

    def score(self, split: str) -> pl.DataFrame:
        return self.trained.scores(split)

    def coverage(self) -> Mapping[str, Any] | None:
        return self.trained.coverage


def train_model(
    dataset: str | Path,
    out: str | Path,
    *,
    recipe: str | Path | Recipe = DEFAULT_RECIPE,
    changes: tuple[str, ...] | list[str] = (),
    seed: int = 0,
    num_resamples: int = 1000,
    say: Say = logger.info,
) -> TrainedModel:
    """Train a model on a labelled dataset, choose thresholds, evaluate it, and write all of it into one folder.

    Args:
        dataset: Folder that `ehrseq prepare` wrote, with labels; encoded files (`ehrseq tokenize`) are used.
        out: Folder to write. What a stopped run has finished stands in a hidden folder beside it.
        recipe: Name or file of a recipe, or one.
        changes: `KEY=VALUE` each, changes of a recipe by name.
        seed: Seed of weights, order, dropout and drawn rows.
        num_resamples: Bootstrap resamples of patients in the evaluation.
        say: Receives a line now and then.

    Returns:
        The trained model.

    Raises:
        ValueError: A dataset without labels or splits, or of one class only; an unknown recipe or setting; a folder
            that holds something else.
        OSError: The disk is full; what is finished is kept.
    """
    chosen = recipe if isinstance(recipe, Recipe) else read_recipe(recipe, changes)
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ValueError(f"seed got {seed!r}; expected a whole number of at least 0.")
    out = Path(out)
    join_process_group()
    data, left_out = _data(Path(dataset), chosen)
    settings = {"recipe": chosen.to_dict(), "seed": seed, **data.settings, "tasks": data.names}
    settings = json.loads(json.dumps(settings))
    evaluation = {"num_resamples": num_resamples}
    for name, why in left_out.items():
        say(f"{name} is left out: {why}")
    before = _trained_before(out, settings)
    if before is not None and before.evaluation == evaluation:
        return before
    folder = out.absolute().parent / f".{out.absolute().name}.training"
    make_folder(folder)
    if is_main_process():
        remove_unfinished(folder)
    wait_for_all()
    training = family_training(chosen, data, folder, seed) if before is None else _Finished(before)
    stages = training.train(say)
    if is_main_process():
        with disk_errors():
            say("Thresholds on the tuning patients, evaluation on the held-out ones")
            _write(training, out, folder, data, settings, left_out, stages, evaluation)
            remove(folder)
    wait_for_all()
    return TrainedModel.read(out)


def _data(dataset: Path, recipe: Recipe) -> tuple[TrainingData, dict[str, str]]:
    """What the recipe can learn from a dataset, and the tasks that it cannot learn, with the reason."""
    shards = dataset_shards(dataset)
    known = labelled_tasks(dataset)
    if not known:
        raise ValueError(f"{dataset} has no labels (labels/<task>/); run `ehrseq label {dataset}` first.")
    events = EventDataset(dataset)
    names = [str(task["name"]) for task in known]
    wanted = names if recipe.tasks is None else list(recipe.tasks)
    unknown = [name for name in wanted if name not in names]
    if unknown or not wanted:
        raise ValueError(f"tasks got {wanted}; {dataset} has labels of {names}.")
    labels = read_labels(dataset, wanted)
    if not sum(table.height for table in labels.values()):
        raise ValueError(
            "none of the tasks could be labelled: there is no admission with a follow-up in these records. Check that "
            "inpatient encounters (class IMP, ACUTE or NONAC, or MIMIC's HOSPITAL_ADMISSION) and their ends are there."
        )
    splits = present_splits(events, finetune_splits(recipe))
    for split in (TUNING, HELD_OUT):
        present_splits(events, [split])
    subjects = events.splits.filter(pl.col("split").is_in(splits))["subject_id"]
    left_out = {}
    for name in wanted:
        of_training = labels[name].filter(pl.col("subject_id").is_in(subjects.implode()))
        positives = int(of_training["boolean_value"].sum())
        if not 0 < positives < of_training.height:
            left_out[name] = f"the training patients have {of_training.height:,} labels, {positives:,} of them positive"
    if len(left_out) == len(wanted):
        reasons = "; ".join(f"{name}: {why}" for name, why in left_out.items())
        raise ValueError(f"{dataset} has no task with both classes among the patients of {splits}: {reasons}.")
    tasks = [task for task in known if task["name"] in wanted and task["name"] not in left_out]
    labels = {task["name"]: labels[task["name"]] for task in tasks}
    files = [shard.path for shard in shards]
    if is_encoded(dataset / "encoded"):  # its summary holds the digest of every file
        files = [str(dataset / "encoded" / "encoded.json")]
    files += [str(file) for name in labels for file in sorted((dataset / "labels" / name).rglob("*.parquet"))]
    files.append(str(dataset / "metadata" / "subject_splits.parquet"))
    digests = [(str(Path(file).relative_to(dataset)), file_digest(file)) for file in files]
    settings = {"data": hashlib.sha256(json.dumps(digests).encode()).hexdigest()[:16], "ehrseq": __version__}
    return TrainingData(dataset, tasks, labels, settings), left_out


def _trained_before(out: Path, settings: Mapping[str, Any]) -> TrainedModel | None:
    """What the folder holds of this run where it is finished, None where nothing is there.

    Raises:
        ValueError: It holds something else.
    """
    file = out / TRAINING
    if file.is_file():
        known = json.loads(file.read_text(encoding="utf-8")).get("settings", {})
        other = sorted(name for name in {*settings, *known} if settings.get(name) != known.get(name))
        if other:
            raise ValueError(
                f"{out} holds a model that was trained otherwise: got another {', '.join(other)}. Name another folder, "
                "or remove this one."
            )
        return TrainedModel.read(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is no folder of `ehrseq train` and is not empty; name a new one.")
    return None


def _write(
    training: FamilyTraining,
    out: Path,
    folder: Path,
    data: TrainingData,
    settings: Mapping[str, Any],
    left_out: Mapping[str, str],
    stages: Mapping[str, dict[str, Any]],
    evaluation: Mapping[str, Any],
) -> None:
    """Score, evaluate, and put the model's folder together."""
    pages = folder / EVALUATION
    key = settings_key([stages["finetune"]["settings"], settings])
    if not (pages / key).is_file():  # scores of other weights, or none
        remove(pages)
        for split in (TUNING, HELD_OUT):
            write_whole(pages / f"{split}.parquet", training.score(split).write_parquet)
        write_json(pages / key, {})
    tuning, held_out = (pl.read_parquet(pages / f"{split}.parquet") for split in (TUNING, HELD_OUT))
    names = data.names
    ids = {name: place for place, name in enumerate(names)}
    thresholds = choose_thresholds(tuning["boolean_value"], tuning["score"], _task_ids(tuning, ids), names)
    metrics = evaluate_tasks(
        held_out["boolean_value"],
        held_out["score"],
        _task_ids(held_out, ids),
        held_out["subject_id"],
        names,
        thresholds=thresholds,
        **evaluation,
    )
    if held_out.height:
        evaluate_files(
            pages / f"{HELD_OUT}.parquet",
            data=data.dataset,
            tuning=pages / f"{TUNING}.parquet",
            tasks=names,
            outcomes={task["name"]: task.get("positive_label", "") for task in data.tasks},
            out=pages,
            **evaluation,
        )
        for page in pages.glob("evaluation.*"):  # the scores lie beside the page in the end
            write_text(page, page.read_text(encoding="utf-8").replace(str(pages), str(out / EVALUATION)))
    cohort = simulated_cohort(data.dataset)
    best = None if cohort is None else _best_possible(cohort, held_out, names)
    coverage = training.coverage()
    card = _card(
        coverage, data, metrics, best, stages, settings, simulated=cohort is not None, name=out.absolute().name
    )
    content = {
        "settings": settings,
        "metrics": {name: asdict(result) for name, result in metrics.items()},
        "best_possible": best,
        "thresholds": thresholds,
        "left_out": dict(left_out),
        "stages": dict(stages),
        "coverage": None if coverage is None else dict(coverage),
        "evaluation": evaluation,
    }

    def build(temporary: Path) -> None:
        others = shutil.ignore_patterns("steps", "*result.json", TRAINING, EVALUATION)
        shutil.copytree(training.checkpoint, temporary, ignore=others)
        if training.pretrained is not None:
            shutil.copytree(training.pretrained, temporary / PRETRAINED, ignore=others)
        shutil.copytree(pages, temporary / EVALUATION, ignore=shutil.ignore_patterns(key))
        card.save(temporary, repo_id=out.absolute().name)
        (temporary / THRESHOLDS_FILE).write_text(json.dumps(thresholds, indent=2) + "\n", encoding="utf-8")
        (temporary / TRAINING).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    write_whole(out, build)


def _task_ids(table: pl.DataFrame, ids: Mapping[str, int]) -> np.ndarray:
    return table["task"].replace_strict(ids, return_dtype=pl.Int64).to_numpy()


def _best_possible(cohort: Any, table: pl.DataFrame, names: list[str]) -> dict[str, float]:
    """AUROC of the true risk, by task."""
    truth = true_risks(
        cohort, table["task"].to_list(), table["subject_id"].to_numpy(), table["prediction_time"].to_numpy()
    )
    best = {}
    for name in names:
        rows = (table["task"] == name).to_numpy() & np.isfinite(truth)
        if rows.any():
            best[name] = auroc(table["boolean_value"].to_numpy()[rows], truth[rows])
    return {name: value for name, value in best.items() if np.isfinite(value)}


def _card(
    coverage: Mapping[str, Any] | None,
    data: TrainingData,
    metrics: Mapping[str, TaskMetrics],
    best: Mapping[str, float] | None,
    stages: Mapping[str, dict[str, Any]],
    settings: Mapping[str, Any],
    *,
    simulated: bool,
    name: str,
) -> EhrModelCard:
    """The card of the model, filled from the run."""
    events = EventDataset(data.dataset)
    sizes = events.splits.group_by("split").len().sort("split").iter_rows()
    counts = {f"patients of {split}": size for split, size in sizes}
    counts |= {f"labels of {task}": table.height for task, table in data.labels.items()}
    facts: dict[str, Any] = {"recipe": settings["recipe"]["name"], "seed": settings["seed"], "ehrseq": __version__}
    for stage, result in stages.items():
        facts |= {f"steps of {stage}": result["steps"], f"minutes of {stage}": round(result["seconds"] / 60, 1)}
    described = DataDescription(
        str(events.metadata.get("dataset_name") or data.dataset.name),
        description="Simulated patients: nothing here is about a real one." if simulated else "",
        counts=counts,
        simulated=simulated,
    )
    return EhrModelCard(name, data=described, results=metrics, best_possible=best, training=facts, coverage=coverage)
