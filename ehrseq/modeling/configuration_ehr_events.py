"""What the configurations of all models over a patient's events share: vocabulary, embedding layer, tasks."""

# No `from __future__ import annotations` here: `strict` leaves fields unchecked whose type is a string.
from itertools import pairwise
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from .hub_mixin import EhrConfigMixin, is_remote_code
from .risk_tasks import RiskConfigMixin

# Length of an interval token's gap in days, by the token's text: the middle of the interval that the token stands for.
# [W_k] covers 7k .. 7k+6 days, [M_k] 30k .. 30k+29 days (but [M_0] only 28 and 29, since shorter gaps are weeks), [LT]
# more than a year.
INTERVAL_DAYS: dict[str, float] = {
    **{f"[W_{k}]": 7.0 * k + 3.5 for k in range(4)},
    "[M_0]": 29.0,
    **{f"[M_{k}]": 30.0 * k + 15.0 for k in range(1, 13)},
    "[LT]": 547.0,
}


@strict
class EhrEventConfig(RiskConfigMixin, EhrConfigMixin, PreTrainedConfig):
    r"""Base of the configurations of models that read `EhrTokenizer`'s channels through EhrMamba's embedding layer.

    Args:
        vocab_size: Number of token ids. Paper: about 10,000 on MIMIC-IV.
        hidden_size: Width of the model (d).
        max_position_embeddings: Context length in tokens that the model is meant for.

        time_embeddings_size: Size of each of the two time embeddings, of the time difference and of the age (k).
        type_vocab_size: Number of token types (0 PAD, 1 CLS, 2 VS, 3 VE, 4 interval, 5 lab, 6 medication, 7 procedure,
            8 REG, 9 diagnosis, 10 vital, 11 other, 12 static). The paper stops at 8.
        max_num_visits: Visit orders 0 .. max_num_visits - 1; tokenizers clamp to it.
        visit_segment_size: Visit segments: 0 none, then 1 and 2 in turn.
        hidden_dropout_prob: Dropout after the embeddings.
        layer_norm_eps: Epsilon of the embedding LayerNorm.
        initializer_range: Standard deviation of embeddings and heads at initialisation.

        classifier_dropout: Dropout in the classification head.
        class_weights: Weight of each class in the cross-entropy of the classifier, or None. Weighting shifts the
            log-odds by log(w[1] / w[0]); `risk_scores` subtracts that shift too, so it does not belong in
            `log_odds_shift`.
        tasks: One dict a task, in the order of `task_ids`: "name", "token", "horizon", "definition", "positive_label"
            and "log_odds_shift", the shift of the log-odds that a balancing sampler caused (0.0 when absent).

        token_type_runs: Types of all token ids, run-length encoded as [first id, type] pairs with rising ids; None
            when unknown.
        special_token_ids: Ids of [VS], [VE], [REG] and of the interval tokens, by their text; None when unknown.
        pad_token_id, bos_token_id, eos_token_id: As in every transformers model. The paper has no end token.
        tie_word_embeddings: Must stay False, heads have their own weights.
    """

    # Where a folder lacks its tokenizer, AutoTokenizer asks this class, which says what is missing; it knows the name
    # only where the package has registered it.
    tokenizer_class = None if is_remote_code() else "EhrTokenizer"

    # Size
    vocab_size: int = 10_000
    hidden_size: int = 768
    max_position_embeddings: int = 2048

    # EHR embedding layer (EhrMamba, section 3)
    time_embeddings_size: int = 32
    type_vocab_size: int = 13
    max_num_visits: int = 512
    visit_segment_size: int = 3
    hidden_dropout_prob: float = 0.1
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.1

    # Classification
    classifier_dropout: float = 0.1
    class_weights: list[float] | None = None
    tasks: list[dict[str, Any]] | None = None

    # What is known of the vocabulary
    token_type_runs: list[list[int]] | None = None
    special_token_ids: dict[str, int] | None = None

    # transformers
    pad_token_id: int | None = 0
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        self.tasks = [] if self.tasks is None else [dict(task) for task in self.tasks]
        self._check_values()
        super().__post_init__(**kwargs)
        self.check_number_of_class_weights(self.num_labels)

    def _check_values(self) -> None:
        """Raise a ValueError for the first field whose value no model could be built from."""
        self.check_positive(
            "vocab_size hidden_size max_position_embeddings time_embeddings_size type_vocab_size max_num_visits "
            "visit_segment_size"
        )
        self.check_probabilities("hidden_dropout_prob classifier_dropout")
        if self.tie_word_embeddings:
            raise ValueError(
                f"tie_word_embeddings=True: the heads of {self.model_type} models have their own weights; leave it "
                "False."
            )
        if self.pad_token_id is not None and not 0 <= self.pad_token_id < self.vocab_size:
            raise ValueError(
                f"pad_token_id={self.pad_token_id}: expected an id below vocab_size={self.vocab_size}, or None."
            )
        self.check_tasks()
        runs = self.token_type_runs
        if runs is not None and (
            not runs
            or any(len(run) != 2 for run in runs)
            or runs[0][0] != 0
            or any(a[0] >= b[0] for a, b in pairwise(runs))
        ):
            raise ValueError(
                "token_type_runs: expected [first id, type] pairs, the first one at id 0, with rising ids."
            )

    def check_positive(self, names: str) -> None:
        """Raise a ValueError for the first of these fields that is below 1."""
        for name in names.split():
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected an integer of at least 1.")

    def check_probabilities(self, names: str) -> None:
        """Raise a ValueError for the first of these fields that is no probability below 1."""
        for name in names.split():
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name}={getattr(self, name)}: expected a probability in [0, 1).")

    def update_from_tokenizer(self, tokenizer: Any) -> None:
        """Take over what a model must know of its vocabulary: its size, the padding id, and what `generate` needs.

        Call it before the model is built (or resize the embeddings afterwards). `tasks` are not touched.

        Args:
            tokenizer: An `EhrTokenizer`, or any tokenizer whose `token_types` lists the type of every token id.

        Raises:
            ValueError: The tokenizer does not know its tokens' types, or lacks [VS] or [VE].
        """
        types = getattr(tokenizer, "token_types", None)
        if types is None:
            raise ValueError(
                f"{type(tokenizer).__name__} has no token_types (the type of every token id): give the EhrTokenizer of "
                "this model. A tokenizer loaded without ehrseq imported comes back as a plain one."
            )
        vocabulary = tokenizer.get_vocab()
        missing = [token for token in ("[VS]", "[VE]") if token not in vocabulary]
        if missing:
            raise ValueError(f"The tokenizer has no {' and no '.join(missing)}: it is no EhrTokenizer's vocabulary.")
        self.vocab_size = len(types)
        self.pad_token_id = tokenizer.pad_token_id
        self.set_token_types([int(kind) for kind in types])
        names = ["[VS]", "[VE]", "[REG]", *INTERVAL_DAYS]
        self.special_token_ids = {name: int(vocabulary[name]) for name in names if name in vocabulary}

    def token_types(self) -> list[int] | None:
        """Type of every token id, length vocab_size, or None when unknown."""
        if self.token_type_runs is None:
            return None
        ends = [run[0] for run in self.token_type_runs[1:]] + [self.vocab_size]
        types = [kind for (first, kind), end in zip(self.token_type_runs, ends, strict=True) for _ in range(first, end)]
        return types[: self.vocab_size]

    def set_token_types(self, types: list[int]) -> None:
        """Store the type of every token id (run-length encoded).

        Raises:
            ValueError: as many types as ids are needed, each below type_vocab_size.
        """
        if len(types) != self.vocab_size:
            raise ValueError(
                f"set_token_types: got {len(types)} types for vocab_size={self.vocab_size}; give one type for each id."
            )
        if min(types) < 0 or max(types) >= self.type_vocab_size:
            raise ValueError(
                f"set_token_types: types run from {min(types)} to {max(types)}, expected 0 .. "
                f"{self.type_vocab_size - 1}."
            )
        self.token_type_runs = [[i, int(kind)] for i, kind in enumerate(types) if i == 0 or kind != types[i - 1]]


__all__ = ["INTERVAL_DAYS", "EhrEventConfig"]
