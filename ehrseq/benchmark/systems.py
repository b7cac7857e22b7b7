"""The rows of the table: what each system is, how it is pretrained and finetuned, and how large it is.

All neural systems read the same tokens through the same embedding layer (EhrMamba, arXiv:2405.14567, Table 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ehrseq.benchmark.budget import Budget

PAPER_WIDTH = 768


@dataclass(frozen=True)
class System:
    """One row of the table.

    Attributes:
        name: Name on the command line.
        title: Name in the table.
        model_type: `model_type` of its models; "boosting" and "logistic" are no neural ones.
        objective: Pretraining: next token, masked events, or none.
        multitask: One prompted model for all tasks (MPF); else one model a task.
        shared_prompts: Finetuned at all prompts of a history at once before its rows, which causal models can be
            (`ehrseq.batches.shared_prompts`).
        context: Tokens that it reads at most; the budget may allow fewer.
    """

    name: str
    title: str
    model_type: str
    objective: Literal["ntp", "mlm"] | None
    multitask: bool
    shared_prompts: bool = False
    context: int = 2048

    @property
    def neural(self) -> bool:
        """Whether it is a `PreTrainedModel`."""
        return self.model_type not in ("boosting", "logistic")

    def config(self, budget: Budget, tokenizer: Any, tasks: Sequence[dict[str, Any]]) -> Any:
        """The configuration of its model under a budget.

        Args:
            budget: Width, layers, context.
            tokenizer: A trained `EhrTokenizer`.
            tasks: `config.tasks` entries.
        """
        from transformers import AutoConfig

        small = budget.hidden_size < PAPER_WIDTH
        fields: dict[str, Any] = {
            "hidden_size": budget.hidden_size,
            "max_position_embeddings": min(self.context, budget.context),
            **({} if budget.num_layers is None else {"num_hidden_layers": budget.num_layers}),
        }
        if self.model_type == "ehrmamba":
            if small:  # minutes of training are too few for the paper's initialisation, see the demo
                fields |= {"initialization": "history_first", "time_step_min": 0.03, "time_step_max": 0.3}
                fields |= {"state_size": 8, "time_step_rank": max(32, budget.hidden_size // 16)}
        elif self.model_type != "ehr_lstm" and small:
            heads = max(1, budget.hidden_size // 16)
            fields |= {"num_attention_heads": heads, "intermediate_size": 4 * budget.hidden_size}
            # Weights of the size that they have at the paper's width, relative to that width.
            fields |= {"initializer_range": round(0.02 * (PAPER_WIDTH / budget.hidden_size) ** 0.5, 4)}
        if self.model_type == "ehr_bigbird" and small:
            fields |= {"block_size": 16}
        config = AutoConfig.for_model(
            self.model_type, vocab_size=len(tokenizer), tasks=[dict(task) for task in tasks], **fields
        )
        config.update_from_tokenizer(tokenizer)
        return config


SYSTEMS: dict[str, System] = {
    system.name: system
    for system in (
        System("xgboost", "XGBoost on counts", "boosting", None, multitask=False),
        System("logistic", "logistic regression on counts", "logistic", None, multitask=False),
        System("lstm", "bi-LSTM", "ehr_lstm", None, multitask=False),
        System("cehrbert", "CEHR-BERT", "cehrbert", "mlm", multitask=False, context=512),
        System("bigbird", "BigBird", "ehr_bigbird", "mlm", multitask=False),
        System("multibird", "MultiBird", "ehr_bigbird", "mlm", multitask=True),
        System("ehrmamba_single", "EhrMamba, one a task", "ehrmamba", "ntp", multitask=False, shared_prompts=True),
        System("ehrmamba", "EhrMamba (MPF)", "ehrmamba", "ntp", multitask=True, shared_prompts=True),
    )
}
"""Every row of the paper's table, logistic regression, and EhrMamba without multitask prompts, by its name."""

REFERENCE = "ehrmamba"


def choose_systems(names: Sequence[str] | None) -> list[System]:
    """Systems by their names; all of them for None.

    Raises:
        ValueError: An unknown name, or one named twice.
    """
    wanted = list(SYSTEMS) if names is None else list(names)
    unknown = [name for name in wanted if name not in SYSTEMS]
    if unknown or not wanted or len(set(wanted)) != len(wanted):
        raise ValueError(f"models got {wanted}; expected some of {list(SYSTEMS)}, each once.")
    return [SYSTEMS[name] for name in wanted]
