"""The cells of a table: a pretrained model, a system with one seed. Each is a folder whose `result.json` comes last.

A cell that has its result is not run again; one that was stopped goes on from Trainer's last checkpoint, and ends with
what an undisturbed run ends with.

    cells/<model_type>-pretrained/seed0/      model, result.json
    cells/<system>/seed0/                     predictions.parquet, result.json
        <trial>-<task or all>/                model, result.json, shared/ where there is such a stage
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import transformers
from numpy.typing import NDArray
from transformers import AutoModelForSequenceClassification

from ehrseq.batches.balance import balance_rows
from ehrseq.batches.masking import DataCollatorForMaskedEvents
from ehrseq.batches.packing import DataCollatorForPackedNextToken, DataCollatorForPackedPrompts, PackableRows
from ehrseq.batches.scoring import score_rows
from ehrseq.batches.shared_prompts import DataCollatorForSharedPrompts, SharedPromptDataset
from ehrseq.benchmark.budget import Budget
from ehrseq.benchmark.data import BenchmarkData, Source, load_data
from ehrseq.benchmark.systems import SYSTEMS, System
from ehrseq.encode.rows import PromptedDataset
from ehrseq.evaluation import auroc
from ehrseq.hub.checkpoints import quiet_loading
from ehrseq.training.stages import RESULT, Collate, read_result, train_for_tokens
from ehrseq.training.trainer import ClassifierOfPrompts
from ehrseq.work.files import write_json, write_whole

logger = logging.getLogger(__name__)

PREDICTIONS = "predictions.parquet"
SHARED_SHARE = 0.85
"""Share of the finetuning tokens that a causal model reads as histories with all prompts in them; rows are the rest."""
SHARED_BATCH = 4  # rows of a step per shared history: they are longer, and hold many labels
ALL, SHARED = "all", "shared"


@dataclass(frozen=True)
class PretrainCell:
    """Pretraining of one model.

    Attributes:
        source: The run's data.
        budget: The run's budget.
        model_type: Which model; the systems that share it start from the same weights.
        seed: Seed of weights, order and masks.
    """

    source: Source
    budget: Budget
    model_type: str
    seed: int

    @property
    def folder(self) -> Path:
        """Where its files are."""
        return Path(self.source.out) / "cells" / f"{self.model_type}-pretrained" / f"seed{self.seed}"


@dataclass(frozen=True)
class SystemCell:
    """Finetuning of one system, the choice among its trials, and its predictions.

    Attributes:
        source: The run's data.
        budget: The run's budget.
        system: Name of the system.
        seed: Seed.
    """

    source: Source
    budget: Budget
    system: str
    seed: int

    @property
    def folder(self) -> Path:
        """Where its files are."""
        return Path(self.source.out) / "cells" / self.system / f"seed{self.seed}"


def pretrain_cell(cell: PretrainCell) -> dict[str, Any]:
    """Pretrain a model, unless that is done. Returns the result."""
    if (cell.folder / RESULT).is_file():
        return read_result(cell.folder)
    budget, data = cell.budget, load_data(cell.source, cell.budget)
    system = next(system for system in SYSTEMS.values() if system.model_type == cell.model_type)
    config = system.config(budget, data.tokenizer, data.task_configs)
    context = config.max_position_embeddings
    windows = data.windows(context)
    objectives: dict[str, tuple[Any, Collate]] = {
        "ntp": (transformers.AutoModelForCausalLM, DataCollatorForPackedNextToken(data.tokenizer, context)),
        "mlm": (transformers.AutoModelForMaskedLM, DataCollatorForMaskedEvents(data.tokenizer, context)),
    }
    auto, collator = objectives[str(system.objective)]
    # One epoch may be more than the budget reads: steps are counted in tokens.
    return train_for_tokens(
        cell.folder,
        lambda: auto.from_config(config),
        PackableRows(windows),
        collator,
        tokens=budget.pretrain_tokens,
        batch_size=budget.batch_rows,
        rate=budget.pretrain_rate,
        seed=cell.seed,
        report=lambda model: {"parameters": _size(model), "objective": system.objective},
    )


def system_cell(cell: SystemCell) -> dict[str, Any]:
    """Finetune a system for every trial, keep the best one on the tuning patients, and score the test rows."""
    if (cell.folder / RESULT).is_file():
        return read_result(cell.folder)
    data, system = load_data(cell.source, cell.budget), SYSTEMS[cell.system]
    predict = _predict_neural if system.neural else _predict_counts
    table, result = predict(cell, system, data)
    write_whole(cell.folder / PREDICTIONS, table.write_parquet)
    write_json(cell.folder / RESULT, result)
    return result


# -- neural systems ----------------------------------------------------------------------------------------------------


def _predict_neural(cell: SystemCell, system: System, data: BenchmarkData) -> tuple[pl.DataFrame, dict[str, Any]]:
    budget, names = cell.budget, list(cell.source.tasks)
    pretrained = None
    if system.objective is not None:
        pretrained = PretrainCell(cell.source, budget, system.model_type, cell.seed).folder
    context = system.config(budget, data.tokenizer, data.task_configs).max_position_embeddings
    parts = {part: data.rows(part, context) for part in ("tuning", "test")}
    scopes = [ALL] if system.multitask else names
    trials: list[dict[str, Any]] = []
    folders: list[dict[str, Path]] = []
    tuned: list[NDArray[np.float64]] = []
    for number, rate in enumerate(budget.finetune_rates):
        entry: dict[str, Any] = {"learning_rate": rate, "seconds": 0.0, "tokens": 0, "parameters": 0}
        folders.append({scope: cell.folder / f"{number}-{scope}" for scope in scopes})
        for scope, folder in folders[-1].items():
            stage = _finetune(folder, cell, system, data, pretrained, scope, rate, context, len(scopes))
            for name in ("seconds", "tokens", "parameters"):
                entry[name] += stage[name]
        tuning_scores = _score(folders[-1], parts["tuning"], data.tokenizer, names)
        trials.append(entry | {"tuning_auroc": _aurocs(parts["tuning"], tuning_scores, names)})
        tuned.append(tuning_scores)
    # One configuration for the multitask model; each task its own where each has a model of its own.
    chosen = _choose([trial["tuning_auroc"] for trial in trials], names, together=system.multitask)
    best = {scope: folders[chosen[names[0] if scope == ALL else scope]][scope] for scope in scopes}
    scores = {
        "tuning": _pick(tuned, parts["tuning"], names, chosen),
        "test": _score(best, parts["test"], data.tokenizer, names),
    }
    table = pl.concat(_predictions(rows, scores[part], names, part) for part, rows in parts.items())
    result = {
        "trials": trials,
        "chosen": chosen,
        "seconds": sum(trial["seconds"] for trial in trials),
        "tokens": trials[0]["tokens"],
        "parameters": trials[0]["parameters"] // len(scopes),
        "models": len(scopes),
        "pretraining": None if pretrained is None else read_result(pretrained),
        "context": context,
    }
    return table, result


def _score(
    folders: Mapping[str, Path], rows: PromptedDataset, tokenizer: Any, names: Sequence[str]
) -> NDArray[np.float64]:
    """Probability of each row by the finetuned model of its task, or the one of all tasks."""
    scores = np.full(len(rows), np.nan)
    for scope, folder in folders.items():
        places = np.arange(len(rows)) if scope == ALL else np.flatnonzero(rows.task_ids == names.index(scope))
        with quiet_loading():
            model = AutoModelForSequenceClassification.from_pretrained(folder, use_safetensors=True)
        scores[places] = score_rows(model, tokenizer, rows.subset(places), batch_size=64)
    return scores


def _finetune(
    folder: Path,
    cell: SystemCell,
    system: System,
    data: BenchmarkData,
    pretrained: Path | None,
    scope: str,
    rate: float,
    context: int,
    num_scopes: int,
) -> dict[str, Any]:
    """One finetuned model, of one task or of all: seconds, tokens and steps of both stages, parameters."""
    budget, names = cell.budget, list(cell.source.tasks)
    if (folder / RESULT).is_file():
        return _both(folder, system)
    train = data.rows("train", context)
    if scope != ALL:
        train = train.subset(np.flatnonzero(train.task_ids == names.index(scope)))

    def make_from(checkpoint: Path | None) -> Any:
        if checkpoint is None:
            return AutoModelForSequenceClassification.from_config(
                system.config(budget, data.tokenizer, data.task_configs)
            )
        with quiet_loading():  # the new head is expected
            return AutoModelForSequenceClassification.from_pretrained(checkpoint, num_labels=2, use_safetensors=True)

    tokens = budget.finetune_tokens + (budget.pretrain_tokens if system.objective is None else 0)
    tokens = max(1, tokens // num_scopes)
    before = pretrained
    if system.shared_prompts:
        shared_tokens = int(SHARED_SHARE * tokens)
        train_for_tokens(
            folder / SHARED,
            lambda: make_from(pretrained),
            SharedPromptDataset(*train.in_memory(), train.max_length, seed=cell.seed),
            DataCollatorForSharedPrompts(data.tokenizer),
            wrap=ClassifierOfPrompts,
            tokens=shared_tokens,
            batch_size=max(1, budget.batch_rows // SHARED_BATCH),
            rate=rate,
            seed=cell.seed,
        )
        tokens -= shared_tokens
        before = folder / SHARED
    wanted = math.ceil(tokens / max(1.0, float(train.lengths.mean())))
    sample = balance_rows(train.task_ids, train.labels, names, num_rows=wanted, seed=cell.seed)
    train_for_tokens(
        folder,
        lambda: make_from(before),
        PackableRows(train.subset(sample.rows)),
        DataCollatorForPackedPrompts(data.tokenizer, context),
        tokens=tokens,
        batch_size=budget.batch_rows,
        rate=rate,
        seed=cell.seed,
        report=lambda model: {"parameters": _size(model)},
    )
    return _both(folder, system)


def _both(folder: Path, system: System) -> dict[str, Any]:
    """The result of a finetuned model, with what its stage on shared histories took."""
    result = read_result(folder)
    if system.shared_prompts and "stages" not in result:  # versions before wrote the sum
        first = read_result(folder / SHARED)
        result |= {name: first[name] + result[name] for name in ("seconds", "tokens", "steps")}
    return result


# -- count models ------------------------------------------------------------------------------------------------------


def _predict_counts(cell: SystemCell, system: System, data: BenchmarkData) -> tuple[pl.DataFrame, dict[str, Any]]:
    from ehrseq.baselines import BoostedCounts, LogisticCounts

    names = list(cell.source.tasks)
    parts = {part: data.rows(part, cell.budget.context) for part in ("train", "tuning", "test")}
    scores = {part: np.full(len(parts[part]), np.nan) for part in ("tuning", "test")}
    tried: dict[str, Any] = {}
    start = time.perf_counter()
    for task_id, name in enumerate(names):
        of_task = {part: rows.subset(np.flatnonzero(rows.task_ids == task_id)) for part, rows in parts.items()}
        made: Any = BoostedCounts if system.model_type == "boosting" else LogisticCounts
        model = made(num_configurations=cell.budget.num_trials, seed=cell.seed).fit(of_task["train"], of_task["tuning"])
        tried[name] = {"tried": model.tried, "chosen": model.chosen}
        for part, values in scores.items():
            if len(of_task[part]):
                values[parts[part].task_ids == task_id] = model.predict_proba(of_task[part])[:, 1]
    table = pl.concat(_predictions(parts[part], values, names, part) for part, values in scores.items())
    result = {
        "trials": tried,
        "seconds": time.perf_counter() - start,
        "tokens": None,
        "parameters": None,
        "models": len(names),
        "pretraining": None,
        "context": None,
    }
    return table, result


# -- choices and tables ------------------------------------------------------------------------------------------------


def _aurocs(rows: PromptedDataset, scores: NDArray[np.float64], names: Sequence[str]) -> dict[str, float | None]:
    """AUROC by task, None where there is one class only."""
    aurocs: dict[str, float | None] = {}
    for task_id, name in enumerate(names):
        of_task = rows.task_ids == task_id
        value = auroc(rows.labels[of_task], scores[of_task])
        aurocs[name] = value if math.isfinite(value) else None
    return aurocs


def _choose(trials: Sequence[Mapping[str, float | None]], names: Sequence[str], together: bool) -> dict[str, int]:
    """Number of the trial that each task keeps."""

    def mean(trial: Mapping[str, float | None], tasks: Sequence[str]) -> float:
        known = [value for task in tasks if (value := trial[task]) is not None]
        return float(np.mean(known)) if known else 0.5

    return {name: int(np.argmax([mean(trial, names if together else [name]) for trial in trials])) for name in names}


def _pick(
    scores: Sequence[NDArray[np.float64]], rows: PromptedDataset, names: Sequence[str], chosen: Mapping[str, int]
) -> NDArray[np.float64]:
    """The scores of each task's trial."""
    trial = np.array([chosen[name] for name in names], np.int64)[rows.task_ids]
    return np.stack(scores)[trial, np.arange(len(rows))] if len(rows) else np.empty(0)


def _predictions(rows: PromptedDataset, scores: NDArray[np.float64], names: Sequence[str], part: str) -> pl.DataFrame:
    return pl.DataFrame(
        {
            "part": pl.Series([part] * len(rows), dtype=pl.String),
            "task": pl.Series([names[task] for task in rows.task_ids], dtype=pl.String),
            "subject_id": rows.subject_ids,
            "prediction_time": rows.prediction_times,
            "label": rows.labels == 1,
            "score": scores,
        }
    ).sort("part", "task", "subject_id", "prediction_time")


def _size(model: Any) -> int:
    return sum(weight.numel() for weight in model.parameters())
