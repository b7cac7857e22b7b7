"""What the example scripts, the demo and the learning benchmark share around the unmodified Hugging Face Trainer.

The recipe is the paper's: AdamW, gradients clipped at norm 1, the learning rate rising linearly over the first tenth
of training from 1 % of its peak and falling linearly back to 1 %. Trainer can do that schedule itself (its
warm-up-stable-decay schedule without a stable phase), so a recipe is a set of `TrainingArguments` and nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.trainer_utils import get_last_checkpoint

from ehrseq.evaluation.trainer_metrics import LABEL_NAMES

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from ehrseq.modeling.configuration_ehrmamba import EhrMambaConfig

WARMUP_SHARE = 0.1
FLOOR = 0.01


def paper_schedule(
    num_training_steps: int, *, warmup_share: float = WARMUP_SHARE, floor: float = FLOOR
) -> dict[str, Any]:
    """The paper's learning-rate schedule as keyword arguments of `TrainingArguments`.

    Args:
        num_training_steps: Optimiser steps of the whole run; `count_training_steps` tells them before training.
        warmup_share: Share of the steps in which the rate rises from `floor * lr` to `lr`.
        floor: The lowest rate, as a share of the peak; reached again at the end.

    Returns:
        `lr_scheduler_type`, `warmup_steps` and `lr_scheduler_kwargs`.

    Raises:
        ValueError: No steps, or a share outside [0, 1].

    Example:
        ```python
        TrainingArguments("out", max_steps=1000, learning_rate=5e-5, **paper_schedule(1000))
        ```
    """
    if num_training_steps < 1 or not 0 <= warmup_share <= 1 or not 0 <= floor <= 1:
        raise ValueError(
            f"expected num_training_steps >= 1 and shares in [0, 1], got num_training_steps={num_training_steps}, "
            f"warmup_share={warmup_share}, floor={floor}."
        )
    warmup = round(num_training_steps * warmup_share)
    return {
        "lr_scheduler_type": "warmup_stable_decay",
        "warmup_steps": warmup,
        "lr_scheduler_kwargs": {
            "num_decay_steps": num_training_steps - warmup,
            "decay_type": "linear",
            "min_lr_ratio": floor,
        },
    }


def count_training_steps(num_rows: int, args: TrainingArguments) -> int:
    """Optimiser steps that Trainer will make on a dataset of this length.

    Args:
        num_rows: Length of the training dataset.
        args: Batch size, accumulation, processes, epochs and `max_steps` are read from it.

    Returns:
        Number of steps.
    """
    if args.max_steps > 0:
        return args.max_steps
    batches = num_rows / args.train_batch_size
    batches = math.floor(batches) if args.dataloader_drop_last else math.ceil(batches)
    per_process = math.ceil(batches / max(1, args.world_size))
    per_epoch = max(1, math.ceil(per_process / args.gradient_accumulation_steps))
    return max(1, math.ceil(args.num_train_epochs * per_epoch))


def use_paper_recipe(args: TrainingArguments, num_rows: int) -> TrainingArguments:
    """Complete `TrainingArguments` with the paper's recipe, in place.

    The schedule is set unless another `lr_scheduler_type` than the default was asked for; `task_ids` is kept beside
    the labels for metrics per task. AdamW and clipping at 1.0 are Trainer's defaults already.

    Args:
        args: Parsed arguments.
        num_rows: Length of the training dataset.

    Returns:
        The same object.
    """
    if str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)) == "linear":
        from transformers import SchedulerType

        schedule = paper_schedule(count_training_steps(num_rows, args))
        args.lr_scheduler_type = SchedulerType(schedule["lr_scheduler_type"])
        args.lr_scheduler_kwargs = schedule["lr_scheduler_kwargs"]
        # Trainer reads a value below 1 as a share: a run too short for a warm-up has 0 steps of it.
        args.warmup_steps = schedule["warmup_steps"]
    if args.label_names is None:
        args.label_names = list(LABEL_NAMES)
    return args


def last_checkpoint(output_dir: str | Path) -> str | None:
    """The newest checkpoint of an interrupted run to resume from, None when there is none."""
    return get_last_checkpoint(str(output_dir)) if Path(output_dir).is_dir() else None


def model_config(tokenizer: Any, *, tasks: Sequence[Mapping[str, Any]] = (), **sizes: Any) -> EhrMambaConfig:
    """An EhrMamba configuration that fits a tokenizer.

    Args:
        tokenizer: A trained `EhrTokenizer`.
        tasks: `config.tasks` entries (`Task.to_config()`).
        sizes: Further fields, e.g. `hidden_size=64, num_hidden_layers=2, max_position_embeddings=256`.

    Returns:
        The configuration, with what generation needs of the vocabulary.
    """
    from ehrseq.modeling.configuration_ehrmamba import EhrMambaConfig

    return EhrMambaConfig(vocab_size=len(tokenizer), tasks=[dict(task) for task in tasks], **sizes)
