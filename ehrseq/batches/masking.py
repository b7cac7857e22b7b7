"""Batches for masked language modelling (MLM): some events hidden, to be told from what stands before and behind them.

As in BERT (arXiv:1810.04805), 15 % of the events are asked for; of these 80 % become [MASK], 10 % another token, 10 %
stay. Only events are asked for: neither special, interval and task tokens nor static facts. Another token is one of the
same type, because the type's own channel would betray any other.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ehrseq.batches.collation import DataCollatorForNextToken
from ehrseq.batches.packing import DataCollatorForPackedNextToken
from ehrseq.modeling.risk_tasks import IGNORED_LABEL

EVENT_TYPES = (5, 6, 7, 9, 10, 11)
"""Token types that are events: lab, medication, procedure, diagnosis, vital, other."""

MASKED, REPLACED = 0.8, 0.1  # the rest stays as it is


@dataclass
class DataCollatorForMaskedEvents:
    """Pads or packs event sequences, hides some events, and asks for them.

    The draw depends on `seed` and on the rows of the batch and on nothing else: a run that was stopped goes on with the
    masks it would have had, and an evaluation is the same each time. Over epochs the masks differ as the batches do.

    Args:
        tokenizer: Gives the channels, `mask_token_id` and `token_types` (the type of every token id).
        max_length: Tokens of a packed row, for rows that `PackableRows` marked; None: pad all rows.
        pad_to_multiple_of: Round the length up to a multiple of this.
        mlm_probability: Share of the events that are asked for.
        seed: Seed of the draws.

    Raises:
        ValueError: A share outside (0, 1], a tokenizer without [MASK] or without the types of its tokens.
    """

    tokenizer: Any
    max_length: int | None = None
    pad_to_multiple_of: int | None = None
    mlm_probability: float = 0.15
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0.0 < self.mlm_probability <= 1.0:
            raise ValueError(f"mlm_probability={self.mlm_probability}: expected a share above 0 and at most 1.")
        types = getattr(self.tokenizer, "token_types", None)
        if types is None or getattr(self.tokenizer, "mask_token_id", None) is None:
            raise ValueError(
                f"{type(self.tokenizer).__name__} has no token_types or no mask_token_id: give an EhrTokenizer."
            )
        of_type = np.asarray(types)
        # Token ids sorted by type, and where each type begins and how many it has.
        self._by_type = np.argsort(of_type, kind="stable")
        self._sizes = np.bincount(of_type, minlength=max(EVENT_TYPES) + 1)
        self._starts = np.cumsum(self._sizes) - self._sizes
        self._types = of_type
        if self.max_length is None:
            self._collate: Any = DataCollatorForNextToken(self.tokenizer, self.pad_to_multiple_of)
        else:
            self._collate = DataCollatorForPackedNextToken(self.tokenizer, self.max_length, self.pad_to_multiple_of)

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Collate rows into tensors `[b, L]`; `labels` holds the events asked for, -100 elsewhere."""
        batch = self._collate(features)
        ids = batch["input_ids"].numpy()
        hidden, asked = self.mask(ids, batch["attention_mask"].numpy() > 0)
        batch["input_ids"] = torch.from_numpy(hidden)
        batch["labels"] = torch.from_numpy(np.where(asked, ids, IGNORED_LABEL))
        tensors: dict[str, torch.Tensor] = batch
        return tensors

    def mask(self, ids: NDArray[np.int64], real: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Draw the events that are asked for, and hide them.

        Args:
            ids: Token ids, [b, L].
            real: False at padding, [b, L].

        Returns:
            The ids that the model reads, [b, L], and which tokens are asked for, bool [b, L].
        """
        draw = np.random.default_rng([self.seed, zlib.crc32(np.ascontiguousarray(ids).tobytes())])
        types = self._types[ids]
        asked = (draw.random(ids.shape) < self.mlm_probability) & np.isin(types, EVENT_TYPES) & real
        kind = draw.random(ids.shape)
        hidden = np.where(asked & (kind < MASKED), self.tokenizer.mask_token_id, ids)
        replaced = asked & (kind >= MASKED) & (kind < MASKED + REPLACED)
        others = (draw.random(ids.shape) * self._sizes[types]).astype(np.int64)
        hidden[replaced] = self._by_type[self._starts[types] + others][replaced]
        return hidden, asked
