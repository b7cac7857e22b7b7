"""How well a small EhrMamba learns under a stated compute budget, beside the best possible and beside boosting.

It trains on 20,000 simulated patients (NTP, then MPF on shared histories, then MPF rows, by the Hugging Face Trainer),
tests on 10,000 fresh ones of another seed, and reports the AUROC of every task with at least 100 positives, with 95 %
intervals over patients:

    python -m benchmarks.tables.bench_learning --output runs/bench/learning --budget_minutes 30

Stages leave their results in the output folder and are skipped when they are there: run the same command to resume. The
budget is the wall time of training alone (all stages) on the cores given; the steps that fit are found by a probe.
Boosting is `BoostedCounts`, XGBoost on the counts of all tokens up to the prediction time (whole history) and the ages
at first and last event, on the same patients and labels.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from transformers import AutoModelForSequenceClassification, HfArgumentParser

from benchmarks.harness import machine, write_json, write_parquet
from ehrseq.baselines import BoostedCounts
from ehrseq.batches.balance import balance_rows, limit_rows
from ehrseq.batches.packing import DataCollatorForPackedNextToken, DataCollatorForPackedPrompts, PackableRows
from ehrseq.batches.prompts import prompted_dataset
from ehrseq.batches.scoring import score_rows
from ehrseq.batches.shared_prompts import DataCollatorForSharedPrompts, SharedPromptDataset
from ehrseq.data.simulate.cohort import simulate, true_risks
from ehrseq.data.simulate.risk import ORDER_DEPENDENT_TASKS
from ehrseq.encode.rows import PromptedDataset
from ehrseq.evaluation import Ranking, bootstrap_interval
from ehrseq.modeling.modeling_ehrmamba import EhrMambaForCausalLM
from ehrseq.tasks import label_events, list_tasks, load_task
from ehrseq.tokenization.tokenization_ehr import EhrTokenizer
from ehrseq.training.stages import run_stage
from ehrseq.training.trainer import ClassifierOfPrompts, model_config, quiet_trainer, training_arguments
from ehrseq.work.engine import available_cores

MIN_POSITIVES = 100
TASKS = tuple(list_tasks())
FOLDERS = {"pretrain": "pretrained", "shared": "shared_checkpoint", "finetune": "checkpoint"}
"""Checkpoint of each stage."""


@dataclass
class Arguments:
    """Options of the benchmark."""

    output: str = field(default="runs/bench/learning", metadata={"help": "Folder of the stages' results."})
    budget_minutes: float = field(default=30.0, metadata={"help": "Wall time of training, all stages."})
    patients: int = field(default=20_000, metadata={"help": "Simulated patients to train on."})
    test_patients: int = field(default=10_000, metadata={"help": "Fresh patients to test on."})
    seed: int = field(default=1, metadata={"help": "Seed of the training patients and of training."})
    test_seed: int = field(default=3, metadata={"help": "Seed of the test patients; seed 2 chose the recipe."})
    hidden_size: int = field(default=96, metadata={"help": "Width of the model."})
    num_layers: int = field(default=1, metadata={"help": "Mamba blocks."})
    state_size: int = field(default=8, metadata={"help": "State dimensions per channel."})
    time_step_rank: int = field(default=32, metadata={"help": "Rank of the step-size projection."})
    context: int = field(default=96, metadata={"help": "Context length of NTP, of MPF rows and of the test."})
    shared_context: int = field(default=256, metadata={"help": "Context length of MPF on shared histories."})
    initialization: str = field(default="history_first", metadata={"help": '"history_first" or "paper".'})
    batch_size: int = field(default=32, metadata={"help": "Rows per step."})
    shared_batch_size: int = field(default=8, metadata={"help": "Shared histories per step."})
    pretrain_share: float = field(default=0.1, metadata={"help": "Share of the budget for NTP."})
    shared_share: float = field(default=0.75, metadata={"help": "Share of the budget for MPF on shared histories."})
    pretrain_rate: float = field(default=3e-3, metadata={"help": "Peak learning rate of NTP."})
    shared_rate: float = field(default=3e-3, metadata={"help": "Peak learning rate of MPF on shared histories."})
    finetune_rate: float = field(default=1e-3, metadata={"help": "Peak learning rate of MPF on rows."})
    max_test_rows: int = field(default=20_000, metadata={"help": "Test rows per task (drawn at random)."})
    threads: int = field(default=0, metadata={"help": "Threads of torch and XGBoost; 0 = all cores."})


class Stages:
    """Results of finished stages as JSON files in the output folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def read(self, name: str) -> Any | None:
        """The result of a finished stage, None when it has to run."""
        file = self.folder / f"{name}.json"
        return json.loads(file.read_text()) if file.exists() else None

    def write(self, name: str, result: Any) -> Any:
        """Keep a result; the file appears whole or not at all."""
        write_json(result, self.folder / f"{name}.json")
        return result


def labelled_cohort(patients: int, seed: int) -> tuple[Any, pl.DataFrame, dict[str, pl.DataFrame]]:
    """A cohort, its events, and the labels of every task at every prediction time."""
    cohort = simulate(patients, seed)
    events = cohort.events()
    result = label_events(events, [load_task(name) for name in TASKS], end_of_data=cohort.end_of_data)
    return cohort, events, dict(result.labels)


def seconds_per_step(trainer: Any, steps: int = 12) -> float:
    """Median wall time of a training step, after a warm-up."""
    trainer.create_optimizer()
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1  # `train` would set it
    times = []
    for number, batch in enumerate(trainer.get_train_dataloader()):
        start = time.perf_counter()
        trainer.training_step(trainer.model, batch)
        torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), 1.0)
        trainer.model.zero_grad()
        times.append(time.perf_counter() - start)
        if number + 1 >= steps:
            break
    return float(np.median(times[3:] or times))


def train(
    name: str,
    make_model: Any,
    dataset: Any,
    collator: Any,
    arguments: Arguments,
    minutes: float,
    rate: float,
    stages: Stages,
    batch_size: int,
    *,
    wrap: Any = None,
    encoder: Any = None,
) -> dict[str, Any]:
    """One training stage within its share of the budget; it resumes where it was stopped."""
    folder = stages.folder / FOLDERS[name]
    options: dict[str, Any] = {
        "per_device_train_batch_size": batch_size,
        "learning_rate": rate,
        "seed": arguments.seed,
    }
    plan = stages.read(f"{name}_plan")
    if plan is None:
        model = make_model()
        probe = quiet_trainer(
            model=model if wrap is None else wrap(model),
            args=training_arguments(folder / "steps", max_steps=100, **options),
            train_dataset=dataset,
            data_collator=collator,
        )
        step_seconds = seconds_per_step(probe)
        plan = {"seconds_per_step": step_seconds, "steps": max(10, int(60 * minutes / step_seconds))}
        stages.write(f"{name}_plan", plan)
    saving = {"save_strategy": "steps", "save_steps": max(50, plan["steps"] // 10), "save_total_limit": 1}
    result = run_stage(
        folder,
        make_model=make_model,
        arguments=lambda steps: training_arguments(steps, max_steps=plan["steps"], **saving, **options),
        rows=dataset,
        collate=collator,
        settings={"steps": plan["steps"], **options},
        wrap=wrap,
        encoder=encoder,
    )
    losses = result["training_loss"]
    return plan | {
        "minutes": result["seconds"] / 60,
        "resumed": result["resumed"],
        "rows": plan["steps"] * batch_size,
        "loss_first": losses[0] if losses else None,
        "loss_last": losses[-1] if losses else None,
    }


def main() -> None:
    """Run the stages that have no result yet, then write the report."""
    (arguments,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    stages = Stages(Path(arguments.output))
    known = stages.read("arguments")
    if known is not None and known | {"output": "", "threads": 0} != asdict(arguments) | {"output": "", "threads": 0}:
        raise SystemExit(f"{arguments.output} holds a run with other options: {known}. Give another --output.")
    stages.write("arguments", asdict(arguments))
    threads = arguments.threads or available_cores()
    torch.set_num_threads(threads)

    if stages.read("report") is None:
        train_and_score(arguments, stages)
        boost(arguments, stages, threads)
        report(arguments, stages, threads)
    print((stages.folder / "report.md").read_text())


def tokenizer_and_labels(arguments: Arguments, stages: Stages) -> tuple[Any, pl.DataFrame, dict[str, pl.DataFrame]]:
    """The training patients and the tokenizer that is fitted on them."""
    _, events, labels = labelled_cohort(arguments.patients, arguments.seed)
    tasks = [load_task(name).to_config() for name in TASKS]
    tokenizer = EhrTokenizer.train(events, tasks=tasks, model_max_length=arguments.context)
    tokenizer.save_pretrained(stages.folder / "tokenizer")
    return tokenizer, events, labels


def train_and_score(arguments: Arguments, stages: Stages) -> None:
    """NTP, MPF on shared histories, MPF on rows, and the scores of the test rows."""
    if (stages.folder / "scores.parquet").exists():
        return
    tokenizer, events, labels = tokenizer_and_labels(arguments, stages)
    shares = {"pretrain": arguments.pretrain_share, "shared": arguments.shared_share}
    minutes = {name: arguments.budget_minutes * share for name, share in shares.items()}
    minutes["finetune"] = arguments.budget_minutes - sum(minutes.values())
    if min(minutes.values()) <= 0:
        raise SystemExit(f"each stage needs a share above 0, and the shares {shares} a sum below 1.")
    of_rows, of_histories = arguments.batch_size, arguments.shared_batch_size

    if stages.read("pretrain") is None:
        windows = tokenizer.encode_histories(events).windows(arguments.context)
        config = model_config(
            tokenizer,
            tasks=[load_task(name).to_config() for name in TASKS],
            hidden_size=arguments.hidden_size,
            num_hidden_layers=arguments.num_layers,
            state_size=arguments.state_size,
            time_step_rank=arguments.time_step_rank,
            max_position_embeddings=arguments.context,
            initialization=arguments.initialization,
            **({"time_step_min": 0.03, "time_step_max": 0.3} if arguments.initialization == "history_first" else {}),
        )
        collator = DataCollatorForPackedNextToken(tokenizer, arguments.context)
        rate, dataset, limit = arguments.pretrain_rate, PackableRows(windows), minutes["pretrain"]
        make: Any = lambda: EhrMambaForCausalLM(config)  # noqa: E731
        result = train("pretrain", make, dataset, collator, arguments, limit, rate, stages, of_rows)
        stages.write("pretrain", result | {"windows": len(windows)})

    if stages.read("shared") is None:
        make = classifier_of(stages.folder / FOLDERS["pretrain"])
        rows = prompted_dataset(tokenizer, events, labels, arguments.context)
        shared = SharedPromptDataset(rows.histories, rows.index, arguments.shared_context, seed=arguments.seed)
        collator, rate, limit = DataCollatorForSharedPrompts(tokenizer), arguments.shared_rate, minutes["shared"]
        result = train(
            "shared", make, shared, collator, arguments, limit, rate, stages, of_histories, wrap=ClassifierOfPrompts
        )
        stages.write("shared", result | {"available_rows": len(shared), "available_labels": shared.num_labels})

    if stages.read("finetune") is None:
        rows = prompted_dataset(tokenizer, events, labels, arguments.context)
        sample = balance_rows(rows.task_ids, rows.labels, tokenizer.tasks, seed=arguments.seed)
        make = classifier_of(stages.folder / FOLDERS["shared"], sample.store_in)
        collator = DataCollatorForPackedPrompts(tokenizer, arguments.context)
        dataset, rate, limit = PackableRows(rows.subset(sample.rows)), arguments.finetune_rate, minutes["finetune"]
        result = train("finetune", make, dataset, collator, arguments, limit, rate, stages, of_rows, encoder=tokenizer)
        stages.write("finetune", result | {"available_rows": len(rows)})

    model = AutoModelForSequenceClassification.from_pretrained(stages.folder / FOLDERS["finetune"])
    cohort, test_events, test_labels = labelled_cohort(arguments.test_patients, arguments.test_seed)
    test = test_rows(prompted_dataset(tokenizer, test_events, test_labels, arguments.context), arguments)
    table = pl.DataFrame(
        {
            "subject_id": test.subject_ids,
            "prediction_time": test.prediction_times,
            "task_id": test.task_ids,
            "label": test.labels,
            "score": score_rows(model, tokenizer, test, batch_size=128),
            "true_risk": true_risks(
                cohort, np.asarray(TASKS)[test.task_ids].tolist(), test.subject_ids, test.prediction_times
            ),
        }
    )
    write_parquet(table, stages.folder / "scores.parquet")


def classifier_of(checkpoint: Path, change_tasks: Any = list) -> Any:
    """What makes the classifier that a stage begins with."""

    def make() -> Any:
        model = AutoModelForSequenceClassification.from_pretrained(checkpoint, num_labels=2)
        model.config.tasks = change_tasks(model.config.tasks)
        return model

    return make


def test_rows(dataset: PromptedDataset, arguments: Arguments) -> PromptedDataset:
    """The test rows: at most `max_test_rows` per task, drawn at random over all test patients."""
    return limit_rows(dataset, arguments.max_test_rows, arguments.test_seed)


def boost(arguments: Arguments, stages: Stages, threads: int) -> None:
    """XGBoost per task on the same patients and labels; rounds chosen on a tenth of the training patients."""
    if (stages.folder / "boosting.parquet").exists():
        return
    tokenizer, events, labels = tokenizer_and_labels(arguments, stages)
    rows = prompted_dataset(tokenizer, events, labels, arguments.context)
    _, test_events, test_labels = labelled_cohort(arguments.test_patients, arguments.test_seed)
    test = test_rows(prompted_dataset(tokenizer, test_events, test_labels, arguments.context), arguments)
    scores = np.full(len(test), np.nan)
    for task_id, name in enumerate(TASKS):
        start = time.perf_counter()
        own, asked = np.flatnonzero(rows.task_ids == task_id), np.flatnonzero(test.task_ids == task_id)
        tuning = rows.subject_ids[own] % 10 == 0
        model = BoostedCounts(num_configurations=1, seed=arguments.seed, num_threads=threads)
        model.fit(rows.subset(own[~tuning]), rows.subset(own[tuning]))
        scores[asked] = model.predict_proba(test.subset(asked))[:, 1]
        seconds = time.perf_counter() - start
        stages.write(f"boosting_{name}", {"rows": len(own), **model.chosen, "seconds": seconds})
    table = pl.DataFrame({"subject_id": test.subject_ids, "task_id": test.task_ids, "boosting": scores})
    table.write_parquet(stages.folder / "boosting.parquet")


def report(arguments: Arguments, stages: Stages, threads: int) -> None:
    """AUROC of the model, of boosting and of the true risk on the same test rows."""
    table = pl.read_parquet(stages.folder / "scores.parquet")
    boosting = pl.read_parquet(stages.folder / "boosting.parquet")
    if not table.select("subject_id", "task_id").equals(boosting.select("subject_id", "task_id")):
        raise SystemExit("scores.parquet and boosting.parquet are about different rows: remove both and run again.")
    table = table.with_columns(boosting["boosting"])
    results: dict[str, Any] = {}
    for task_id, name in enumerate(TASKS):
        own = table.filter(pl.col("task_id") == task_id)
        positives = int(own["label"].sum())
        entry: dict[str, Any] = {"labels": own.height, "positives": positives, "order": name in ORDER_DEPENDENT_TASKS}
        if positives >= MIN_POSITIVES:
            subjects, label = own["subject_id"].to_numpy(), own["label"].to_numpy()
            rankings = {column: Ranking(label, own[column].to_numpy()) for column in ("score", "boosting", "true_risk")}
            for column, ranking in rankings.items():
                entry[column] = asdict(bootstrap_interval(ranking.auroc, subjects))
            # The same resamples for both: the interval of a difference is narrower than two intervals suggest.
            for other in ("boosting", "true_risk"):
                entry[f"score_minus_{other}"] = asdict(
                    bootstrap_interval(lambda w, r=rankings, o=other: r["score"].auroc(w) - r[o].auroc(w), subjects)
                )
            entry["mean_score"], entry["prevalence"] = float(own["score"].mean()), positives / own.height
        results[name] = entry
    training = {name: stages.read(name) for name in ("pretrain", "shared", "finetune")}
    (stages.folder / "report.md").write_text(markdown(arguments, results, training, threads))
    whole = {"tasks": results, "training": training, "machine": machine(), "arguments": asdict(arguments)}
    stages.write("report", whole)


def markdown(arguments: Arguments, results: dict[str, Any], training: dict[str, Any], threads: int) -> str:
    """The report as Markdown."""

    def interval(entry: dict[str, float]) -> str:
        return f"{entry['value']:.3f} [{entry['low']:.3f}, {entry['high']:.3f}]"

    lines = [
        f"Trained on {arguments.patients:,} simulated patients within {arguments.budget_minutes:g} minutes on "
        f"{threads} threads (EhrMamba, {arguments.num_layers} blocks, {arguments.hidden_size} wide, context "
        f"{arguments.context}; NTP {training['pretrain']['minutes']:.1f} min, {training['pretrain']['rows']:,} rows; "
        f"MPF {training['shared']['minutes']:.1f} min, {training['shared']['rows']:,} shared histories, and "
        f"{training['finetune']['minutes']:.1f} min, {training['finetune']['rows']:,} rows), tested on "
        f"{arguments.test_patients:,} fresh ones.",
        "",
        "| task | labels | positives | EhrMamba AUROC | best possible | boosting | to the best | over boosting |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, entry in results.items():
        start = f"| {name}{' (order)' if entry['order'] else ''} | {entry['labels']:,} | {entry['positives']:,} |"
        if "score" not in entry:
            lines.append(f"{start} fewer than {MIN_POSITIVES} positives | | | | |")
            continue
        lines.append(
            f"{start} {interval(entry['score'])} | {entry['true_risk']['value']:.3f} | {interval(entry['boosting'])} | "
            f"{entry['score_minus_true_risk']['value']:+.3f} | {interval(entry['score_minus_boosting'])} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
