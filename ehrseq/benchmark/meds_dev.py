"""EhrMamba as a model of MEDS-DEV: pretrain, finetune and predict on any MEDS dataset, any task, by three commands.

    python -P -m ehrseq.benchmark.meds_dev pretrain --dataset_dir D --output_dir P
    python -P -m ehrseq.benchmark.meds_dev finetune --dataset_dir D --labels_dir L --model_initialization_dir P \
        --output_dir F
    python -P -m ehrseq.benchmark.meds_dev predict --dataset_dir D --labels_dir L --model_initialization_dir F \
        --output_dir O --split held_out

MEDS-DEV's driver fills these arguments in (examples/meds_dev/ehrmamba/model.yaml). A command that was stopped goes
on when it is run again; one that is done does nothing.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from ehrseq.batches.packing import DataCollatorForPackedNextToken, DataCollatorForPackedPrompts, PackableRows
from ehrseq.batches.prompts import prompted_dataset
from ehrseq.batches.scoring import score_rows
from ehrseq.benchmark.budget import Budget
from ehrseq.benchmark.systems import SYSTEMS
from ehrseq.data.dataset import EventDataset
from ehrseq.encode.rows import PromptedDataset
from ehrseq.evaluation import best_f1_threshold, write_meds_predictions
from ehrseq.hub.checkpoints import quiet_loading
from ehrseq.tasks.storage import read_label_table
from ehrseq.tokenization.tokenization_ehr import EhrTokenizer
from ehrseq.training.stages import RESULT, read_result, train_for_tokens

logger = logging.getLogger(__name__)

DEMO = {"hidden_size": 32, "num_layers": 1, "context": 128, "pretrain_tokens": 20_000, "finetune_tokens": 20_000}
"""A model and a training that take seconds: what `demo=True` of the driver is for."""

TASK_NAME = "task"
TASK_TOKEN = "[TASK_NAME]"


def pretrain_on_meds(dataset_dir: Path, output_dir: Path, budget: Budget, seed: int = 0) -> None:
    """Train a tokenizer and EhrMamba by next-token prediction on the training patients.

    Args:
        dataset_dir: MEDS dataset (0.3 or 0.4) with the split `train`.
        output_dir: Folder of the checkpoint.
        budget: Size and tokens.
        seed: Seed of weights and order.

    Raises:
        ValueError: No such dataset or split.
    """
    if (output_dir / RESULT).is_file():
        return
    events = EventDataset(dataset_dir).events("train")
    tokenizer = EhrTokenizer.train(
        events, tasks=[{"name": TASK_NAME, "token": TASK_TOKEN}], model_max_length=budget.context
    )
    config = SYSTEMS["ehrmamba"].config(budget, tokenizer, [{"name": TASK_NAME, "token": TASK_TOKEN}])
    context = config.max_position_embeddings
    train_for_tokens(
        output_dir,
        lambda: AutoModelForCausalLM.from_config(config),
        PackableRows(tokenizer.encode_histories(events).windows(context)),
        DataCollatorForPackedNextToken(tokenizer, context),
        tokens=budget.pretrain_tokens,
        batch_size=budget.batch_rows,
        rate=budget.pretrain_rate,
        seed=seed,
        encoder=tokenizer,
        report=lambda _: {"context": context},
    )


def finetune_on_meds(
    dataset_dir: Path, labels_dir: Path, model_initialization_dir: Path, output_dir: Path, budget: Budget, seed: int = 0
) -> None:
    """Finetune a pretrained checkpoint on the training patients' labels; the tuning patients set the threshold.

    Args:
        dataset_dir: MEDS dataset with the split `train`, and `tuning` where there is one.
        labels_dir: Label tables of one task (subject_id, prediction_time, boolean_value), in any files.
        model_initialization_dir: What `pretrain` wrote.
        output_dir: Folder of the checkpoint.
        budget: Tokens and learning rate.
        seed: Seed of the head and of the order.

    Raises:
        ValueError: No labels of training patients, one class only, no checkpoint.
    """
    if (output_dir / RESULT).is_file():
        return
    tokenizer = _tokenizer(model_initialization_dir)
    context = AutoConfig.from_pretrained(model_initialization_dir).max_position_embeddings
    train = _rows(dataset_dir, labels_dir, "train", tokenizer, context)
    positives = int(train.labels.sum())
    if not 0 < positives < len(train):
        raise ValueError(
            f"{labels_dir} has {len(train):,} labels of training patients, {positives:,} of them positive; both "
            "classes are needed to learn from."
        )

    def threshold(model: Any) -> dict[str, float]:
        if "tuning" in EventDataset(dataset_dir).splits["split"].unique():
            tuning = _rows(dataset_dir, labels_dir, "tuning", tokenizer, context)
            if tuning.labels.any():
                return {"threshold": float(best_f1_threshold(tuning.labels, score_rows(model, tokenizer, tuning)))}
        return {"threshold": 0.5}

    train_for_tokens(
        output_dir,
        lambda: _model(model_initialization_dir, num_labels=2),
        PackableRows(train),
        DataCollatorForPackedPrompts(tokenizer, context),
        tokens=budget.finetune_tokens,
        batch_size=budget.batch_rows,
        rate=budget.finetune_rates[0],
        seed=seed,
        encoder=tokenizer,
        report=threshold,
    )


def predict_meds(
    dataset_dir: Path, labels_dir: Path, model_initialization_dir: Path, output_dir: Path, split: str
) -> Path:
    """Score every label of a split.

    Args:
        dataset_dir: MEDS dataset.
        labels_dir: Label tables of the task.
        model_initialization_dir: What `finetune` wrote.
        output_dir: Folder that gets `predictions.parquet`, in the schema of MEDS evaluation.
        split: Name of the split.

    Raises:
        ValueError: No labels of the split's patients, labels before a patient's first event, no checkpoint.
    """
    file = output_dir / "predictions.parquet"
    if file.is_file():
        return file
    tokenizer = _tokenizer(model_initialization_dir)
    model = _model(model_initialization_dir)
    rows = _rows(dataset_dir, labels_dir, split, tokenizer, model.config.max_position_embeddings)
    table = pl.DataFrame(
        {
            "subject_id": rows.subject_ids,
            "prediction_time": rows.prediction_times,
            "label": rows.labels == 1,
            "score": score_rows(model, tokenizer, rows),
        }
    )
    write_meds_predictions(table, file, threshold=read_result(model_initialization_dir)["threshold"])
    return file


def _tokenizer(folder: Path) -> EhrTokenizer:
    """The tokenizer of a finished checkpoint.

    Raises:
        ValueError: It is not finished.
    """
    if not (folder / RESULT).is_file():
        raise ValueError(f"{folder} holds no finished checkpoint; run the command before this one first.")
    tokenizer: EhrTokenizer = EhrTokenizer.from_pretrained(folder)
    return tokenizer


def _model(folder: Path, **options: Any) -> Any:
    with quiet_loading():
        return AutoModelForSequenceClassification.from_pretrained(folder, use_safetensors=True, **options)


def _rows(dataset_dir: Path, labels_dir: Path, split: str, tokenizer: Any, context: int) -> PromptedDataset:
    """The prompted rows of a split's labels, every label one row."""
    if not labels_dir.is_dir():
        raise ValueError(f"{labels_dir} is no folder; expected the label tables of one task.")
    labels = read_label_table(labels_dir)
    dataset = EventDataset(dataset_dir)
    events = dataset.events(split)
    of_split = labels.filter(pl.col("subject_id").is_in(events["subject_id"].unique().implode()))
    unknown = labels.filter(~pl.col("subject_id").is_in(dataset.splits["subject_id"].implode())).height
    if unknown:
        logger.warning("%s labels are of patients that the dataset does not hold; they are left out.", f"{unknown:,}")
    if of_split.is_empty():
        raise ValueError(f"{labels_dir} has no label of the patients of the split {split!r} of {dataset_dir}.")
    rows = prompted_dataset(tokenizer, events, {TASK_NAME: of_split}, context)
    if len(rows) != of_split.height:
        raise ValueError(
            f"{of_split.height - len(rows):,} of {of_split.height:,} labels of the split {split!r} have no event of "
            "their patient up to the prediction time; take them out of the label tables."
        )
    order = np.lexsort((rows.prediction_times, rows.subject_ids))
    return rows.subset(order)


def _budget(demo: bool, budget: str) -> Budget:
    return replace(Budget.read("quick"), name="demo", **DEMO) if demo else Budget.read(budget)  # type: ignore[arg-type]


def run_meds_dev(arguments: Sequence[str] | None = None) -> None:
    """Run one command; an error of the input is one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("pretrain", "finetune", "predict"))
    for name in ("dataset_dir", "output_dir"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    for name in ("labels_dir", "model_initialization_dir"):
        parser.add_argument(f"--{name}", type=Path)
    parser.add_argument("--split", default="held_out", help="split to predict")
    parser.add_argument("--demo", default="False", help="True: a model and a training that take seconds")
    parser.add_argument(
        "--budget", default="full", help="`ehrseq benchmark`'s: quick, simulated, simulated_long, full, or a YAML file"
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    needed = () if options.command == "pretrain" else ("labels_dir", "model_initialization_dir")
    missing = [f"--{name}" for name in needed if getattr(options, name) is None]
    if missing:
        parser.error(f"{options.command} needs {' and '.join(missing)}")
    data, out = options.dataset_dir, options.output_dir
    try:
        budget = _budget(options.demo.lower() == "true", options.budget)
        if options.command == "pretrain":
            pretrain_on_meds(data, out, budget, options.seed)
        elif options.command == "finetune":
            finetune_on_meds(data, options.labels_dir, options.model_initialization_dir, out, budget, options.seed)
        else:
            predict_meds(data, options.labels_dir, options.model_initialization_dir, out, options.split)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    run_meds_dev()
