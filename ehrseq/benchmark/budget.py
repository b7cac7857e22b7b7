"""How much each system may compute and try; the same for every row of a table."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from ehrseq.baselines.summary_models import MAX_CONFIGURATIONS

BUDGETS = ("quick", "simulated", "simulated_long", "full")
FOLDER = Path(__file__).parent / "budgets"


@dataclass(frozen=True)
class Budget:
    """One compute budget.

    Attributes:
        name: One of `BUDGETS`, or the name of a file.
        hidden_size: Width of every neural model.
        num_layers: Layers of every neural model; None = each one's own default, the paper's.
        context: Most tokens that a model reads; a model whose own context is shorter keeps that.
        pretrain_tokens: Tokens seen in pretraining. A system without pretraining sees as many more in finetuning.
        finetune_tokens: Tokens seen in finetuning, for each configuration tried. A system with one model a task shares
            them among its tasks.
        batch_rows: Rows (windows, prompted rows) of a step.
        pretrain_rate: Peak learning rate of pretraining.
        finetune_rates: Peak learning rates of finetuning, one configuration each: as many are tried for every row of
            the table, those of the count models are theirs. The one with the best mean AUROC of the tuning patients is
            kept.
        max_rows_per_task: Tuning and test rows of a task that are scored, drawn at random; None = all.
        finetune_splits: Splits whose labels are trained on.
    """

    name: str
    hidden_size: int
    num_layers: int | None
    context: int
    pretrain_tokens: int
    finetune_tokens: int
    batch_rows: int
    pretrain_rate: float
    finetune_rates: tuple[float, ...]
    max_rows_per_task: int | None
    finetune_splits: tuple[str, ...]

    @property
    def num_trials(self) -> int:
        """Configurations that every row of the table tries."""
        return len(self.finetune_rates)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary."""
        return asdict(self) | {
            "finetune_rates": list(self.finetune_rates),
            "finetune_splits": list(self.finetune_splits),
        }

    @classmethod
    def read(cls, budget: str | Path) -> Budget:
        """A budget by its name, or of a YAML file with all its fields.

        Raises:
            ValueError: No such budget, a field that is missing, unknown or out of range.
        """
        known = str(budget) in BUDGETS
        file = FOLDER / f"{budget}.yaml" if known else Path(budget)
        if not file.is_file():
            raise ValueError(f"budget got {str(budget)!r}; expected one of {list(BUDGETS)}, or a YAML file.")
        try:
            content = yaml.safe_load(file.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{file} cannot be read as YAML: {error}") from error
        expected = [field.name for field in fields(cls) if field.name != "name"]
        keys = list(content) if isinstance(content, dict) else []
        if sorted(keys) != sorted(expected):
            lacking, strange = sorted(set(expected) - set(keys)), sorted(set(map(str, keys)) - set(expected))
            raise ValueError(f"{file}: fields missing {lacking}, unknown {strange}; expected {expected}.")
        lists = {name: tuple(content[name]) for name in ("finetune_rates", "finetune_splits") if content[name]}
        made = cls(name=str(budget) if known else file.stem, **{**content, **lists})
        made._check(file)
        return made

    def _check(self, file: Path) -> None:
        whole = {
            "hidden_size": 8,
            "num_layers": 1,
            "context": 16,
            "pretrain_tokens": 1,
            "finetune_tokens": 1,
            "batch_rows": 1,
            "max_rows_per_task": 1,
        }
        for name, least in whole.items():
            value = getattr(self, name)
            if value is None and name in ("num_layers", "max_rows_per_task"):
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{file}: {name} got {value!r}; expected a whole number of at least {least}.")
        rates = [self.pretrain_rate, *(self.finetune_rates or [None])]
        if any(isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 < rate < 1 for rate in rates):
            raise ValueError(f"{file}: learning rates got {rates}; expected numbers between 0 and 1.")
        if self.num_trials > MAX_CONFIGURATIONS:
            raise ValueError(f"{file}: {self.num_trials} finetune_rates; at most {MAX_CONFIGURATIONS} are tried.")
        if not self.finetune_splits or set(self.finetune_splits) - {"pretrain", "train"}:
            raise ValueError(
                f'{file}: finetune_splits got {list(self.finetune_splits or ())}; expected "pretrain", "train" or both.'
            )
