"""One stage of training under a budget of tokens: resumable, and done when its folder has a `result.json`."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ehrseq.hub.checkpoints import quiet_loading
from ehrseq.training.trainer import last_checkpoint, quiet_trainer, training_arguments
from ehrseq.work.files import write_json

RESULT = "result.json"
CHECKPOINTS = 4  # of a stage: at most a fifth of it is lost when it is stopped


def train_for_tokens(
    folder: Path, model: Any, dataset: Any, collator: Any, *, tokens: int, rows: int, rate: float, seed: int
) -> dict[str, Any]:
    """Train for so many tokens; a run that was stopped goes on from its last whole checkpoint.

    Args:
        folder: Trainer's folder; it holds nothing but what there is to resume from.
        model: Model; its weights are trained in place.
        dataset: Rows.
        collator: Data collator.
        tokens: Tokens to see, rounded to whole steps.
        rows: Rows of a step.
        rate: Peak learning rate.
        seed: Seed of order and dropout.

    Returns:
        steps, tokens, seconds, resumed, and the loss at each logged step.
    """
    length = _mean_length(dataset)
    steps = max(1, round(tokens / (rows * length)))
    args = training_arguments(
        folder,
        max_steps=steps,
        per_device_train_batch_size=rows,
        learning_rate=rate,
        seed=seed,
        save_strategy="steps",
        save_steps=max(1, math.ceil(steps / (CHECKPOINTS + 1))),
        save_total_limit=1,
        disable_tqdm=True,
    )
    trainer = quiet_trainer(model=model, args=args, train_dataset=dataset, data_collator=collator)
    start = time.perf_counter()
    resumed = last_checkpoint(folder)
    trainer.train(resume_from_checkpoint=resumed)
    return {
        "steps": steps,
        "tokens": round(steps * rows * length),
        "seconds": time.perf_counter() - start,
        "resumed": resumed is not None,
        "loss": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
    }


def _mean_length(dataset: Any) -> float:
    """Mean tokens of a row; of histories with prompts, which are assembled when asked for, of a few hundred."""
    lengths = getattr(dataset, "lengths", None)
    if lengths is None:
        some = np.linspace(0, len(dataset) - 1, min(len(dataset), 256)).astype(int)
        lengths = [len(dataset[int(row)]["input_ids"]) for row in some]
    return float(np.mean(lengths))


def finish_stage(folder: Path, model: Any, result: Mapping[str, Any]) -> None:
    """Keep the model and, last of all, the result; drop what was there to resume from.

    Args:
        folder: The stage's folder, which holds `trainer`.
        model: The trained model.
        result: What `result.json` shall hold.
    """
    with quiet_loading():
        model.save_pretrained(folder)
    write_json(folder / RESULT, result)
    shutil.rmtree(folder / "trainer", ignore_errors=True)


def read_result(folder: Path) -> dict[str, Any]:
    """The result of a finished stage or cell."""
    return json.loads((folder / RESULT).read_text(encoding="utf-8"))
