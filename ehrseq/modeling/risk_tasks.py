"""What turns the logits of a classifier into risks: the tasks in the config, and what training did to the log-odds.

Class weights and balancing samplers teach a classifier another prevalence than that of the patients. The shift of the
log-odds that this causes is known, stays in the config, and is taken back in one place, `RiskScoresMixin.log_odds`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from .risk_prefixes import check_prefixes, whole_prefix_logits

if TYPE_CHECKING:
    from transformers import PreTrainedModel as _ModelBase
else:
    _ModelBase = object

IGNORED_LABEL = -100
"""Target that the cross-entropy leaves out."""


class RiskConfigMixin:
    """Base of configurations with the fields `tasks`, `class_weights` and `num_labels`."""

    if TYPE_CHECKING:
        tasks: list[dict[str, Any]] | None
        class_weights: list[float] | None

    def check_tasks(self) -> None:
        """Raise a ValueError for class weights or tasks that no risk could be computed from."""
        if self.class_weights is not None and min(self.class_weights, default=0.0) <= 0.0:
            raise ValueError(f"class_weights={self.class_weights}: expected positive weights.")
        for task in self.tasks or []:
            if not isinstance(task.get("name"), str):
                raise ValueError(
                    f"tasks: {task!r} has no 'name'; expected dicts with name, token, horizon, definition, "
                    "positive_label."
                )
            shift = task.get("log_odds_shift", 0.0)
            if not isinstance(shift, int | float) or not math.isfinite(shift):
                raise ValueError(f"tasks: log_odds_shift={shift!r} of {task['name']!r}: expected a finite number.")

    def check_number_of_class_weights(self, num_labels: int | None) -> None:
        """Raise a ValueError unless there is one class weight for each label (or none at all)."""
        if self.class_weights is not None and len(self.class_weights) != num_labels:
            raise ValueError(
                f"class_weights has {len(self.class_weights)} values for num_labels={num_labels}: give one weight "
                "a class, or None."
            )

    @property
    def class_weight_log_odds_shift(self) -> float:
        """Shift of the log-odds of class 1 that `class_weights` causes: log(w[1] / w[0]), 0.0 without weights."""
        if self.class_weights is None or len(self.class_weights) != 2:
            return 0.0
        return math.log(self.class_weights[1] / self.class_weights[0])

    def log_odds_shifts(self) -> list[float]:
        """Total shift of the log-odds of class 1 by task, of sampling and class weights together."""
        weights_shift = self.class_weight_log_odds_shift
        return [float(task.get("log_odds_shift", 0.0)) + weights_shift for task in self.tasks or []]


class RiskScoresMixin(_ModelBase):
    """Base of classifiers whose class 1 is the positive outcome and whose config is a `RiskConfigMixin`."""

    def risk_scores(self, logits: Tensor, task_ids: Tensor | None = None) -> Tensor:
        """P(positive) of each row: the sigmoid of `log_odds`, whose arguments it has.

        Returns:
            Probabilities, [b] or [b, S].
        """
        return torch.sigmoid(self.log_odds(logits, task_ids))

    def log_odds(self, logits: Tensor, task_ids: Tensor | None = None) -> Tensor:
        """Log-odds of each row's risk: the one place where training's shift of the log-odds is taken back.

        Args:
            logits: [b, 2], or [b, S, 2] for packed rows.
            task_ids: Index of each row's task in `config.tasks`, [b] or [b, S] (negative = padding). May be left out
                where all tasks have the same shift.

        Returns:
            Log-odds of class 1, [b] or [b, S], at least float32.

        Raises:
            ValueError: not two classes, a task id outside `config.tasks`, or no task ids though the tasks' shifts
                differ.
        """
        if logits.shape[-1] != 2:
            raise ValueError(f"risk_scores: got {logits.shape[-1]} classes, expected logits of two: [..., 2].")
        config = cast(RiskConfigMixin, self.config)
        shifts = config.log_odds_shifts() or [config.class_weight_log_odds_shift]
        dtype = torch.promote_types(logits.dtype, torch.float32)
        table = torch.tensor(shifts, dtype=dtype, device=logits.device)
        log_odds = logits[..., 1].to(dtype) - logits[..., 0].to(dtype)
        if task_ids is None:
            if len(set(shifts)) > 1:
                raise ValueError(
                    "risk_scores: the tasks of this model have different log-odds shifts: give task_ids, the index "
                    f"of each row's task in {[task['name'] for task in config.tasks or []]}."
                )
            return log_odds - table[0]
        task_ids = torch.as_tensor(task_ids, dtype=torch.int64, device=logits.device)
        if task_ids.shape != log_odds.shape:
            raise ValueError(f"risk_scores: task_ids {list(task_ids.shape)} do not match rows {list(log_odds.shape)}.")
        if config.tasks and task_ids.numel() and int(task_ids.max()) >= len(config.tasks):
            raise ValueError(f"risk_scores: task id {int(task_ids.max())}, but config.tasks has {len(config.tasks)}.")
        return log_odds - table[task_ids.clamp(min=0, max=len(shifts) - 1)]

    def prefix_logits(
        self, inputs: Mapping[str, Tensor], ends: Tensor, tails: Mapping[str, Tensor], tail_lengths: Tensor
    ) -> Tensor:
        """Logits after each of some prefixes of one row: its first tokens, and a question behind them.

        Here each prefix is a row of its own, several in a pass: k prefixes cost k rows of their length. EhrMamba has
        one pass for all.

        Args:
            inputs: Channels of the row, [1, l], unpadded, and what belongs to it as a whole (`static_values`).
            ends: First tokens (triplets) that each prefix keeps, [k], ascending.
            tails: Channel -> [k, 2], what follows them; none where nothing does.
            tail_lengths: How much of the two that is, [k].

        Returns:
            [k, classes], at least float32, without gradients.

        Raises:
            ValueError: These are no prefixes of one row.
        """
        check_prefixes(inputs, ends, tails, tail_lengths)
        return whole_prefix_logits(self, inputs, ends, tails, tail_lengths)


__all__ = ["IGNORED_LABEL", "RiskConfigMixin", "RiskScoresMixin"]
