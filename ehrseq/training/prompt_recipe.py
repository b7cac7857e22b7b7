"""How EhrMamba is trained: next-token prediction, then multitask prompted finetuning (MPF) in two forms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import date
from typing import Any, ClassVar

from ehrseq.tasks.timeline import as_instant
from ehrseq.training.recipe import Recipe, Stage, check_number

_DEFAULTS: dict[str, Any] = {"epochs": None, "schedule": "paper", "patience": 0, "keep": "last"}
SPLITS = ("pretrain", "train")
FROM_LABELS = "labels"


@dataclass(frozen=True)
class PromptRecipe(Recipe):
    """One way to train EhrMamba; see `Recipe` for what it shares with HyMaTE's.

    Stages see as many rows as the nearest of their limits (epochs, rows, tokens) allows; without one, a single epoch.

    Attributes:
        pretrain: Next-token prediction; None = none.
        shared: MPF on histories that hold the prompts of all their labels (`ehrseq.batches.shared_prompts`); None =
            none. Its keys are a stage's.
        finetune: MPF on rows of one label, tasks balanced.
        shared_context: Context length of the shared histories; None = the model's.
        positive_share: Share of positives to draw in finetuning; None keeps each task's prevalence.
        pretrain_splits: Splits whose patients are pretrained on; the tokenizer is fitted on pretrain and train.
        finetune_splits: Splits whose labels are learnt; those with nobody in them are passed over.
        max_rows_per_task: Tuning and held-out rows of a task that are scored, drawn at random; None = all.
        time_head: Whether pretraining learns the time between events as well, in bins of `DEFAULT_TIME_EDGES` where
            the model names none (`time_edges`).
        follow_up: End of the data for pretraining, which then learns from the silence after a patient's last visit
            (`ehrseq.encode.follow_up`): "labels" = as the labels were made, or ISO 8601 text. None = unknown, as where
            dates are shifted patient by patient.
    """

    family: ClassVar[str] = "ehrmamba"
    stage_names: ClassVar[tuple[str, ...]] = ("pretrain", "shared", "finetune")
    stage_defaults: ClassVar[Mapping[str, Any]] = _DEFAULTS

    finetune: Stage = field(default_factory=lambda: Stage(**_DEFAULTS))
    shared: Stage | None = None
    shared_context: int | None = None
    positive_share: float | None = None
    pretrain_splits: tuple[str, ...] = SPLITS
    finetune_splits: tuple[str, ...] = ("train",)
    max_rows_per_task: int | None = None
    time_head: bool = False
    follow_up: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.time_head, bool):
            raise ValueError(f"time_head got {self.time_head!r}; expected true or false.")
        if self.follow_up not in (None, FROM_LABELS):
            if isinstance(self.follow_up, date):  # YAML reads 2020-12-31 as one
                object.__setattr__(self, "follow_up", self.follow_up.isoformat())
            if not isinstance(self.follow_up, str):
                raise ValueError(
                    f"follow_up got {self.follow_up!r}; expected {FROM_LABELS}, or a date such as 2024-12-31."
                )
            as_instant(self.follow_up)
        for name in ("shared_context", "max_rows_per_task"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), 1, whole=True)
        for name in ("pretrain_splits", "finetune_splits"):
            splits: tuple[str, ...] = getattr(self, name)
            if not splits or isinstance(splits, str) or set(splits) - set(SPLITS):
                raise ValueError(f"{name} got {splits!r}; expected some of {list(SPLITS)}.")

    @property
    def model_fields(self) -> dict[str, Any]:
        """Fields of the configuration, with the edges of a time head."""
        from ehrseq.modeling.ehr_time_head import DEFAULT_TIME_EDGES  # here, since it brings torch

        default = {"time_edges": list(DEFAULT_TIME_EDGES)} if self.time_head else {}
        return {**default, **self.model}
