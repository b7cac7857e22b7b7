"""What the example scripts, the demo and the learning benchmark share around the unmodified Hugging Face Trainer.

The recipe is the paper's: AdamW, gradients clipped at norm 1, the learning rate rising linearly over the first tenth
of training from 1 % of its peak and falling linearly back to 1 %. Trainer can do that schedule itself (its
warm-up-stable-decay schedule without a stable phase), so a recipe is a set of `TrainingArguments` and nothing else.
"""

from __future__ import annotations

import gc
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ehrseq.evaluation.trainer_metrics import LABEL_NAMES
from ehrseq.modeling.risk_tasks import IGNORED_LABEL
from ehrseq.work.progress import bars_are_shown

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from ehrseq.modeling.configuration_ehrmamba import EhrMambaConfig

PAPER_WARMUP_SHARE = 0.1
COSINE_WARMUP_SHARE = 0.05
FLOOR = 0.01


def paper_schedule(
    num_training_steps: int, *, warmup_share: float = PAPER_WARMUP_SHARE, floor: float = FLOOR
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
    number: int = max(1, math.ceil(args.num_train_epochs * per_epoch))
    return number


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
    """The newest whole checkpoint of an interrupted run to resume from, None when there is none.

    A run that was killed while it wrote leaves a checkpoint without `trainer_state.json`, which Trainer writes last, or
    with half of it: such a one is passed over.
    """
    numbered = [
        (int(folder.name.rpartition("-")[2]), folder)
        for folder in Path(output_dir).glob("checkpoint-*")
        if folder.name.rpartition("-")[2].isdigit()
    ]
    for _, folder in sorted(numbered, reverse=True):
        try:
            json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        return str(folder)
    return None


def leave_process_group() -> None:
    """Last line of a script that torchrun may start: leave torch.distributed before the interpreter ends.

    Without it, threads of the CPU backend (gloo) that still hold tensors now and then abort a process on its way out
    ("terminate called without an active exception"). To be called where no Trainer or wrapped model is in reach any
    more, that is behind `main()`: if a wrapped model is what frees the group, it waits for such a thread for good.
    Does nothing in a script that runs alone.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        gc.collect()  # models that only a cycle keeps
        torch.distributed.destroy_process_group()


def join_process_group() -> None:
    """First thing of a command that torchrun may start; does nothing in a process that runs alone."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from accelerate import PartialState

        PartialState(cpu=not torch.cuda.is_available())


def is_main_process() -> bool:
    """Whether this is the process that writes: the only one, or the first that torchrun started."""
    return int(os.environ.get("RANK", "0")) == 0


def num_processes() -> int:
    """How many processes train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def device_options() -> dict[str, Any]:
    """What `TrainingArguments` must be told of the devices: several processes on CPUs train together only then."""
    return {"use_cpu": True} if num_processes() > 1 and not torch.cuda.is_available() else {}


def wait_for_all() -> None:
    """Wait until every process has come here; a process that runs alone does not wait."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()


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

    config = EhrMambaConfig(vocab_size=len(tokenizer), tasks=[dict(task) for task in tasks], **sizes)
    config.update_from_tokenizer(tokenizer)
    return config


class ClassifierOfPrompts(nn.Module):
    """A prompted classifier that is trained at all prompts of a history at once (`ehrseq.batches.shared_prompts`).

    It holds the classifier and adds no weights: Trainer trains this, then the classifier is used as always.

    Args:
        classifier: An `EhrMambaForSequenceClassification`.
    """

    accepts_loss_kwargs = False  # the loss is the mean over the labels of a batch

    def __init__(self, classifier: Any) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        segment_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        times: Tensor | None = None,
        ages: Tensor | None = None,
        visit_orders: Tensor | None = None,
        visit_segments: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Mean cross-entropy over the prompts.

        Args:
            input_ids: [b, l], as all channels; see `EhrMambaModel.forward`.
            labels: 0 or 1 at each task token that asks, -100 elsewhere, [b, l].
            segment_ids: 1 .. S, 0 = padding, [b, l].

        Returns:
            `loss` and `logits` [prompts, 2], in the order of the batch.
        """
        states = self.classifier.model(
            input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            times=times,
            ages=ages,
            visit_orders=visit_orders,
            visit_segments=visit_segments,
            segment_ids=segment_ids,
        ).last_hidden_state
        asked = labels != IGNORED_LABEL
        logits = self.classifier.classifier(states[asked]).float()
        weights = self.classifier.config.class_weights
        loss = F.cross_entropy(logits, labels[asked], weight=None if weights is None else logits.new_tensor(weights))
        return {"loss": loss, "logits": logits}


def training_arguments(output_dir: str | Path, *, max_steps: int, **options: Any) -> TrainingArguments:
    """`TrainingArguments` of a short run without checkpoints, with the paper's recipe.

    Args:
        output_dir: Folder that Trainer wants.
        max_steps: Optimiser steps.
        options: Further arguments, which win over the defaults here.

    Returns:
        The arguments. The random state is seeded, so that a model built next depends on the seed alone.
    """
    from transformers import TrainingArguments, set_seed

    defaults: dict[str, Any] = {
        "max_steps": max_steps,
        "weight_decay": 0.01,
        "save_strategy": "no",
        "logging_steps": max(1, max_steps // 20),
        "report_to": [],
        "label_names": list(LABEL_NAMES),
        "dataloader_pin_memory": torch.cuda.is_available(),
        **device_options(),
        **paper_schedule(max_steps),
    }
    args = TrainingArguments(str(output_dir), **(defaults | options))
    set_seed(args.seed)
    return args


def quiet_trainer(**options: Any) -> Any:
    """A Trainer whose progress bar carries the loss, instead of a printed dictionary per logging step.

    All training of the package goes through here: what is to hold for each of it (threads, say) belongs here.
    """
    from transformers import Trainer
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    class LossInBar(ProgressCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if state.is_world_process_zero and self.training_bar is not None and logs and "loss" in logs:
                self.training_bar.set_postfix_str(f"loss {float(logs['loss']):.3f}")

    trainer = Trainer(**options)
    trainer.remove_callback(PrinterCallback)
    if trainer.pop_callback(ProgressCallback) is not None and bars_are_shown():
        trainer.add_callback(LossInBar)
    return trainer
