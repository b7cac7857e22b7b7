"""How HyMaTE is trained: the recipe of its two stages, forecasting and the outcome."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from ehrseq.training.recipe import Recipe, Stage, check_number


@dataclass(frozen=True)
class TripletRecipe(Recipe):
    """One way to train HyMaTE; see `Recipe` for what it shares with EhrMamba's.

    Attributes:
        pretrain: The forecasting stage; None = none, the ablation without pretraining.
        finetune: The outcome stage.
        horizons: Ends of the forecast windows, minutes (see `ForecastRows`).
        max_length: Triplets of a stay at most; None = all.
        truncation: Which triplets stay, "recent" or "random".
        variable_dropout: Share of a stay's variables whose triplets are removed in finetuning.
        tuning_share: Share of the stays that are held out to tune on, for `hold_out_stays`; `ehrseq train` has the
            dataset's tuning patients instead.
        weigh_classes: Weigh positives by their rarity (STraTS); the scores stay probabilities, see
            `HyMaTEConfig.class_weights`.
    """

    family: ClassVar[str] = "hymate"

    pretrain: Stage | None = field(default_factory=lambda: Stage(epochs=100))
    horizons: tuple[float, ...] = (120.0,)
    max_length: int | None = None
    truncation: str = "recent"
    variable_dropout: float = 0.2
    tuning_share: float = 0.2
    weigh_classes: bool = True

    def __post_init__(self) -> None:
        for name in self.stage_names:
            stage: Stage | None = getattr(self, name)
            if stage is not None and (stage.epochs is None or stage.rows or stage.tokens):
                raise ValueError(f"{name}: a stage of HyMaTE is counted in epochs; expected no rows or tokens.")
        if self.max_length is not None:
            check_number("max_length", self.max_length, 1, whole=True)
        check_number("variable_dropout", self.variable_dropout, 0)
