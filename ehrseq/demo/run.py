"""`make demo`: from records to risks in a few minutes, on simulated patients or on a FHIR or MEDS folder.

simulate -> FHIR R4 -> MEDS -> labels -> tokenizer -> next-token prediction (NTP) -> multitask prompted finetuning (MPF;
first on histories that hold the prompts of all their labels, then on rows of one label each) -> evaluation on patients
that nothing saw -> checkpoint -> reload by the Auto classes -> risks of a few patients, and a picture of one of them.
The model is tiny so that two cores train it in minutes; the steps are those of a real run.
"""

from __future__ import annotations

import json
import logging
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from ehrseq.batches.balance import balance_rows
from ehrseq.batches.prompts import PromptedDataset, prompted_dataset
from ehrseq.batches.scoring import score_rows
from ehrseq.evaluation import TaskMetrics, auroc, choose_thresholds, evaluate_tasks, metrics_table
from ehrseq.hub.checkpoints import quiet_loading, save_checkpoint
from ehrseq.training.trainer import ClassifierOfPrompts, model_config, quiet_trainer, training_arguments

if TYPE_CHECKING:
    from ehrseq.data.dataset import EventDataset

logger = logging.getLogger(__name__)

TASKS = ("mortality_30d", "long_stay_7d", "readmission_30d", "hypertension", "fluid_disorder", "lipid_disorder")

FINETUNE_PASSES = 6  # as in the paper; more would only learn few patients by heart


@dataclass(frozen=True)
class DemoSettings:
    """Sizes of the demo; the defaults fit two cores and five minutes.

    Attributes:
        num_patients: Simulated patients.
        seed: Seed of the patients, the splits and training.
        hidden_size: Width of the model.
        num_layers: Mamba blocks.
        state_size: State dimensions per channel.
        time_step_rank: Rank of the step-size projection. What the model must forget when a new reading of a quantity
            comes hangs on step sizes of its own for each quantity; the paper's hidden_size / 16 is few for a small one.
        context: Context length in tokens.
        pretrain_tokens: Tokens seen in NTP.
        shared_context: Context length of the histories that hold the prompts of all their labels.
        shared_histories: Such histories seen in MPF before its rows, but at most `FINETUNE_PASSES` over all.
        finetune_rows: Rows of one label seen in MPF, but at most `FINETUNE_PASSES` over the labelled rows.
        max_test_rows: Rows per task that are scored for the evaluation (all patients stay in).
        pretrain_rate: Peak learning rate of NTP.
        shared_rate: Peak learning rate of MPF on shared histories.
        finetune_rate: Peak learning rate of MPF on rows.
        batch_size: Rows per step.
        shared_batch_size: Shared histories per step.
    """

    num_patients: int = 4000
    seed: int = 0
    hidden_size: int = 64
    num_layers: int = 1
    state_size: int = 8
    time_step_rank: int = 32
    context: int = 96
    pretrain_tokens: int = 1_000_000
    shared_context: int = 256
    shared_histories: int = 32_000
    finetune_rows: int = 6_000
    max_test_rows: int = 2_000
    pretrain_rate: float = 3e-3
    shared_rate: float = 3e-3
    finetune_rate: float = 1e-3
    batch_size: int = 32
    shared_batch_size: int = 8


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

    def __init__(self, say: Callable[[str], Any]) -> None:
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
    settings: DemoSettings | None = None,
    say: Callable[[str], Any] = logger.info,
) -> DemoResult:
    """Run the whole path.

    Args:
        output: Folder for everything that is written; what an earlier demo left there is replaced.
        data: FHIR or MEDS folder or file; None simulates patients.
        settings: Sizes.
        say: Receives every line of the report.

    Returns:
        What was measured.

    Raises:
        ValueError: Unreadable data, or data from which no task can be labelled.
    """
    settings = settings or DemoSettings()
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    steps = _Steps(say)

    dataset, cohort = _prepare(output, data, settings, steps)
    labels, task_configs = _label(dataset, cohort, steps)
    tokenizer, coverage = _train_tokenizer(dataset, task_configs, settings, steps)

    backbone = _pretrain(dataset, tokenizer, task_configs, output, settings, steps)
    parts: dict[str, str | list[str]] = {"train": ["pretrain", "train"], "tuning": "tuning", "held_out": "held_out"}
    splits = {
        name: prompted_dataset(tokenizer, dataset.events(part), labels, settings.context)
        for name, part in parts.items()
    }
    model = _finetune(splits, tokenizer, backbone, output, settings, steps)

    steps.start("evaluate", "Evaluation on held-out patients")
    names = [task["name"] for task in task_configs]
    metrics, best, test, scores = _evaluate(model, tokenizer, splits, names, cohort, settings)

    steps.start("save", "Checkpoint, reloaded by the Auto classes")
    checkpoint = output / "checkpoint"
    save_checkpoint(checkpoint, model, tokenizer)
    picture = _risks_of_a_few(checkpoint, dataset, splits["held_out"], test, scores, cohort, output, say)
    steps.stop()

    counts = {
        "patients": dataset.splits["subject_id"].n_unique(),
        "events": dataset.events(columns=["subject_id"]).height,
        "labels": {task: table.height for task, table in labels.items()},
        "coverage": coverage,
    }
    result = DemoResult(metrics, best, checkpoint, picture, steps.seconds, counts)
    _close(result, output, say)
    return result


def _prepare(output: Path, data: str | Path | None, settings: DemoSettings, steps: _Steps) -> tuple[EventDataset, Any]:
    """Read the events and write them as a MEDS dataset with splits. Returns it and the simulation, if there is one."""
    from ehrseq.data.dataset import write_dataset
    from ehrseq.data.simulate.cohort import simulate, simulated_name
    from ehrseq.data.sources import load_events
    from ehrseq.data.splits import assign_splits

    cohort = None
    if data is None:
        steps.start("simulate", f"Simulating {settings.num_patients:,} patients as FHIR R4 (seed {settings.seed})")
        cohort = simulate(settings.num_patients, settings.seed)
        shutil.rmtree(output / "fhir", ignore_errors=True)
        cohort.write_fhir(output / "fhir")
    source = output / "fhir" if data is None else Path(data)
    steps.start("read", f"Reading {source}")
    events, report = load_events(source)
    steps.say(str(report))
    name = source.name if cohort is None else simulated_name(settings.seed)
    splits = assign_splits(
        events["subject_id"].unique(), seed=settings.seed, source_splits=getattr(report, "source_splits", None)
    )
    dataset = write_dataset(events, output / "dataset", dataset_name=name, splits=splits, report=report, overwrite=True)
    sizes = dataset.splits.group_by("split").len().sort("split").iter_rows()
    steps.say("Patients by split: " + ", ".join(f"{split} {size:,}" for split, size in sizes))
    return dataset, cohort


def _label(dataset: EventDataset, cohort: Any, steps: _Steps) -> tuple[dict[str, pl.DataFrame], list[dict[str, Any]]]:
    """Label every task on every patient."""
    from ehrseq.tasks import label_events, load_task, write_labels

    steps.start("label", "Labels with explicit prediction times")
    tasks = [load_task(name) for name in TASKS]
    end = cohort.end_of_data if cohort is not None else None
    result = label_events(dataset.events(), tasks, end_of_data=end)
    write_labels(result, dataset.path)
    total = 0
    for name, table in result.labels.items():
        positives = int(table["boolean_value"].sum() or 0)
        dropped = ", ".join(f"{count:,} {reason}" for reason, count in result.report[name].items() if count)
        steps.say(f"  {name}: {table.height:,} labels, {positives:,} positive; dropped: {dropped or 'none'}")
        total += table.height
    if total == 0:
        raise ValueError(
            "none of the tasks could be labelled: there is no admission with a follow-up in these records. Check that "
            "inpatient encounters (class IMP, ACUTE or NONAC, or MIMIC's HOSPITAL_ADMISSION) and their ends are there."
        )
    return dict(result.labels), [task.to_config() for task in tasks]


def _train_tokenizer(
    dataset: EventDataset, task_configs: list[dict[str, Any]], settings: DemoSettings, steps: _Steps
) -> tuple[Any, dict[str, Any]]:
    """Fit the vocabulary and the value bins on pretrain + train, and measure how much of the rest it covers."""
    from ehrseq.tokenization.tokenization_ehr import EhrTokenizer

    steps.start("tokenizer", "Tokenizer, fitted on the patients of pretrain and train")
    tokenizer = EhrTokenizer.train(
        dataset.events(["pretrain", "train"]), tasks=task_configs, model_max_length=settings.context
    )
    held_out = dataset.events("held_out")
    coverage = dict(tokenizer.coverage(held_out if held_out.height else dataset.events()))
    shares = ", ".join(f"{key} {value:.2%}" for key, value in coverage.items() if isinstance(value, float))
    steps.say(f"{len(tokenizer):,} tokens; coverage of the held-out events: {shares}")
    return tokenizer, coverage


def _pretrain(
    dataset: EventDataset,
    tokenizer: Any,
    task_configs: list[dict[str, Any]],
    output: Path,
    settings: DemoSettings,
    steps: _Steps,
) -> Any:
    """NTP on pretrain + train (their labels are not used)."""
    from ehrseq.batches.packing import DataCollatorForPackedNextToken, PackableRows
    from ehrseq.modeling.modeling_ehrmamba import EhrMambaForCausalLM

    histories = tokenizer.encode_histories(dataset.events(["pretrain", "train"]))
    windows = histories.windows(settings.context)
    tokens = settings.pretrain_tokens
    num_steps = max(1, round(tokens / (settings.batch_size * settings.context)))
    steps.start("pretrain", f"Next-token prediction: {len(windows):,} windows, {num_steps} steps")
    config = model_config(
        tokenizer,
        tasks=task_configs,
        hidden_size=settings.hidden_size,
        num_hidden_layers=settings.num_layers,
        state_size=settings.state_size,
        time_step_rank=settings.time_step_rank,
        max_position_embeddings=settings.context,
        initialization="history_first",  # minutes of training are too few for the paper's
        time_step_min=0.03,
        time_step_max=0.3,
    )
    args = training_arguments(
        output / "pretrain",
        max_steps=num_steps,
        per_device_train_batch_size=settings.batch_size,
        learning_rate=settings.pretrain_rate,
        seed=settings.seed,
    )
    # The model is made after the seed is set by the arguments, so that a seed gives one model.
    model = EhrMambaForCausalLM(config)
    trainer = quiet_trainer(
        model=model,
        args=args,
        train_dataset=PackableRows(windows),
        data_collator=DataCollatorForPackedNextToken(tokenizer, settings.context),
    )
    trainer.train()
    folder = output / "pretrained"
    save_checkpoint(folder, model, tokenizer)
    return folder


def _finetune(
    splits: Mapping[str, PromptedDataset],
    tokenizer: Any,
    backbone: Path,
    output: Path,
    settings: DemoSettings,
    steps: _Steps,
) -> Any:
    """MPF on the labelled rows of pretrain + train (a demo has too few patients to keep them apart), tasks balanced."""
    from transformers import AutoModelForSequenceClassification

    from ehrseq.batches.packing import DataCollatorForPackedPrompts, PackableRows
    from ehrseq.batches.shared_prompts import DataCollatorForSharedPrompts, SharedPromptDataset

    train = splits["train"]
    names = tokenizer.tasks
    with quiet_loading():  # the new head is expected
        model = AutoModelForSequenceClassification.from_pretrained(backbone, num_labels=2)

    shared = SharedPromptDataset(train.histories, train.index, settings.shared_context, seed=settings.seed)
    seen = min(settings.shared_histories, FINETUNE_PASSES * len(shared))
    steps.start(
        "shared",
        f"Multitask prompted finetuning, all prompts of a history at once: {len(shared):,} histories with "
        f"{shared.num_labels:,} labels, {seen:,} seen",
    )
    if seen:
        args = training_arguments(
            output / "shared",
            max_steps=max(1, seen // settings.shared_batch_size),
            per_device_train_batch_size=settings.shared_batch_size,
            learning_rate=settings.shared_rate,
            seed=settings.seed,
        )
        trainer = quiet_trainer(
            model=ClassifierOfPrompts(model),
            args=args,
            train_dataset=shared,
            data_collator=DataCollatorForSharedPrompts(tokenizer),
        )
        trainer.train()

    num_rows = min(settings.finetune_rows, FINETUNE_PASSES * len(train))
    sample = balance_rows(train.task_ids, train.labels, names, num_rows=num_rows, seed=settings.seed)
    model.config.tasks = sample.store_in(model.config.tasks)
    steps.start("finetune", f"Multitask prompted finetuning: {len(sample.rows):,} rows drawn from {len(train):,}")
    args = training_arguments(
        output / "finetune",
        max_steps=max(1, len(sample.rows) // settings.batch_size),
        per_device_train_batch_size=settings.batch_size,
        learning_rate=settings.finetune_rate,
        seed=settings.seed,
    )
    trainer = quiet_trainer(
        model=model,
        args=args,
        train_dataset=PackableRows(train.subset(sample.rows)),
        data_collator=DataCollatorForPackedPrompts(tokenizer, settings.context),
        processing_class=tokenizer,
    )
    trainer.train()
    return model.eval()


def _evaluate(
    model: Any,
    tokenizer: Any,
    splits: Mapping[str, PromptedDataset],
    names: list[str],
    cohort: Any,
    settings: DemoSettings,
) -> tuple[dict[str, TaskMetrics], dict[str, float] | None, PromptedDataset, np.ndarray]:
    """Metrics on held-out rows; the thresholds of F1 come from the tuning rows."""
    thresholds: dict[str, float] = {}
    tuning = limit_rows(splits["tuning"], settings.max_test_rows // 2, settings.seed)
    if len(tuning):
        thresholds = choose_thresholds(tuning.labels, score_rows(model, tokenizer, tuning), tuning.task_ids, names)
    test = limit_rows(splits["held_out"], settings.max_test_rows, settings.seed)
    scores = score_rows(model, tokenizer, test)
    metrics = evaluate_tasks(
        test.labels, scores, test.task_ids, test.subject_ids, names, thresholds=thresholds, seed=settings.seed
    )
    if cohort is None:
        return metrics, None, test, scores
    truth = true_risks(cohort, test, names)
    best = {
        name: auroc(test.labels[test.task_ids == task_id], truth[test.task_ids == task_id])
        for task_id, name in enumerate(names)
    }
    return metrics, best, test, scores


def limit_rows(dataset: PromptedDataset, rows_per_task: int, seed: int) -> PromptedDataset:
    """At most so many rows of each task, drawn at random: scoring every row of a large test set takes longer than
    the intervals are worth.
    """
    rng = np.random.default_rng(seed)
    kept = [
        np.sort(rng.permutation(np.flatnonzero(dataset.task_ids == task_id))[:rows_per_task])
        for task_id in np.unique(dataset.task_ids)
    ]
    return dataset.subset(np.concatenate(kept) if kept else np.empty(0, np.int64))


def true_risks(cohort: Any, dataset: PromptedDataset, names: list[str]) -> np.ndarray:
    """`[n]` true risk of every row of simulated patients."""
    truth = np.full(len(dataset), np.nan)
    for task_id, name in enumerate(names):
        rows = np.flatnonzero(dataset.task_ids == task_id)
        if len(rows):
            truth[rows] = cohort.true_risk(name, dataset.subject_ids[rows], dataset.prediction_times[rows])
    return truth


def _risks_of_a_few(
    checkpoint: Path,
    dataset: EventDataset,
    held_out: PromptedDataset,
    test: PromptedDataset,
    scores: np.ndarray,
    cohort: Any,
    output: Path,
    say: Callable[[str], Any],
) -> Path | None:
    """Reload the checkpoint, score three patients by the pipeline, and draw the one with the most to show."""
    from transformers import AutoModelForSequenceClassification, pipeline

    from ehrseq.demo.picture import draw_patient
    from ehrseq.tokenization.tokenization_ehr import EhrTokenizer

    with quiet_loading():
        model = AutoModelForSequenceClassification.from_pretrained(checkpoint)
        tokenizer = EhrTokenizer.from_pretrained(checkpoint)
    build: Any = pipeline  # its overloads list the tasks of transformers only
    risk = build("ehr-risk", model=model, tokenizer=tokenizer)
    if len(test) == 0:
        say("No held-out patient has a label; no patient is shown.")
        return None
    subjects = _patients_to_show(test)
    names = tokenizer.tasks
    reloaded = score_rows(model, tokenizer, test.subset(np.arange(min(64, len(test)))), progress=False)
    difference = float(np.abs(reloaded - scores[: len(reloaded)]).max())
    say(f"Risks after the reload differ by at most {difference:.1e}.")
    tables = (
        dataset.events("held_out").filter(pl.col("subject_id").is_in(subjects)).partition_by("subject_id", as_dict=True)
    )
    patients = []
    for subject in subjects:
        at = test.prediction_times[test.subject_ids == subject].max()
        patients.append({"subject_id": subject, "events": tables[(subject,)].to_dicts(), "prediction_time": at.item()})
    for patient, answer in zip(patients, risk(patients, batch_size=8), strict=True):
        risks = ", ".join(
            f"{item['task']} {'-' if item['score'] is None else format(item['score'], '.1%')}" for item in answer
        )
        say(f"  patient {patient['subject_id']} at {patient['prediction_time']:%Y-%m-%d %H:%M}: {risks}")
    shown = held_out.subset(np.flatnonzero(held_out.subject_ids == subjects[0]))
    shown_scores = score_rows(model, tokenizer, shown, progress=False)
    truth = true_risks(cohort, shown, names) if cohort is not None else None
    return draw_patient(output / "patient.png", tables[(subjects[0],)], shown, shown_scores, names, true_risk=truth)


def _patients_to_show(test: PromptedDataset, count: int = 3) -> list[int]:
    """Held-out patients with several prediction times and, first, both outcomes."""
    table = (
        pl.DataFrame({"subject": test.subject_ids, "label": test.labels})
        .group_by("subject")
        .agg(rows=pl.len(), positives=pl.col("label").sum())
        .with_columns(worth=pl.col("positives").clip(upper_bound=4) * 10 + pl.col("rows").clip(upper_bound=40))
        .sort("worth", "subject", descending=[True, False])
    )
    return table["subject"].head(count).to_list()


def _close(result: DemoResult, output: Path, say: Callable[[str], Any]) -> None:
    """The closing table, and the same as files."""
    say("\n" + metrics_table(result.metrics, best_possible=result.best_possible))
    for metrics in result.metrics.values():
        if metrics.reason:
            say(f"  {metrics.task}: not estimable, {metrics.reason}")
    (output / "metrics.json").write_text(
        json.dumps(
            {
                "metrics": {name: metrics.to_dict() for name, metrics in result.metrics.items()},
                "best_possible": result.best_possible,
                "seconds": result.seconds,
                "counts": result.counts,
            },
            indent=2,
            default=str,
        )
    )
    total = sum(result.seconds.values())
    say(
        f"\n{total:.0f} s in all ("
        + ", ".join(f"{name} {seconds:.0f}" for name, seconds in result.seconds.items())
        + f")\nCheckpoint: {result.checkpoint}"
        + (f"\nPicture:    {result.picture}" if result.picture else "")
    )


if __name__ == "__main__":
    from ehrseq.cli.app import app

    app(["demo", *sys.argv[1:]])
