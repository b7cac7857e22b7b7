"""A stage of training that resumes: a folder with a checkpoint, which is done when its result is there.

    result = run_stage(
        Path("runs/forecast"),
        make_model=lambda: EhrMambaForCausalLM(config),
        arguments=lambda folder: resumable_arguments(folder, max_steps=1000, learning_rate=3e-3),
        rows=PackableRows(windows),
        collate=DataCollatorForPackedNextToken(tokenizer, 256),
        settings={"rows": digest, "learning_rate": 3e-3},
        encoder=tokenizer,
    )

A stage whose result file is there is not run again. One that was stopped goes on from Trainer's last whole checkpoint,
which lies below `steps/`, and ends with the weights of an undisturbed run. Both only for what it was begun with, its
`settings`. Several processes (`torchrun`) may run a stage together; the first of them writes.
"""

from __future__ import annotations

import errno
import json
import logging
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from torch import Tensor, nn
from torch.utils.data import Dataset

from ehrseq.hub.checkpoints import Savable, quiet_loading
from ehrseq.training.trainer import is_main_process, last_checkpoint, quiet_trainer, training_arguments, wait_for_all
from ehrseq.work.files import remove, write_json

if TYPE_CHECKING:
    from transformers import EvalPrediction, PreTrainedModel, TrainerCallback, TrainingArguments

logger = logging.getLogger(__name__)

RESULT = "result.json"
CHECKPOINTS = 4  # of a stage: at most a fifth of it is lost when it is stopped
_STEPS = "steps"
_BEGUN = "begun_with.json"  # beside Trainer's checkpoints
_FULL = (errno.ENOSPC, errno.EDQUOT)

Rows = Dataset[dict[str, Any]]
Collate = Callable[[list[dict[str, Any]]], Mapping[str, Tensor]]


@dataclass(frozen=True)
class TuningRows:
    """The rows that say which weights of a stage are kept.

    Attributes:
        rows: Rows, which the stage does not learn from.
        metrics: What Trainer calls `compute_metrics`.
        best: Name of the metric that decides.
        larger_is_better: Whether more of it is better.
    """

    rows: Rows
    metrics: Callable[[EvalPrediction], dict[str, float]]
    best: str
    larger_is_better: bool


def run_stage(
    folder: Path,
    *,
    make_model: Callable[[], PreTrainedModel],
    arguments: Callable[[Path], TrainingArguments],
    rows: Rows,
    collate: Collate,
    settings: Mapping[str, Any],
    encoder: Savable | None = None,
    wrap: Callable[[PreTrainedModel], nn.Module] | None = None,
    tuning: TuningRows | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    report: Callable[[PreTrainedModel], Mapping[str, Any]] | None = None,
    result_file: str = RESULT,
    changed: Literal["refuse", "restart"] = "refuse",
) -> dict[str, Any]:
    """Train one stage, unless that is done; write checkpoint and result, remove Trainer's checkpoints.

    Args:
        folder: Folder of the checkpoint.
        make_model: Makes the model that is trained and saved; the random state is seeded before.
        arguments: Trainer's arguments for a folder of its own; they say the seed, and when it saves and evaluates.
        rows: Training rows.
        collate: Makes a batch of rows.
        settings: What the stage is trained with, JSON-ready: with another value it is another stage.
        encoder: Tokenizer or feature extractor to save beside the model.
        wrap: Makes of the model what Trainer trains.
        tuning: Rows to evaluate on; None = no evaluation.
        callbacks: Of Trainer.
        report: What the result shall say of the trained model beside what it says anyway.
        result_file: Name of the result's file.
        changed: A stage in the folder that was begun with other settings is an error, or is begun anew.

    Returns:
        The result: settings, steps, seconds, resumed, the loss at each logged step and, with tuning rows, what the kept
        weights reach on them (`metrics`), best_epoch, epochs and the curve of the deciding metric.

    Raises:
        ValueError: The folder holds a stage that was trained otherwise, or there are no rows.
        OSError: The disk is full; what was saved before is kept.
    """
    from transformers import set_seed

    settings = json.loads(json.dumps(settings))
    file, steps = folder / result_file, folder / _STEPS
    previous = _settings_before(file, steps / _BEGUN)
    wait_for_all()  # nobody writes before everybody has read
    if previous is not None and previous != settings:
        if changed == "refuse":
            raise ValueError(_what_differs(settings, previous, folder))
        logger.info(f"{folder.name}: begun with other settings before, it begins anew.")
        if is_main_process():
            remove(folder)
        wait_for_all()
    if file.is_file():
        return _read(file)
    if not len(rows) or (tuning is not None and not len(tuning.rows)):  # type: ignore[arg-type]
        held = 0 if tuning is None else len(tuning.rows)  # type: ignore[arg-type]
        raise ValueError(f"{len(rows)} training and {held} tuning rows; expected at least one of each.")  # type: ignore[arg-type]
    args = arguments(steps)
    set_seed(args.seed)
    model = make_model()
    with disk_errors():
        trainer = quiet_trainer(
            model=model if wrap is None else wrap(model),
            args=args,
            train_dataset=rows,
            eval_dataset=None if tuning is None else tuning.rows,
            data_collator=collate,
            compute_metrics=None if tuning is None else tuning.metrics,
            callbacks=list(callbacks),
        )
        start = time.perf_counter()
        resumed = last_checkpoint(steps)
        if is_main_process():
            write_json(steps / _BEGUN, settings)
        wait_for_all()
        trainer.train(resume_from_checkpoint=resumed)
        result = {
            "settings": settings,
            "steps": trainer.state.global_step,
            "training_loss": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
            **({} if tuning is None else _reached(trainer, tuning)),
            "seconds": time.perf_counter() - start,
            "resumed": resumed is not None,
            **({} if report is None else report(model)),
        }
        if is_main_process():
            with quiet_loading():
                model.save_pretrained(folder)
                if encoder is not None:
                    encoder.save_pretrained(folder)
            write_json(file, result)
            shutil.rmtree(steps, ignore_errors=True)
        wait_for_all()
    return _read(file)


def read_result(folder: Path) -> dict[str, Any]:
    """The result of a finished stage or cell."""
    return _read(folder / RESULT)


def resumable_arguments(folder: str | Path, *, max_steps: int, **options: Any) -> TrainingArguments:
    """`training_arguments` that keep a checkpoint now and then, and show no bar."""
    saving = {"save_strategy": "steps", "save_steps": max(1, math.ceil(max_steps / (CHECKPOINTS + 1)))}
    defaults = {**saving, "save_total_limit": 1, "disable_tqdm": True}
    return training_arguments(folder, max_steps=max_steps, **defaults | options)


def train_for_tokens(
    folder: Path,
    make_model: Callable[[], PreTrainedModel],
    rows: Rows,
    collate: Collate,
    *,
    tokens: int,
    batch_size: int,
    rate: float,
    seed: int,
    wrap: Callable[[PreTrainedModel], nn.Module] | None = None,
    encoder: Savable | None = None,
    report: Callable[[PreTrainedModel], Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """A stage of so many tokens, as comparisons have them.

    Args:
        folder: As of `run_stage`, as are `make_model`, `collate`, `wrap`, `encoder` and `report`.
        make_model: See above.
        rows: Training rows.
        collate: See above.
        tokens: Tokens to see, rounded to whole steps.
        batch_size: Rows of a step.
        rate: Peak learning rate.
        seed: Seed of weights, order and dropout.
        wrap: See above.
        encoder: See above.
        report: See above.

    Returns:
        What `run_stage` returns, and `tokens`, those that were seen.
    """
    length = mean_length(rows)
    steps = max(1, round(tokens / (batch_size * length)))
    seen = {"tokens": round(steps * batch_size * length)}
    options = {"per_device_train_batch_size": batch_size, "learning_rate": rate, "seed": seed}
    return run_stage(
        folder,
        make_model=make_model,
        arguments=lambda steps_folder: resumable_arguments(steps_folder, max_steps=steps, **options),
        rows=rows,
        collate=collate,
        settings={"tokens": tokens, "batch_size": batch_size, "rate": rate, "seed": seed, "rows": len(rows)},  # type: ignore[arg-type]
        encoder=encoder,
        wrap=wrap,
        report=lambda model: seen | dict(report(model) if report is not None else {}),
    )


def mean_length(rows: Any) -> float:
    """Mean tokens of a row; of histories with prompts, which are assembled when asked for, of a few hundred."""
    lengths = getattr(rows, "lengths", None)
    if lengths is None:
        some = np.linspace(0, len(rows) - 1, min(len(rows), 256)).astype(int)
        lengths = [len(rows[int(row)]["input_ids"]) for row in some]
    return float(np.mean(lengths))


@contextmanager
def disk_errors() -> Iterator[None]:
    """Say that the disk is full in one line, whichever library met it."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        full = getattr(error, "errno", None) in _FULL or "No space left" in str(error)
        # torch.save says no more than that it could not write.
        if not full and not any(words in str(error) for words in ("PytorchStreamWriter failed", "unexpected pos")):
            raise
        raise OSError(
            errno.ENOSPC,
            "the disk is full. What is finished is kept: make room, and run the same command again to go on",
        ) from error


def _reached(trainer: Any, tuning: TuningRows) -> dict[str, Any]:
    """What the kept weights reach on the tuning rows, and the way there."""
    left_out = ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second", "epoch")
    reached = trainer.evaluate()
    name = f"eval_{tuning.best}"
    curve = [entry[name] for entry in trainer.state.log_history if name in entry][:-1]  # the last one is from above
    best = -1 if not curve else np.argmax(curve) if tuning.larger_is_better else np.argmin(curve)
    return {
        **{key.removeprefix("eval_"): value for key, value in reached.items() if key not in left_out},
        "best_epoch": int(best) + 1,
        "epochs": len(curve),
        "curve": curve,
    }


def _settings_before(result: Path, begun: Path) -> Any:
    """What a finished or stopped stage was begun with; None where nobody knows, or there is none."""
    if result.is_file():
        return _read(result).get("settings")
    return _read(begun) if begun.is_file() and last_checkpoint(begun.parent) is not None else None


def _what_differs(settings: Mapping[str, Any], previous: Mapping[str, Any], folder: Path) -> str:
    names = sorted(name for name in {*settings, *previous} if settings.get(name) != previous.get(name))
    return (
        f"{folder} holds a stage that was trained otherwise: got another {', '.join(names)}. Give another folder, or "
        "remove this one."
    )


def _read(file: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return values
