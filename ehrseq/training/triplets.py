"""Training HyMaTE on stays: forecasting first, then the outcome, both by the unmodified Hugging Face Trainer.

    recipe = TripletRecipe.read("hymate_paper")                               # or a YAML file
    extractor = HyMaTEFeatureExtractor.fit(train)                              # training stays only
    pretrain(recipe, extractor, train, tuning, "runs/forecast", seed=0)
    finetune(recipe, extractor, train, tuning, "runs/outcome", pretrained="runs/forecast", seed=0)
    model = AutoModelForSequenceClassification.from_pretrained("runs/outcome")
    risks = score_stays(model, extractor, test)

Pretraining ends with the intervals of its forecasts, fitted on the tuning stays (`forecast_calibration`).

A stage writes a checkpoint folder with its extractor, and beside it `training.json`: what it reached, after how many
epochs, in which time. A stage whose `training.json` is there is not run again; one that was stopped resumes from
Trainer's last checkpoint. Both only for what it was begun with: recipe, stays, extractor, pretrained weights, seed.
`tuning` decides when to stop and which epoch is kept; the stays that are reported are no argument of either stage.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from ehrseq.batches.triplet_collation import DataCollatorForTriplets
from ehrseq.batches.triplet_rows import EpochOfRows, ForecastRows, TripletRows, forecast_baselines
from ehrseq.evaluation import auroc, average_precision
from ehrseq.hub.checkpoints import quiet_loading
from ehrseq.training.forecast_calibration import calibrate_stay_forecasts
from ehrseq.training.recipe import Stage
from ehrseq.training.stages import TuningRows, run_stage
from ehrseq.training.trainer import (
    COSINE_WARMUP_SHARE,
    count_training_steps,
    device_options,
    num_processes,
    paper_schedule,
)
from ehrseq.training.triplet_recipe import TripletRecipe

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ehrseq.encode.triplets import TripletTable
    from ehrseq.tokenization.feature_extraction_hymate import HyMaTEFeatureExtractor

logger = logging.getLogger(__name__)

VALIDATION_EPOCHS = 3
"""Fixed forecasting times of every tuning stay: one alone would make the kept epoch a matter of luck."""

RESULT_FILE = "training.json"


def pretrain(
    recipe: TripletRecipe,
    extractor: HyMaTEFeatureExtractor,
    train: TripletTable,
    tuning: TripletTable,
    folder: str | Path,
    *,
    units: Mapping[str, str] | None = None,
    seed: int = 0,
    changed: Literal["refuse", "restart"] = "refuse",
) -> dict[str, Any]:
    """Forecasting: predict what is measured in the two hours after a random time (HyMaTE, section 3.3.1).

    Args:
        recipe: The recipe; its `pretrain` must be there.
        extractor: Fitted on training stays.
        train: Stays to learn from.
        tuning: Stays that tell when to stop, and how far forecasts are off.
        folder: Checkpoint folder to write.
        units: Unit of each variable (`ehrseq.encode.triplets.variable_units`), for who reads the forecasts.
        seed: Of weights, order, dropout and times.
        changed: A stage in the folder that was begun with something else is an error, or is begun anew.

    Returns:
        What `training.json` holds: among others `forecast_mse` of the tuning stays, and `last_value_mse`, what carrying
        the last value forward reaches on the same targets, and how many variables have `intervals`, by alpha.

    Raises:
        ValueError: The recipe has no such stage, or stays that fit it.
    """
    from ehrseq.modeling.configuration_hymate import HyMaTEConfig
    from ehrseq.modeling.modeling_hymate import HyMaTEForPreTraining

    if recipe.pretrain is None:
        raise ValueError(f"the recipe {recipe.name!r} has no pretraining; finetune at once, without pretrained=.")
    options: dict[str, Any] = {"horizons": recipe.horizons, "max_length": recipe.max_length, "seed": seed}
    rows = ForecastRows(train, extractor, **options)
    checked = ForecastRows(tuning, extractor, epochs=VALIDATION_EPOCHS, **options)

    def make() -> Any:
        return HyMaTEForPreTraining(HyMaTEConfig(**_sizes(recipe, extractor)))

    def mean_squared_error(prediction: Any) -> dict[str, float]:
        labels, mask = (part.reshape(len(part), -1) for part in prediction.label_ids)
        errors = (prediction.predictions.reshape(labels.shape) - labels)[mask > 0]
        return {"forecast_mse": float(np.mean(errors.astype(np.float64) ** 2))}

    def gate(model: Any) -> dict[str, Any]:
        simple = forecast_baselines(checked)
        calibration = calibrate_stay_forecasts(
            model,
            extractor,
            tuning,
            train,
            horizons=recipe.horizons,
            max_length=recipe.max_length,
            units=units,
            seed=seed,
        )
        # Of variables that a stay has measured before.
        intervals = {str(alpha): int((~np.isnan(calibration.at(alpha)[1])).sum()) for alpha in calibration.alphas}
        told = {"last_value_mse": simple["last_value"], "mean_mse": simple["mean"], "targets": simple["targets"]}
        return {**told, "intervals": intervals}

    return _train(
        recipe.pretrain,
        make,
        rows,
        TuningRows(checked, mean_squared_error, "forecast_mse", larger_is_better=False),
        extractor,
        Path(folder),
        label_names=["labels", "label_mask"],
        seed=seed,
        about={**_about(recipe, extractor, train, tuning), **({} if units is None else {"units": dict(units)})},
        report=gate,
        changed=changed,
    )


def finetune(
    recipe: TripletRecipe,
    extractor: HyMaTEFeatureExtractor,
    train: TripletTable,
    tuning: TripletTable,
    folder: str | Path,
    *,
    pretrained: str | Path | None = None,
    task: Mapping[str, Any] | None = None,
    auxiliary: Mapping[str, ArrayLike] | None = None,
    seed: int = 0,
    changed: Literal["refuse", "restart"] = "refuse",
) -> dict[str, Any]:
    """The outcome: binary cross-entropy, the epoch with the best AUROC + AUPRC of the tuning stays kept (STraTS).

    Args:
        recipe: The recipe.
        extractor: Fitted on training stays.
        train: Stays with labels to learn from.
        tuning: Stays with labels that tell when to stop.
        folder: Checkpoint folder to write.
        pretrained: Checkpoint of `pretrain`; None starts from random weights.
        task: Entry of `config.tasks`: name, horizon, definition, positive_label.
        auxiliary: Further outcomes to learn beside it, name -> values of the training stays `[s]`, NaN = unknown.
        seed: Of new weights, order, dropout and variable dropout.
        changed: As of `pretrain`.

    Returns:
        What `training.json` holds: `auroc` and `auprc` of the tuning stays among others.

    Raises:
        ValueError: Stays without labels, or with one class only, or a `pretrained` that reads other triplets.
    """
    from ehrseq.modeling.configuration_hymate import HyMaTEConfig
    from ehrseq.modeling.modeling_hymate import HyMaTEForSequenceClassification

    for name, table in (("train", train), ("tuning", tuning)):
        counts = np.bincount(table.labels, minlength=2) if table.labels is not None else np.zeros(2, int)
        if counts.min() == 0:
            raise ValueError(f"{name} holds {counts[1]} positive and {counts[0]} negative stays; expected both.")
    outcomes = _auxiliary_outcomes(auxiliary or {})
    targets = np.stack([np.asarray(values, np.float64) for values in auxiliary.values()], axis=1) if auxiliary else None
    if pretrained is not None:
        _check_pretrained(Path(pretrained), extractor)
    rows = TripletRows(
        train,
        extractor,
        max_length=recipe.max_length,
        truncation=recipe.truncation,
        variable_dropout=recipe.variable_dropout,
        auxiliary_targets=targets,
        seed=seed,
    )
    checked = TripletRows(tuning, extractor, max_length=recipe.max_length)

    def make() -> Any:
        heads: dict[str, Any] = {
            "num_labels": 2,
            "tasks": [dict(task)] if task is not None else [{"name": "outcome", "positive_label": "outcome"}],
            "auxiliary_outcomes": outcomes or None,
        }
        if recipe.weigh_classes:
            negatives, positives = np.bincount(rows.labels, minlength=2)
            heads["class_weights"] = [1.0, float(negatives / positives)]
        config = HyMaTEConfig(**{**_sizes(recipe, extractor), **heads})
        if pretrained is None:
            return HyMaTEForSequenceClassification(config)
        with quiet_loading():  # the new head is expected
            return HyMaTEForSequenceClassification.from_pretrained(pretrained, config=config)

    def ranking(prediction: Any) -> dict[str, float]:
        logits = prediction.predictions
        scores = (logits[:, 1] - logits[:, 0]).astype(np.float64)
        labels = prediction.label_ids
        values = {"auroc": auroc(labels, scores), "auprc": average_precision(labels, scores)}
        return {**values, "auroc_plus_auprc": values["auroc"] + values["auprc"]}

    return _train(
        recipe.finetune,
        make,
        rows,
        TuningRows(checked, ranking, "auroc_plus_auprc", larger_is_better=True),
        extractor,
        Path(folder),
        label_names=["labels"],
        seed=seed,
        about={
            **_about(recipe, extractor, train, tuning),
            "pretrained": None if pretrained is None else _begun_with(Path(pretrained)),
            "task": None if task is None else dict(task),
            "auxiliary": {name: _digest(np.asarray(values, np.float64)) for name, values in (auxiliary or {}).items()},
        },
        report=lambda _: {},
        changed=changed,
    )


def _sizes(recipe: TripletRecipe, extractor: HyMaTEFeatureExtractor) -> dict[str, Any]:
    """Fields of the config that the data decide, under those of the recipe.

    Raises:
        ValueError: The recipe has a field that no config has (transformers would keep it without a word).
    """
    from ehrseq.modeling.configuration_hymate import HyMaTEConfig

    unknown = sorted(set(recipe.model) - {entry.name for entry in dataclasses.fields(HyMaTEConfig)})
    if unknown:
        raise ValueError(f"model of the recipe {recipe.name!r} has {unknown}; expected fields of HyMaTEConfig.")
    # What reads the checkpoint cuts stays where training did.
    context = {} if recipe.max_length is None else {"max_position_embeddings": recipe.max_length}
    return {
        **context,
        "num_variables": extractor.num_variables,
        "num_static": len(extractor.static_columns),
        "num_horizons": len(recipe.horizons),
        **recipe.model,
    }


def _about(
    recipe: TripletRecipe, extractor: HyMaTEFeatureExtractor, train: TripletTable, tuning: TripletTable
) -> dict[str, Any]:
    """What a stage is trained with: another of these is another stage."""
    return {
        "recipe": recipe.to_dict(),
        "stays": len(train),
        "tuning_stays": len(tuning),
        "digests": {
            "extractor": _digest_of_extractor(extractor),
            **{name: _digest_of_stays(table) for name, table in (("train", train), ("tuning", tuning))},
        },
    }


def _digest_of_extractor(extractor: HyMaTEFeatureExtractor) -> str:
    """Of what it makes of a stay; saving adds fields that say nothing of that."""
    numbers = {name: value for name, value in extractor.to_dict().items() if name.startswith(("value_", "static_"))}
    return hashlib.sha256(json.dumps([extractor.triplets, numbers], sort_keys=True).encode()).hexdigest()[:16]


def _digest_of_stays(table: TripletTable) -> str:
    arrays = (table.subject_ids, table.offsets, table.minutes, table.variable_ids, table.values, table.static)
    return _digest(*arrays, *(() if table.labels is None else (table.labels,)))


def _digest(*arrays: NDArray[Any]) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:16]


def _begun_with(folder: Path) -> Any:
    """How the stage in a folder was trained, wherever the folder lies; its name where it is no stage of ours."""
    file = folder / RESULT_FILE
    return json.loads(file.read_text(encoding="utf-8"))["settings"] if file.is_file() else str(folder)


def _check_pretrained(folder: Path, extractor: HyMaTEFeatureExtractor) -> None:
    """Raise a ValueError where the pretrained weights know the variables by other ids.

    Other means and deviations are no error: they may have been fitted again, for other patients.
    """
    from ehrseq.tokenization.feature_extraction_hymate import HyMaTEFeatureExtractor

    if not (folder / "preprocessor_config.json").is_file():
        return
    theirs = HyMaTEFeatureExtractor.from_pretrained(folder)
    if (theirs.variables, theirs.static_columns) != (extractor.variables, extractor.static_columns):
        raise ValueError(
            f"{folder} was pretrained on other triplets: {theirs.num_variables} variables {theirs.variables[:5]} ..., "
            f"expected the extractor's {extractor.num_variables}, {extractor.variables[:5]} ..., in the same order and "
            "with the same static columns. Pretrain with this extractor, or finetune with that one."
        )


def _auxiliary_outcomes(auxiliary: Mapping[str, ArrayLike]) -> list[dict[str, Any]]:
    outcomes = []
    for name, values in auxiliary.items():
        known = np.asarray(values, np.float64)
        known = known[~np.isnan(known)]
        if not len(known):
            raise ValueError(f"the auxiliary outcome {name!r} is unknown of every training stay; leave it out.")
        outcomes.append({"name": name, "mean": float(known.mean()), "std": float(known.std()) or 1.0})
    return outcomes


def _train(
    stage: Stage,
    make_model: Callable[[], PreTrainedModel],
    rows: TripletRows | ForecastRows,
    tuning: TuningRows,
    extractor: HyMaTEFeatureExtractor,
    folder: Path,
    *,
    label_names: list[str],
    seed: int,
    about: Mapping[str, Any],
    report: Callable[[Any], dict[str, Any]],
    changed: Literal["refuse", "restart"],
) -> dict[str, Any]:
    """Run a stage that is evaluated after each epoch and, where the best one is kept, stops early."""
    from transformers import EarlyStoppingCallback, TrainingArguments

    batch = max(1, stage.batch_size // num_processes())

    def arguments(steps: Path) -> TrainingArguments:
        constant = stage.schedule == "constant"
        options: dict[str, Any] = {
            "num_train_epochs": stage.epochs,
            "learning_rate": stage.learning_rate,
            "per_device_train_batch_size": batch,
            "per_device_eval_batch_size": 2 * batch,
            "weight_decay": stage.weight_decay,
            "max_grad_norm": stage.max_grad_norm,
            "lr_scheduler_type": stage.schedule,
            "warmup_steps": 0 if constant else COSINE_WARMUP_SHARE,  # below 1: a share of all steps
            "eval_strategy": "epoch",
            "save_strategy": "epoch",
            "save_total_limit": 1,
            "load_best_model_at_end": stage.keep == "best",
            "metric_for_best_model": tuning.best,
            "greater_is_better": tuning.larger_is_better,
            "label_names": label_names,
            "logging_steps": max(1, len(rows) // stage.batch_size),
            "report_to": [],
            "seed": seed,
            "restore_callback_states_from_checkpoint": True,  # a resumed run has as little patience left as it had
            "dataloader_pin_memory": torch.cuda.is_available(),
            **device_options(),
        }
        if stage.schedule == "paper":
            args = TrainingArguments(str(steps), **options | {"lr_scheduler_type": "linear"})
            options |= paper_schedule(count_training_steps(len(rows), args))
        return TrainingArguments(str(steps), **{**options, **stage.arguments})

    return run_stage(
        folder,
        make_model=make_model,
        arguments=arguments,
        rows=rows,
        collate=DataCollatorForTriplets(extractor),
        settings={**about, "seed": seed},
        encoder=extractor,
        tuning=tuning,
        callbacks=[EpochOfRows(), *([EarlyStoppingCallback(stage.patience)] if stage.keep == "best" else [])],
        report=lambda model: {"kept": stage.keep, "unseen_triplets_left_out": rows.dropped, **report(model)},
        result_file=RESULT_FILE,
        changed=changed,
    )
