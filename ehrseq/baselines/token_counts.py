"""What XGBoost and logistic regression read in EhrMamba's table: how often each token stands in the record.

The counts are those of all tokens up to the prediction time, however long ago (no context length), without special and
interval tokens; static facts and the ages at the first and at the last event stand beside them (paper:
arXiv:2405.14567, section 4.2).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from ehrseq.encode.rows import PromptedDataset

AGE_COLUMNS = ("age at the first event", "age at the last event")
TOKENS_AT_ONCE = 8_000_000  # what is unrolled at once: bounds the memory for any number of rows
TYPES_OF_NO_EVENT = (0, 1, 2, 3, 4, 8)
"""Token types that are no facts about the patient: padding, [CLS] and task tokens, [VS], [VE], intervals, [REG]."""


def count_tokens(dataset: PromptedDataset) -> tuple[sparse.csr_matrix, list[str]]:
    """Token counts and ages of every row.

    Args:
        dataset: Rows; what each may know ends at its prediction time.

    Returns:
        float32 `[n, tokens + 2]`, and the columns' names. Ages are in years, 0 where none is known.
    """
    histories, index = dataset.in_memory()
    tokens = sorted(histories.vocabulary.token_ids, key=histories.vocabulary.token_ids.__getitem__)
    history, lengths = np.asarray(index.history), np.asarray(index.end, np.int64)
    parts = [
        _count(histories, history[rows], lengths[rows], len(tokens))
        for rows in np.split(np.arange(len(lengths)), _cuts(lengths))
    ]
    return sparse.csr_matrix(sparse.vstack(parts, format="csr")), [*tokens, *AGE_COLUMNS]


def _cuts(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where to cut the rows, so that each part unrolls about `TOKENS_AT_ONCE` tokens."""
    part = np.cumsum(lengths) // TOKENS_AT_ONCE
    return np.flatnonzero(np.diff(part)) + 1


def _count(
    histories: Any, history: NDArray[np.int64], lengths: NDArray[np.int64], num_tokens: int
) -> sparse.csr_matrix:
    """Counts and ages of some rows."""
    # 1. Every token that each row may know, and the statics of its patient.
    rows, places = _unroll(histories.offsets[history], lengths)
    facts = ~np.isin(histories.types[places], TYPES_OF_NO_EVENT)
    of_static = histories.static_offsets
    static_rows, static_places = _unroll(of_static[history], of_static[history + 1] - of_static[history])
    where = np.concatenate([rows[facts], static_rows])
    what = np.concatenate([histories.ids[places[facts]], histories.static_ids[static_places]]).astype(np.int64)
    ones = np.ones(len(where), np.float32)
    counts = sparse.coo_matrix((ones, (where, what)), shape=(len(history), num_tokens)).tocsr()  # adds them up

    # 2. Ages. Of values assigned to one place the last one stays; from behind, the first one.
    ages = np.asarray(histories.ages[places], np.float32)
    known = np.flatnonzero(ages > 0)
    columns = np.zeros((len(history), 2), np.float32)
    columns[rows[known[::-1]], 0] = ages[known[::-1]]
    columns[rows[known], 1] = ages[known]
    return sparse.hstack([counts, sparse.csr_matrix(columns)], format="csr")


def _unroll(starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Number of the row and place of each token of rows that begin at `starts`."""
    rows = np.repeat(np.arange(len(starts)), lengths)
    within = np.arange(len(rows)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    return rows, np.repeat(starts, lengths) + within


__all__ = ["AGE_COLUMNS", "count_tokens"]
