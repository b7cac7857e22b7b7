"""Training HyMaTE on stays: forecasting first, then the outcome, both by the unmodified Hugging Face Trainer.

    recipe = TripletRecipe.read("examples/recipes/hymate_paper.yaml")
    extractor = HyMaTEFeatureExtractor.fit(train)                              # training stays only
    pretrain(recipe, extractor, train, tuning, "runs/forecast", seed=0)
    finetune(recipe, extractor, train, tuning, "runs/outcome", pretrained="runs/forecast", seed=0)
    model = AutoModelForSequenceClassification.from_pretrained("runs/outcome")
    risks = score_stays(model, extractor, test)

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
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import yaml
from numpy.typing import ArrayLike, NDArray

from ehrseq.batches.triplet_collation import DataCollatorForTriplets
from ehrseq.batches.triplet_rows import EpochOfRows, ForecastRows, TripletRows, forecast_baselines
from ehrseq.evaluation import auroc, average_precision
from ehrseq.hub.checkpoints import quiet_loading
from ehrseq.training.trainer import last_checkpoint, quiet_trainer

if TYPE_CHECKING:
    from ehrseq.encode.triplets import TripletTable
    from ehrseq.tokenization.feature_extraction_hymate import HyMaTEFeatureExtractor

logger = logging.getLogger(__name__)

VALIDATION_EPOCHS = 3
"""Fixed forecasting times of every tuning stay: one alone would make the kept epoch a matter of luck."""

SCHEDULES = ("constant", "cosine")
WARMUP_SHARE = 0.05
KEPT = ("best", "last")

RESULT_FILE = "training.json"
_BEGUN_FILE = "begun_with.json"  # beside Trainer's checkpoints


@dataclass(frozen=True)
class Stage:
    """How one stage is trained.

    Attributes:
        epochs: Passes over the training stays at most.
        learning_rate: Of AdamW.
        schedule: "constant", as in STraTS, or "cosine": up over the first twentieth of the steps, then down to 0 at the
            end of all `epochs` [C]; to be used with a patience that lets it get there.
        batch_size: Stays of a step.
        patience: Epochs without progress on the tuning stays before stopping.
        weight_decay: Of AdamW.
        max_grad_norm: Gradients are clipped to this norm.
        keep: "best", the epoch with the best score of the tuning stays, or "last", the weights after all `epochs`
            whatever the tuning stays say: with a schedule that ends at 0, and where they are too few to choose by [C].
    """

    epochs: int = 50
    learning_rate: float = 5e-4
    schedule: str = "constant"
    batch_size: int = 32
    patience: int = 10
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    keep: str = "best"

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule got {self.schedule!r}; expected one of {SCHEDULES}.")
        if self.keep not in KEPT:
            raise ValueError(f"keep got {self.keep!r}; expected one of {KEPT}.")


@dataclass(frozen=True)
class TripletRecipe:
    """One way to train HyMaTE, as a small YAML file says it.

    Attributes:
        name: Its name.
        model: Fields of `HyMaTEConfig`.
        pretrain: The forecasting stage; None = none, the ablation without pretraining.
        finetune: The outcome stage.
        horizons: Ends of the forecast windows, minutes (see `ForecastRows`).
        max_length: Triplets of a stay at most; None = all.
        truncation: Which triplets stay, "recent" or "random".
        variable_dropout: Share of a stay's variables whose triplets are removed in finetuning.
        tuning_share: Share of the stays that are held out to tune on, for `hold_out_stays`.
        weigh_classes: Weigh positives by their rarity (STraTS); the scores stay probabilities, see
            `HyMaTEConfig.class_weights`.
    """

    name: str
    model: Mapping[str, Any] = field(default_factory=dict)
    pretrain: Stage | None = field(default_factory=lambda: Stage(epochs=100))
    finetune: Stage = field(default_factory=Stage)
    horizons: tuple[float, ...] = (120.0,)
    max_length: int | None = None
    truncation: str = "recent"
    variable_dropout: float = 0.2
    tuning_share: float = 0.2
    weigh_classes: bool = True

    @classmethod
    def read(cls, path: str | Path) -> TripletRecipe:
        """Read a recipe from a YAML file.

        A file may say `base: other.yaml`, a recipe beside it, and then only what differs: an ablation is a line.

        Raises:
            ValueError: No such file, a circle of bases, or a key that no recipe has; the message says the file.
        """
        path = Path(path)
        return cls.from_dict({**_read_with_bases(path, ()), "name": path.stem}, where=str(path))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, where: str = "recipe") -> TripletRecipe:
        """Make a recipe of plain values, `to_dict()` back.

        Args:
            values: Fields by name; the stages as dicts.
            where: For messages.

        Raises:
            ValueError: An unknown key.
        """
        stages = {
            name: _checked(Stage, values[name], f"{where}: {name}")
            for name in ("pretrain", "finetune")
            if values.get(name) is not None
        }
        horizons = {"horizons": tuple(values["horizons"])} if "horizons" in values else {}
        return _checked(cls, {**values, **stages, **horizons}, where)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON and YAML."""
        return {**dataclasses.asdict(self), "model": dict(self.model), "horizons": list(self.horizons)}


def _read_with_bases(path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    """What a recipe's file says on top of what its base says; the model and the stages key by key."""
    if not path.is_file():
        raise ValueError(f"no recipe {path}; give a YAML file such as examples/recipes/hymate_paper.yaml.")
    if path.resolve() in above:
        raise ValueError(f"{path} has itself as its base; let one of the files stand on its own.")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds {type(values).__name__}; expected the keys of a recipe.")
    base = values.pop("base", None)
    if base is None:
        return values
    merged = _read_with_bases(path.parent / str(base), (*above, path.resolve()))
    for name, value in values.items():
        inner = merged.get(name)
        merged[name] = {**inner, **value} if isinstance(inner, dict) and isinstance(value, dict) else value
    return merged


def _checked(kind: Any, values: Any, where: str) -> Any:
    known = {entry.name for entry in dataclasses.fields(kind)}
    if not isinstance(values, Mapping) or set(values) - known:
        unknown = sorted(set(values) - known) if isinstance(values, Mapping) else values
        raise ValueError(f"{where} has {unknown}; expected keys out of {sorted(known)}.")
    return kind(**values)


def hold_out_stays(table: TripletTable, share: float = 0.2, seed: int = 0) -> tuple[TripletTable, TripletTable]:
    """Split stays into training and tuning ones, by subject, with as many positives a share in both.

    Args:
        table: Stays with labels.
        share: Share of the tuning stays.
        seed: Seed.

    Returns:
        (training stays, tuning stays).

    Raises:
        ValueError: No labels, or too few stays of a class.
    """
    if table.labels is None:
        raise ValueError("the stays have no labels; build the table with build_triplets(events, spec, labels).")
    subjects = np.unique(table.subject_ids)
    positive = np.zeros(len(subjects), bool)
    np.logical_or.at(positive, np.searchsorted(subjects, table.subject_ids), table.labels > 0)
    rng = np.random.default_rng(seed)
    tuning: list[np.ndarray] = []
    for kind in (False, True):
        own = subjects[positive == kind]
        count = round(share * len(own))
        if not 0 < count < len(own):
            raise ValueError(
                f"{len(own)} {'positive' if kind else 'negative'} subjects cannot be split by {share:g}: expected "
                "some of them on both sides."
            )
        tuning.append(rng.permutation(own)[:count])
    held = np.isin(table.subject_ids, np.concatenate(tuning))
    return table.subset(~held), table.subset(held)


def pretrain(
    recipe: TripletRecipe,
    extractor: HyMaTEFeatureExtractor,
    train: TripletTable,
    tuning: TripletTable,
    folder: str | Path,
    *,
    seed: int = 0,
) -> dict[str, Any]:
    """Forecasting: predict what is measured in the two hours after a random time (HyMaTE, section 3.3.1).

    Args:
        recipe: The recipe; its `pretrain` must be there.
        extractor: Fitted on training stays.
        train: Stays to learn from.
        tuning: Stays that tell when to stop.
        folder: Checkpoint folder to write.
        seed: Of weights, order, dropout and times.

    Returns:
        What `training.json` holds: among others `forecast_mse` of the tuning stays, and `last_value_mse`, what carrying
        the last value forward reaches on the same targets.

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

    def gate() -> dict[str, Any]:
        simple = forecast_baselines(checked)
        return {"last_value_mse": simple["last_value"], "mean_mse": simple["mean"], "targets": simple["targets"]}

    return _run_stage(
        recipe.pretrain,
        make,
        rows,
        checked,
        extractor,
        Path(folder),
        label_names=["labels", "label_mask"],
        metrics=mean_squared_error,
        best=("forecast_mse", False),
        seed=seed,
        about=_about(recipe, extractor, train, tuning),
        extra=gate,
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

    return _run_stage(
        recipe.finetune,
        make,
        rows,
        checked,
        extractor,
        Path(folder),
        label_names=["labels"],
        metrics=ranking,
        best=("auroc_plus_auprc", True),
        seed=seed,
        about={
            **_about(recipe, extractor, train, tuning),
            "pretrained": None if pretrained is None else _begun_with(Path(pretrained)),
            "task": None if task is None else dict(task),
            "auxiliary": {name: _digest(np.asarray(values, np.float64)) for name, values in (auxiliary or {}).items()},
        },
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


def _run_stage(
    stage: Stage,
    make_model: Any,
    rows: Any,
    checked: Any,
    extractor: HyMaTEFeatureExtractor,
    folder: Path,
    *,
    label_names: Sequence[str],
    metrics: Any,
    best: tuple[str, bool],
    seed: int,
    about: Mapping[str, Any],
    extra: Any = None,
) -> dict[str, Any]:
    """Train one stage with early stopping, write checkpoint and `training.json`, remove Trainer's checkpoints."""
    from transformers import EarlyStoppingCallback, TrainingArguments, set_seed

    settings = json.loads(json.dumps({**about, "seed": seed}))
    result_file = folder / RESULT_FILE
    if result_file.is_file():
        done = json.loads(result_file.read_text(encoding="utf-8"))
        _check_same(settings, done["settings"], folder)
        return done
    steps = folder / "steps"
    begun_file = steps / _BEGUN_FILE
    if not len(checked) or not len(rows):
        raise ValueError(f"{len(rows)} training and {len(checked)} tuning rows; expected at least one of each.")
    args = TrainingArguments(
        str(steps),
        num_train_epochs=stage.epochs,
        learning_rate=stage.learning_rate,
        per_device_train_batch_size=stage.batch_size,
        per_device_eval_batch_size=2 * stage.batch_size,
        weight_decay=stage.weight_decay,
        max_grad_norm=stage.max_grad_norm,
        lr_scheduler_type=stage.schedule,
        warmup_steps=0 if stage.schedule == "constant" else WARMUP_SHARE,  # below 1: a share of all steps
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=1,
        load_best_model_at_end=stage.keep == "best",
        metric_for_best_model=best[0],
        greater_is_better=best[1],
        label_names=list(label_names),
        logging_steps=max(1, len(rows) // stage.batch_size),
        report_to=[],
        seed=seed,
        restore_callback_states_from_checkpoint=True,  # a resumed run has as little patience left as it had
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    set_seed(seed)
    model = make_model()
    trainer = quiet_trainer(
        model=model,
        args=args,
        train_dataset=rows,
        eval_dataset=checked,
        data_collator=DataCollatorForTriplets(extractor),
        compute_metrics=metrics,
        callbacks=[EpochOfRows(), *([EarlyStoppingCallback(stage.patience)] if stage.keep == "best" else [])],
    )
    start = time.perf_counter()
    resumed = last_checkpoint(steps)
    if resumed is not None and begun_file.is_file():
        _check_same(settings, json.loads(begun_file.read_text(encoding="utf-8")), folder)
    steps.mkdir(parents=True, exist_ok=True)
    _write_json(begun_file, settings)
    trainer.train(resume_from_checkpoint=resumed)
    reached = {
        key.removeprefix("eval_"): value
        for key, value in trainer.evaluate().items()
        if key not in ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second", "epoch")
    }
    name = f"eval_{best[0]}"
    curve = [entry[name] for entry in trainer.state.log_history if name in entry][:-1]  # the last one is from above
    result = {
        "settings": settings,
        **reached,
        "best_epoch": int(np.argmax(curve) if best[1] else np.argmin(curve)) + 1 if curve else 0,
        "kept": stage.keep,
        "epochs": len(curve),
        "curve": curve,
        "seconds": time.perf_counter() - start,
        "resumed": resumed is not None,
        "unseen_triplets_left_out": rows.dropped,
        **(extra() if extra is not None else {}),
    }
    with quiet_loading():
        model.save_pretrained(folder)
        extractor.save_pretrained(folder)
    _write_json(result_file, result)
    shutil.rmtree(steps)
    return result


def _check_same(settings: Mapping[str, Any], others: Mapping[str, Any], folder: Path) -> None:
    """Raise a ValueError where the stage in a folder was begun with something else."""
    names = sorted(name for name in {*settings, *others} if settings.get(name) != others.get(name))
    if names:
        raise ValueError(
            f"{folder} holds a stage that was trained otherwise: got another {', '.join(names)}. Give another folder, "
            "or remove this one."
        )


def _write_json(file: Path, content: Any) -> None:
    unfinished = file.with_name(f"{file.name}.part")
    unfinished.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    unfinished.replace(file)
