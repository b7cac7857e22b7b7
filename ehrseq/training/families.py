"""What `ehrseq train` does for each family of models: its stages, and the scores of other patients."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import polars as pl

from ehrseq.batches.balance import limit_rows
from ehrseq.batches.scoring import score_rows, score_stays
from ehrseq.data.dataset import EventDataset
from ehrseq.data.metadata import read_settings
from ehrseq.hub.checkpoints import load_checkpoint
from ehrseq.training.prompt_recipe import SPLITS, PromptRecipe
from ehrseq.training.recipe import Recipe
from ehrseq.training.triplet_recipe import TripletRecipe
from ehrseq.work.parts import settings_key

if TYPE_CHECKING:
    from ehrseq.encode.triplets import TripletTable


Say = Callable[[str], object]

PROMPT_STAGES = {
    "pretrain": "Next-token prediction",
    "shared": "Multitask prompted finetuning, all prompts of a history at once",
    "finetune": "Multitask prompted finetuning, row by row",
}


@dataclass(frozen=True)
class TrainingData:
    """What a run learns from.

    Attributes:
        dataset: Folder of a prepared dataset.
        tasks: `config.tasks` entries of the tasks that are learnt.
        labels: Their label tables.
        settings: What identifies dataset and labels, JSON-ready.
    """

    dataset: Path
    tasks: list[dict[str, Any]]
    labels: dict[str, pl.DataFrame]
    settings: Mapping[str, Any]

    @property
    def names(self) -> list[str]:
        """Names of the tasks."""
        return [str(task["name"]) for task in self.tasks]


class FamilyTraining(Protocol):
    """A run of one family. Its stages are in a folder each, and what is done is not done again."""

    def train(self, say: Say) -> dict[str, dict[str, Any]]:
        """Run the stages; the result of each by its name, the last one's folder is the checkpoint."""
        ...

    @property
    def checkpoint(self) -> Path:
        """Folder of the last stage."""
        ...

    @property
    def pretrained(self) -> Path | None:
        """Folder of the stage whose model forecasts; None where there is none."""
        ...

    def score(self, split: str) -> pl.DataFrame:
        """task, subject_id, prediction_time, boolean_value, score of the labels of a split's patients."""
        ...

    def coverage(self) -> Mapping[str, Any] | None:
        """How much of the held-out events the tokenizer knows; None where that is no question."""
        ...


class PromptTraining:
    """EhrMamba: next-token prediction, MPF on shared histories, MPF on rows.

    Args:
        recipe: The recipe.
        data: What is learnt from.
        folder: Folder of the stages.
        seed: Seed of all of them.
    """

    def __init__(self, recipe: PromptRecipe, data: TrainingData, folder: Path, seed: int) -> None:
        from ehrseq.training.prompts import context_of, load_rows

        self.recipe, self.data, self.folder, self.seed = recipe, data, folder, seed
        self.context = context_of(recipe)
        # By what it was fitted on and for: a run that goes on after another split or with other tasks fits its own.
        key = settings_key([data.settings, data.tasks, self.context])
        self.rows = load_rows(data.dataset, folder / f"tokenizer-{key}", data.tasks, self.context)

    @property
    def checkpoint(self) -> Path:
        """Folder of the last stage."""
        return self.folder / "finetune"

    @property
    def pretrained(self) -> Path | None:
        """Folder of the first stage, a model that forecasts."""
        return None if self.recipe.pretrain is None else self.folder / "pretrain"

    def train(self, say: Say) -> dict[str, dict[str, Any]]:
        """Run the stages."""
        from ehrseq.training.prompts import PromptStages

        source = "the encoded files" if self.rows.encoded is not None else "the patients of pretrain and train"
        say(f"Tokenizer of {source}: {len(self.rows.tokenizer):,} tokens, {len(self.rows.tokenizer.tasks)} tasks")
        stages = PromptStages(self.recipe, self.rows, self.data.tasks, self.data.labels, self.seed)
        results: dict[str, dict[str, Any]] = {}
        settings: dict[str, Any] = {**self.data.settings, "tasks": self.data.names, "context": self.context}
        before: Path | None = None
        for name in self.recipe.stage_names:
            if getattr(self.recipe, name) is None:
                continue
            say(PROMPT_STAGES[name])
            results[name] = stages.run(name, self.folder / name, before, settings)
            say(_in_words(results[name]))
            before = self.folder / name
            settings = {**settings, "begun_with": results[name]["settings"]}
        return results

    def score(self, split: str) -> pl.DataFrame:
        """Scores of the labels of a split's patients, at most `max_rows_per_task` of each task."""
        rows = self.rows.prompts(self.data.labels, self.context, [split])
        rows = limit_rows(rows, self.recipe.max_rows_per_task, self.seed)
        model = load_checkpoint(self.checkpoint).model
        names = np.asarray(self.rows.tokenizer.tasks, dtype=object)
        return scored_rows(
            names[rows.task_ids].tolist(),
            rows.subject_ids,
            rows.prediction_times,
            rows.labels,
            score_rows(model, self.rows.tokenizer, rows),
        )

    def coverage(self) -> Mapping[str, Any] | None:
        """How much of the held-out events the tokenizer knows; not counted for a dataset in encoded files."""
        if self.rows.encoded is not None:
            return None
        return dict(self.rows.tokenizer.coverage(self.rows.dataset.events("held_out")))


class TripletTraining:
    """HyMaTE: forecasting, then the outcome, on stays of the PhysioNet challenge 2012's kind.

    Args:
        recipe: The recipe.
        data: What is learnt from, with one task.
        folder: Folder of the stages.
        seed: Seed of both.
    """

    def __init__(self, recipe: TripletRecipe, data: TrainingData, folder: Path, seed: int) -> None:
        from ehrseq.encode.triplets import PHYSIONET2012, variable_units
        from ehrseq.tokenization.feature_extraction_hymate import HyMaTEFeatureExtractor

        if len(data.tasks) != 1:
            raise ValueError(
                f"HyMaTE answers one question, and {data.dataset} has labels of {data.names}: name one, as in "
                f"--set 'tasks=[{data.names[0]}]'."
            )
        self.recipe, self.data, self.folder, self.seed = recipe, data, folder, seed
        self.stays = {part: self._stays(part) for part in ("train", "tuning")}
        self.units = variable_units(self._events("train"), PHYSIONET2012)
        rules = read_settings(data.dataset).rules
        self.extractor = HyMaTEFeatureExtractor.fit(self.stays["train"], code_map=rules)

    @property
    def checkpoint(self) -> Path:
        """Folder of the last stage."""
        return self.folder / "finetune"

    @property
    def pretrained(self) -> Path | None:
        """Folder of the first stage, a model that forecasts."""
        return None if self.recipe.pretrain is None else self.folder / "pretrain"

    def train(self, say: Say) -> dict[str, dict[str, Any]]:
        """Run both stages."""
        from ehrseq.training.triplets import finetune, pretrain

        stays, results = (self.stays["train"], self.stays["tuning"]), {}
        pretrained = None
        if self.recipe.pretrain is not None:
            say(f"Forecasting, {len(stays[0]):,} stays")
            pretrained = self.folder / "pretrain"
            results["pretrain"] = pretrain(
                self.recipe, self.extractor, *stays, pretrained, units=self.units, seed=self.seed, changed="restart"
            )
            say(_in_words(results["pretrain"]))
        say(f"The outcome, {len(stays[0]):,} stays")
        results["finetune"] = finetune(
            self.recipe,
            self.extractor,
            *stays,
            self.checkpoint,
            pretrained=pretrained,
            task=self.data.tasks[0],
            seed=self.seed,
            changed="restart",
        )
        say(_in_words(results["finetune"]))
        return results

    def score(self, split: str) -> pl.DataFrame:
        """Scores of a split's stays."""
        table = self._stays(split)
        model = load_checkpoint(self.checkpoint).model
        scores = score_stays(model, self.extractor, table, max_length=self.recipe.max_length)
        labels: Any = table.labels
        task = [self.data.names[0]] * len(table)
        return scored_rows(task, table.subject_ids, table.prediction_times, labels, scores)

    def coverage(self) -> Mapping[str, Any] | None:
        """None: what the extractor does not know is counted where it is left out."""
        return None

    def _stays(self, part: str) -> TripletTable:
        from ehrseq.encode.triplets import PHYSIONET2012, build_triplets

        return build_triplets(self._events(part), PHYSIONET2012, self.data.labels[self.data.names[0]])

    def _events(self, part: str) -> pl.DataFrame:
        from ehrseq.training.prompts import present_splits

        dataset = EventDataset(self.data.dataset)
        return dataset.events(present_splits(dataset, SPLITS if part == "train" else [part]))


def family_training(recipe: Recipe, data: TrainingData, folder: Path, seed: int) -> FamilyTraining:
    """The run of a recipe's family."""
    if isinstance(recipe, PromptRecipe):
        return PromptTraining(recipe, data, folder, seed)
    if isinstance(recipe, TripletRecipe):
        return TripletTraining(recipe, data, folder, seed)
    raise ValueError(f"recipe got {type(recipe).__name__}; expected a PromptRecipe or a TripletRecipe.")


def finetune_splits(recipe: Recipe) -> tuple[str, ...]:
    """Splits whose labels a recipe learns from."""
    return recipe.finetune_splits if isinstance(recipe, PromptRecipe) else SPLITS


def scored_rows(tasks: Sequence[str], subjects: Any, times: Any, labels: Any, scores: Any) -> pl.DataFrame:
    """The table of scores that `ehrseq.evaluation.files` reads, sorted."""
    return pl.DataFrame(
        {
            "task": pl.Series(tasks, dtype=pl.String),
            "subject_id": pl.Series(subjects, dtype=pl.Int64),
            "prediction_time": pl.Series(np.asarray(times).astype("datetime64[us]"), dtype=pl.Datetime("us")),
            "boolean_value": pl.Series(np.asarray(labels) == 1, dtype=pl.Boolean),
            "score": pl.Series(scores, dtype=pl.Float64),
        }
    ).sort("task", "subject_id", "prediction_time", maintain_order=True)


def _in_words(result: Mapping[str, Any]) -> str:
    """One line about a finished stage."""
    parts = [f"{result['steps']:,} steps in {result['seconds']:.0f} s"]
    if result["training_loss"]:
        parts.append(f"loss {result['training_loss'][0]:.3f} -> {result['training_loss'][-1]:.3f}")
    parts += [f"{name} {result[name]:.3f}" for name in ("forecast_mse", "last_value_mse", "auroc") if name in result]
    return "  " + ", ".join(parts) + (", resumed" if result["resumed"] else "")
