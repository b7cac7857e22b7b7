"""Many rows at once, as Arrow columns: what `EncodedHistories.row` makes of one."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from ehrseq.data.tables import in_threads
from ehrseq.tokenization.ehr_codes import WEEK_US, YEAR_US
from ehrseq.tokenization.ehr_plans import PromptIndex, RowPlan
from ehrseq.tokenization.ehr_rows import NO_TIME, OTHER_SEGMENT
from ehrseq.tokenization.ehr_vocabulary import TYPE_CLS, TYPE_REG, TYPE_STATIC, TYPE_VE, TYPE_VS, VE, VS

if TYPE_CHECKING:
    from ehrseq.tokenization.ehr_histories import EncodedHistories

STORED_DTYPES: dict[str, Any] = {
    "input_ids": np.int32,
    "attention_mask": np.int8,
    "token_type_ids": np.int8,
    "times": np.float32,
    "ages": np.float32,
    "visit_orders": np.int32,
    "visit_segments": np.int8,
}
"""Types of the channels in tables: 19 bytes a token, where a model's tensors take 48."""
_CHUNK_TOKENS = 600_000  # tokens assembled at once: bounds the index arrays


def prompt_table(histories: EncodedHistories, index: PromptIndex, max_length: int | None = None) -> pa.Table:
    """The rows of an index as a table, see `EhrTokenizer.encode_table`."""
    columns = {
        "subject_id": pa.array(histories.subject_ids[index.history], pa.int64()),
        "prediction_time": pa.array(index.prediction_time, pa.int64()).cast(pa.timestamp("us")),
        "task": pa.DictionaryArray.from_arrays(
            pa.array(index.task, pa.int32()), pa.array(histories.task_names, pa.string())
        ),
        "label": pa.array(index.label.astype(bool)),
    }
    return pa.table(columns | channel_columns(assemble_all(histories, histories.plan_prompts(index, max_length))))


def assemble_all(histories: EncodedHistories, plan: RowPlan) -> list[tuple[dict[str, np.ndarray], np.ndarray]]:
    """Channels of all rows in parts: end to end, in the types of `STORED_DTYPES`, and offsets [rows + 1]."""
    tokens = np.cumsum(plan.end - plan.start)
    cuts = np.unique(np.searchsorted(tokens, np.arange(0, int(tokens[-1]) if len(tokens) else 0, _CHUNK_TOKENS)))
    cuts = np.unique(np.concatenate([[0], cuts, [len(tokens)]])).tolist()
    parts = [(plan.subset(slice(start, stop)),) for start, stop in pairwise(cuts)]
    return in_threads(lambda part: assemble(histories, part), parts or [(plan,)], "Writing rows")


def assemble(histories: EncodedHistories, plan: RowPlan) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Channels of many rows end to end, and the offsets [rows + 1]."""
    span = plan.end - plan.start
    head = 1 + plan.statics
    needs_vs = plan.vs_at >= 0
    lengths = head + needs_vs + span + plan.tail
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    first = offsets[:-1]
    total = int(offsets[-1])
    out = {name: np.zeros(total, dtype) for name, dtype in STORED_DTYPES.items()}
    out["attention_mask"][:] = 1
    # 1. Head: [CLS] or the task, then static tokens.
    out["input_ids"][first], out["token_type_ids"][first] = plan.first_id, TYPE_CLS
    source, target = _ranges(histories.static_offsets[plan.history], plan.statics), _ranges(first + 1, plan.statics)
    out["input_ids"][target], out["token_type_ids"][target] = histories.static_ids[source], TYPE_STATIC
    # 2. Body, and the [VS] of a visit that was cut.
    at = first + head + needs_vs
    source, target = _ranges(histories.offsets[plan.history] + plan.start, span), _ranges(at, span)
    out["input_ids"][target], out["token_type_ids"][target] = histories.ids[source], histories.types[source]
    out["times"][target], out["ages"][target] = histories.times[source], histories.ages[source]
    orders, segments = histories.orders[source], histories.segments[source]
    if plan.shift.any():
        orders -= np.repeat(plan.shift.astype(np.int32), span)
        odd = np.repeat(plan.shift % 2 == 1, span)
        segments = np.where(odd, OTHER_SEGMENT[segments], segments)
    np.minimum(orders, histories.max_num_visits - 1, out=orders)
    out["visit_orders"][target], out["visit_segments"][target] = orders, segments
    put, taken = at[needs_vs] - 1, plan.vs_at[needs_vs]
    out["input_ids"][put], out["token_type_ids"][put] = histories.vocabulary.token_ids[VS], TYPE_VS
    out["times"][put], out["ages"][put] = histories.times[taken], histories.ages[taken]
    out["visit_orders"][put], out["visit_segments"][put] = 1, 1
    # 3. Tail: [VE] of a closed visit, then [REG] or the task.
    order = np.where(plan.order > 0, plan.order - plan.shift, 0)
    segment = np.where(order > 0, 1 + (order - 1) % 2, 0)
    for back, rows, token, token_type, instant in (
        (2, plan.tail == 2, np.full(len(order), histories.vocabulary.token_ids[VE]), TYPE_VE, plan.close_time),
        (1, plan.tail > 0, plan.last_id, TYPE_REG, plan.last_time),
    ):
        place = offsets[1:][rows] - back
        history = plan.history[rows]
        out["input_ids"][place] = token[rows]
        out["token_type_ids"][place] = token_type
        out["times"][place] = (instant[rows] - histories.first[history]) / WEEK_US
        out["ages"][place] = _ages(instant[rows], histories.birth[history])
        out["visit_orders"][place] = np.minimum(order[rows], histories.max_num_visits - 1)
        out["visit_segments"][place] = segment[rows]
    # Where nothing timed is known, there is no clock to tell the time by.
    nothing = offsets[1:][(plan.tail > 0) & (plan.order == 0)] - 1
    out["times"][nothing] = 0
    return out, offsets


def channel_columns(parts: list[tuple[dict[str, np.ndarray], np.ndarray]]) -> dict[str, Any]:
    """Parts of rows, as `assemble` gives them, as one Arrow list column a channel."""
    return {
        name: pa.chunked_array(
            [
                pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), pa.array(channels[name]))
                for channels, offsets in parts
            ]
        )
        for name in STORED_DTYPES
    }


def _ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """start, start + 1 ... of every row, end to end."""
    lengths = np.asarray(lengths, np.int64)
    total = int(lengths.sum())
    first = np.cumsum(lengths) - lengths
    array: np.ndarray = np.arange(total) + np.repeat(np.asarray(starts, np.int64) - first, lengths)
    return array


def _ages(instant: np.ndarray, birth: np.ndarray) -> np.ndarray:
    years = np.maximum(0.0, (instant - np.where(birth == NO_TIME, instant, birth)) / YEAR_US)
    return np.where(birth == NO_TIME, 0.0, years)
