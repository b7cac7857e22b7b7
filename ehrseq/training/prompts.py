"""Training EhrMamba: next-token prediction, then multitask prompted finetuning (MPF), on a dataset with labels.

rows = load_rows(dataset, folder / "tokenizer", tasks, context=256)      # the encoded files where there are any
stages = PromptStages(recipe, rows, tasks, labels, seed=0)
stages.run("pretrain", folder / "pretrain", None, settings={...})
stages.run("finetune", folder / "finetune", folder / "pretrain", settings={...})
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ehrseq.batches.balance import balance_rows, limit_rows
from ehrseq.batches.packing import DataCollatorForPackedNextToken, DataCollatorForPackedPrompts, PackableRows
from ehrseq.batches.prompts import prompted_dataset
from ehrseq.batches.shared_prompts import DataCollatorForSharedPrompts, shared_prompts
from ehrseq.data.dataset import EventDataset
from ehrseq.encode import EncodedDataset, is_encoded
from ehrseq.evaluation.trainer_metrics import ComputeTaskMetrics
from ehrseq.hub.checkpoints import quiet_loading
from ehrseq.tasks.storage import end_of_labels
from ehrseq.training.prompt_recipe import FROM_LABELS, SPLITS, PromptRecipe
from ehrseq.training.recipe import Stage
from ehrseq.training.stages import TuningRows, mean_length, resumable_arguments, run_stage
from ehrseq.training.trainer import (
    COSINE_WARMUP_SHARE,
    ClassifierOfPrompts,
    is_main_process,
    model_config,
    num_processes,
    wait_for_all,
)
from ehrseq.work.files import write_whole

if TYPE_CHECKING:
    import polars as pl
    from transformers import PreTrainedModel, TrainingArguments

    from ehrseq.encode.follow_up import EndOfData
    from ehrseq.encode.rows import HistoryWindows, PromptedDataset
    from ehrseq.modeling.configuration_ehrmamba import EhrMambaConfig
    from ehrseq.tokenization.tokenization_ehr import EhrTokenizer

EVALUATIONS = 10  # of a stage that keeps its best weights

Labels = Mapping[str, "pl.DataFrame"]


class EventRows:
    """The rows of a dataset: of its encoded files, or encoded in memory.

    Args:
        dataset: Folder of a prepared dataset.
        tokenizer: The tokenizer.
        encoded: Its encoded files, None where there are none.
    """

    def __init__(self, dataset: str | Path, tokenizer: EhrTokenizer, encoded: EncodedDataset | None = None) -> None:
        self.dataset, self.tokenizer, self.encoded = EventDataset(dataset), tokenizer, encoded

    def windows(self, context: int, splits: Sequence[str], end_of_data: EndOfData | None = None) -> HistoryWindows:
        """Pretraining rows of the patients of some splits, see `EncodedHistories.windows`."""
        if self.encoded is not None:
            result: HistoryWindows = self.encoded.windows(context, splits, end_of_data)
            return result
        return self.tokenizer.encode_histories(self.dataset.events(splits)).windows(context, end_of_data)

    def prompts(self, labels: Labels, context: int, splits: Sequence[str]) -> PromptedDataset:
        """MPF rows of the labels of the patients of some splits."""
        if self.encoded is not None:
            result: PromptedDataset = self.encoded.prompts(labels, context, splits)
            return result
        return prompted_dataset(self.tokenizer, self.dataset.events(splits), labels, context)


def load_rows(dataset: str | Path, folder: Path, tasks: Sequence[Mapping[str, Any]], context: int) -> EventRows:
    """The rows of a dataset, with its own tokenizer where it was encoded, else with one that is fitted and kept.

    Args:
        dataset: Folder of a prepared dataset.
        folder: Where a new tokenizer is kept; one that is there is used.
        tasks: `config.tasks` entries of the tasks that are learnt.
        context: Context length kept in the tokenizer.

    Raises:
        ValueError: The encoded files were made without one of the tasks.
    """
    from ehrseq.tokenization.tokenization_ehr import EhrTokenizer

    files = Path(dataset) / "encoded"
    if is_encoded(files):
        encoded = EncodedDataset(files)
        tokenizer = encoded.tokenizer
        names = [str(task["name"]) for task in tasks]
        missing = [name for name in names if name not in tokenizer.tasks]
        if missing:
            raise ValueError(
                f"the tokenizer of {files} has no token for {missing}: it was fitted before these labels were made. "
                f"Run `ehrseq tokenize {dataset}` again, or remove {files}."
            )
        for name in set(tokenizer.tasks) - set(names):
            tokenizer.remove_task(name)
        tokenizer.model_max_length = context
        return EventRows(dataset, tokenizer, encoded)
    if is_main_process() and not folder.is_dir():
        events = EventDataset(dataset)
        fitted_on = present_splits(events, SPLITS)
        tokenizer = EhrTokenizer.train(events.events(fitted_on), tasks=tasks, model_max_length=context)
        write_whole(folder, tokenizer.save_pretrained)
    wait_for_all()
    return EventRows(dataset, EhrTokenizer.from_pretrained(folder))


def present_splits(dataset: EventDataset, wanted: Sequence[str]) -> list[str]:
    """Those of the splits that hold somebody.

    Raises:
        ValueError: None of them does.
    """
    known = dataset.splits["split"].unique().to_list()
    present = [name for name in wanted if name in known]
    if not present:
        raise ValueError(
            f"{dataset.path} has no patients in {' or '.join(wanted)}; its splits are {sorted(known) or 'none'}. "
            "`ehrseq prepare` or `ehrseq split` make pretrain, train, tuning and held_out."
        )
    return present


@dataclass(frozen=True)
class PromptStages:
    """The stages of a recipe. Each trains a checkpoint into a folder, on from the one of the stage before.

    A stage that is done is not done again; one that was begun with other settings is begun anew.

    Attributes:
        recipe: The recipe.
        rows: The dataset's rows.
        tasks: `config.tasks` entries of the tasks that are learnt.
        labels: Their label tables.
        seed: Of new weights, drawn rows, order and dropout.
    """

    recipe: PromptRecipe
    rows: EventRows
    tasks: Sequence[Mapping[str, Any]]
    labels: Labels
    seed: int

    def run(self, name: str, folder: Path, before: Path | None, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Run a stage.

        Args:
            name: One of the recipe's `stage_names`, of a stage that it has.
            folder: Checkpoint folder to write.
            before: Checkpoint to begin with; None = random weights.
            settings: What the rows are and what the model was before, JSON-ready.

        Returns:
            What `run_stage` returns.
        """
        run: Callable[[Stage, Path, Path | None, dict[str, Any]], dict[str, Any]] = getattr(self, f"_{name}")
        stage: Stage = getattr(self.recipe, name)
        own = {"stage": stage.to_dict(), "model": self.recipe.model_fields, "seed": self.seed}
        return run(stage, folder, before, {**settings, **own})

    def _pretrain(self, stage: Stage, folder: Path, _: Path | None, settings: dict[str, Any]) -> dict[str, Any]:
        """Next-token prediction."""
        from ehrseq.modeling.modeling_ehrmamba import EhrMambaForCausalLM

        config = self._config()
        context, splits = config.max_position_embeddings, self.recipe.pretrain_splits
        end = self.recipe.follow_up
        end = end_of_labels(self.rows.dataset.path) if end == FROM_LABELS else end
        windows = self.rows.windows(context, present_splits(self.rows.dataset, splits), end)
        size = rows_to_see(stage, windows)
        return run_stage(
            folder,
            make_model=lambda: EhrMambaForCausalLM(config),
            arguments=lambda steps: stage_arguments(stage, steps, size, self.seed, label_names=["labels"]),
            rows=PackableRows(windows),
            collate=DataCollatorForPackedNextToken(self.rows.tokenizer, context),
            settings={**settings, "splits": list(splits), "end_of_data": end},
            encoder=self.rows.tokenizer,
            report=lambda _: {"windows": len(windows), "rows": size},
            changed="restart",
        )

    def _shared(self, stage: Stage, folder: Path, before: Path | None, settings: dict[str, Any]) -> dict[str, Any]:
        """MPF on histories that hold the prompts of all their labels."""
        context = self.recipe.shared_context or context_of(self.recipe)
        shared = shared_prompts(self._labelled_rows(context), context, self.seed)
        size = rows_to_see(stage, shared)
        return run_stage(
            folder,
            make_model=lambda: self._classifier(before),
            wrap=ClassifierOfPrompts,
            arguments=lambda steps: stage_arguments(stage, steps, size, self.seed),
            rows=shared,
            collate=DataCollatorForSharedPrompts(self.rows.tokenizer),
            settings={**settings, "context": context, "splits": list(self.recipe.finetune_splits)},
            encoder=self.rows.tokenizer,
            report=lambda _: {"histories": len(shared), "labels": shared.num_labels, "rows": size},
            changed="restart",
        )

    def _finetune(self, stage: Stage, folder: Path, before: Path | None, settings: dict[str, Any]) -> dict[str, Any]:
        """MPF on rows of one label, tasks balanced; with `keep: best` the weights that rank the tuning rows best."""
        recipe, context, names = self.recipe, context_of(self.recipe), self.rows.tokenizer.tasks
        train = self._labelled_rows(context)
        sample = balance_rows(
            train.task_ids,
            train.labels,
            names,
            num_rows=rows_to_see(stage, train),
            positive_share=recipe.positive_share,
            seed=self.seed,
        )

        def shifted() -> PreTrainedModel:
            model = self._classifier(before)
            model.config.tasks = sample.store_in(model.config.tasks)  # the scores stay probabilities
            return model

        tuning, callbacks = None, []
        if stage.keep == "best" or stage.arguments.get("eval_strategy", "no") != "no":
            from transformers import EarlyStoppingCallback

            held = limit_rows(self.rows.prompts(self.labels, context, ["tuning"]), recipe.max_rows_per_task, self.seed)
            held = held.subset(held.lengths.argsort(kind="stable"))  # batches of like length: next to no padding
            metrics = ComputeTaskMetrics(names, held.subject_ids, log_odds_shifts=sample.log_odds_shifts)
            tuning = TuningRows(held, metrics, "auroc_mean", larger_is_better=True)
            callbacks = [EarlyStoppingCallback(stage.patience)] if stage.patience and stage.keep == "best" else []
        drawn = train.subset(sample.rows)
        return run_stage(
            folder,
            make_model=shifted,
            arguments=lambda steps: stage_arguments(stage, steps, len(drawn), self.seed),
            rows=PackableRows(drawn),
            collate=DataCollatorForPackedPrompts(self.rows.tokenizer, context),
            settings={
                **settings,
                "positive_share": recipe.positive_share,
                "splits": list(recipe.finetune_splits),
                "max_rows_per_task": recipe.max_rows_per_task,
            },
            encoder=self.rows.tokenizer,
            tuning=tuning,
            callbacks=callbacks,
            report=lambda _: {"available_rows": len(train), "rows": len(drawn)},
            changed="restart",
        )

    def _labelled_rows(self, context: int) -> PromptedDataset:
        """MPF rows of the patients that are finetuned on."""
        splits = present_splits(self.rows.dataset, self.recipe.finetune_splits)
        return self.rows.prompts(self.labels, context, splits)

    def _config(self) -> EhrMambaConfig:
        config: EhrMambaConfig = model_config(self.rows.tokenizer, tasks=self.tasks, **self.recipe.model_fields)
        return config

    def _classifier(self, before: Path | None) -> PreTrainedModel:
        """The classifier that a stage begins with: of a checkpoint, or of random weights."""
        from ehrseq.modeling.modeling_ehrmamba import EhrMambaForSequenceClassification

        if before is None:
            return EhrMambaForSequenceClassification(self._config())
        with quiet_loading():  # the new head is expected
            model: PreTrainedModel = EhrMambaForSequenceClassification.from_pretrained(before, num_labels=2)
        return model


def context_of(recipe: PromptRecipe) -> int:
    """Context length of the recipe's model, the configuration's own where it says nothing."""
    from ehrseq.modeling.configuration_ehrmamba import EhrMambaConfig

    return int(recipe.model.get("max_position_embeddings", EhrMambaConfig().max_position_embeddings))


def rows_to_see(stage: Stage, rows: Any) -> int:
    """How many rows a stage sees: the nearest of its limits, one pass where there is none.

    Args:
        stage: The stage.
        rows: The rows that there are.
    """
    limits = []
    if "max_steps" in stage.arguments:
        limits.append(int(stage.arguments["max_steps"]) * stage.batch_size)
    if stage.epochs is not None:
        limits.append(math.ceil(stage.epochs * len(rows)))
    if stage.rows is not None:
        limits.append(stage.rows)
    if stage.tokens is not None:
        limits.append(math.ceil(stage.tokens / max(1.0, mean_length(rows))))
    return max(1, min(limits, default=len(rows)))


def stage_arguments(stage: Stage, folder: Path, rows: int, seed: int, **options: Any) -> TrainingArguments:
    """Trainer's arguments for so many rows."""
    steps = max(1, rows // stage.batch_size)
    batch = max(1, stage.batch_size // num_processes())
    options |= {
        "per_device_train_batch_size": batch,
        "per_device_eval_batch_size": 2 * batch,
        "learning_rate": stage.learning_rate,
        "weight_decay": stage.weight_decay,
        "max_grad_norm": stage.max_grad_norm,
        "seed": seed,
        "disable_tqdm": None,
    }
    if stage.schedule != "paper":
        warmup = 0 if stage.schedule == "constant" else COSINE_WARMUP_SHARE
        options |= {"lr_scheduler_type": stage.schedule, "warmup_steps": warmup, "lr_scheduler_kwargs": {}}
    if stage.keep == "best":
        every = max(1, steps // EVALUATIONS)
        options |= {"eval_strategy": "steps", "eval_steps": every, "save_steps": every, "load_best_model_at_end": True}
        options |= {"metric_for_best_model": "auroc_mean", "greater_is_better": True}
        options |= {"restore_callback_states_from_checkpoint": True}
    chosen = {name: value for name, value in stage.arguments.items() if name != "max_steps"}  # counted in `rows`
    return resumable_arguments(folder, max_steps=steps, **options | chosen)
