"""From events to vectors: which rows a model reads, and how its hidden states become one vector each.

A vector is made of the record up to its time and nothing later: a row is cut from the encoded history as a prompt is.
A visit's vector is that of the record as it stood when the visit ended. EhrMamba reads from left to right, so that one
row serves all visits of a patient: what stands before a token does not know what follows. The others read the record
anew for each visit.

Glossary: b rows of a batch, l length (tokens or triplets), d size of a vector.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import Tensor

from ehrseq.batches.collation import pad_channels
from ehrseq.batches.readable_stays import STAY_REASONS, readable_stays
from ehrseq.batches.triplet_collation import DataCollatorForTriplets
from ehrseq.batches.triplet_rows import TripletRows
from ehrseq.data.schema import LABEL_KEYS
from ehrseq.encode.labels import rows_until
from ehrseq.encode.rows import HistoryWindows
from ehrseq.hub.checkpoints import Backbone
from ehrseq.hub.families import FAMILIES
from ehrseq.tasks.moments import last_times
from ehrseq.tokenization.ehr_plans import CHANNELS, LabelIndex, PromptIndex, RowPlan
from ehrseq.work.progress import progress_bar

if TYPE_CHECKING:
    from ehrseq.batches.scoring import Collator, ScoredRows
    from ehrseq.tokenization.ehr_histories import EncodedHistories
    from ehrseq.tokenization.feature_extraction_hymate import HyMaTEFeatureExtractor
    from ehrseq.tokenization.tokenization_ehr import EhrTokenizer

VECTOR_LEVELS = ("patient", "visit")
POOLINGS = {
    "last": "the state of the last token",
    "mean": "the mean of the states of all tokens",
    "first": "the state of the first token",
    "ends": "a bi-LSTM's last state of each direction",
    "fused": "what HyMaTE's heads read: the fused triplets with the static values",
}
"""How the hidden states of a row become one vector."""
_READS_FROM_THE_LEFT = frozenset({"ehrmamba"})
"""Families whose state at a token knows nothing of what follows."""


@dataclass(frozen=True)
class VectorRows:
    """What a model reads for some vectors.

    Attributes:
        table: subject_id, prediction_time (of visits also visit, start, end), a row a vector.
        rows: Rows to pass through the model; None = there are none.
        collate: Makes a batch of rows.
        row_of: `[n]` row of each vector.
        length_of: `[n]` how much of that row each vector is made of, from its start.
        notes: What was left out or is to be read with care, counted.
    """

    table: pl.DataFrame
    rows: ScoredRows | None
    collate: Collator | None
    row_of: NDArray[np.int64]
    length_of: NDArray[np.int64]
    notes: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class VectorWay:
    """How vectors are made.

    Attributes:
        level: "patient" or "visit".
        pooling: A key of `POOLINGS`.
        task: Name of a task whose question stands at the end of each row; None = no question.
    """

    level: str
    pooling: str
    task: str | None = None


def vector_way(backbone: Backbone, level: str, pooling: str | None, task: str | None) -> VectorWay:
    """How a checkpoint's vectors are made, checked.

    Args:
        backbone: The checkpoint.
        level: "patient" or "visit".
        pooling: A key of `POOLINGS`; None: what the family's own classifier reads.
        task: See `VectorWay`.

    Raises:
        ValueError: A way that there is not, or not for this model.
    """
    config: Any = backbone.model.config
    family = config.model_type
    if level not in VECTOR_LEVELS:
        raise ValueError(f"level got {level!r}; expected one of {list(VECTOR_LEVELS)}.")
    if pooling is not None and pooling not in POOLINGS:
        raise ValueError(f"pooling got {pooling!r}; expected one of {list(POOLINGS)}.")
    is_of_stays = FAMILIES[family].feature_extractor is not None
    if is_of_stays:
        usual, others = "fused", ["mean", "last"]
        if config.embedding_mode == "binned":  # its states are hours, not triplets
            others = []
    elif family == "ehr_lstm":
        usual, others = "ends", ["mean", "last", "first"]
    else:
        usual = getattr(config, "pooling", "last")
        others = [name for name in ("last", "mean", "first") if name != usual]
        if family in _READS_FROM_THE_LEFT:
            others.remove("first")  # it has seen nothing but itself
    if pooling is not None and pooling not in (usual, *others):
        raise ValueError(f"pooling {pooling!r} is none for {family}; it has {[usual, *others]}, {usual!r} by default.")
    if is_of_stays and level == "visit":
        raise ValueError(f"{family} reads stays, each a visit of its own; leave level='visit' out.")
    if task is not None:
        if is_of_stays:
            raise ValueError(f"{family} has no task tokens; leave the task out.")
        known = cast("EhrTokenizer", backbone.encoder).tasks
        if task not in known:
            raise ValueError(f"unknown task {task!r}; this tokenizer knows {known}.")
    return VectorWay(level, pooling or usual, task)


def vector_rows(backbone: Backbone, events: pl.DataFrame, times: pl.DataFrame | None, way: VectorWay) -> VectorRows:
    """The rows of some patients' vectors.

    Args:
        backbone: The checkpoint.
        events: Event table of whole patients.
        times: subject_id, prediction_time; None = the end of each record, or of each stay's window.
        way: From `vector_way` of this checkpoint.
    """
    if FAMILIES[backbone.model.config.model_type].feature_extractor is not None:
        return _stay_rows(backbone, events, times)
    return _record_rows(backbone, events, times, way)


def embed_rows(
    backbone: Backbone, asked: VectorRows, pooling: str, *, batch_size: int = 32, progress: bool = False
) -> NDArray[np.float32]:
    """The vectors of some rows.

    Args:
        backbone: The checkpoint.
        asked: From `vector_rows`.
        pooling: A key of `POOLINGS`.
        batch_size: Rows in one forward pass.
        progress: Show a progress bar.

    Returns:
        `[n, d]`, in the order of `asked.table`.

    Raises:
        ValueError: A vector is not finite: the weights are damaged.
    """
    model: Any = backbone.model
    if asked.rows is None or asked.collate is None or not len(asked.rows):
        return np.empty((0, vector_size(backbone, pooling)), np.float32)
    vectors = np.empty((len(asked.row_of), vector_size(backbone, pooling)), np.float32)
    by_row = np.argsort(asked.row_of, kind="stable")
    first = np.searchsorted(asked.row_of[by_row], np.arange(len(asked.rows) + 1))
    order = np.argsort(asked.rows.lengths, kind="stable")
    uses_cache = {"use_cache": False} if model.config.model_type in _READS_FROM_THE_LEFT else {}
    model.eval()
    bar = progress_bar(range(0, len(order), batch_size), desc="Embedding", disable=not progress)
    with torch.inference_mode():
        for start in bar:
            members = order[start : start + batch_size]
            batch = asked.collate([asked.rows[int(row)] for row in members])
            output = model(**{name: tensor.to(model.device) for name, tensor in batch.items()}, **uses_cache)
            for place, row in enumerate(members.tolist()):
                wanted = by_row[first[row] : first[row + 1]]
                if pooling == "fused":
                    vectors[wanted] = output.pooler_output[place].float().cpu().numpy()
                else:
                    states = output.last_hidden_state[place][batch["attention_mask"][place].bool()].float()
                    vectors[wanted] = _pooled(states, asked.length_of[wanted], pooling).cpu().numpy()
    if not np.isfinite(vectors).all():
        raise ValueError("the model gives vectors that are not finite: its weights are damaged. Save it again.")
    return vectors


def vector_size(backbone: Backbone, pooling: str) -> int:
    """Numbers of a vector."""
    config: Any = backbone.model.config
    return int(config.pooled_size if pooling == "fused" else config.hidden_size)


def _pooled(states: Tensor, lengths: NDArray[np.int64], pooling: str) -> Tensor:
    """The vectors [n, d] of the beginnings, of these lengths, of one row's states [l, d]."""
    last = torch.from_numpy(lengths - 1).to(states.device)
    if pooling == "last":
        return states[last]
    if pooling == "first":
        return states[:1].expand(len(lengths), -1)
    if pooling == "ends":
        half = states.shape[-1] // 2
        return torch.cat([states[last, :half], states[:1, half:].expand(len(lengths), -1)], dim=-1)
    return torch.stack([states[:length].mean(0) for length in lengths.tolist()])


# -- records: EhrMamba and the event baselines -----------------------------------------------------------------------


def _record_rows(backbone: Backbone, events: pl.DataFrame, times: pl.DataFrame | None, way: VectorWay) -> VectorRows:
    tokenizer = cast("EhrTokenizer", backbone.encoder)
    config: Any = backbone.model.config
    notes: Counter[str] = Counter()
    if times is None:
        times = last_times(events)
        notes["patients without a timed event, without a vector"] = events["subject_id"].n_unique() - times.height
    times = times.select(LABEL_KEYS).unique().sort(LABEL_KEYS)
    these = events.filter(pl.col("subject_id").is_in(times["subject_id"].unique().implode()))
    histories = tokenizer.encode_histories(these)
    times = times.filter(pl.col("subject_id").is_in(histories.subject_ids.tolist()))
    notes["events of unknown codes, read as [UNK]"] = tokenizer.coverage(these)["lost_events"] if these.height else 0
    table, index = (_at_visits if way.level == "visit" else _at_times)(histories, times)
    notes["vectors without a timed event up to their time"] = int((index.end == 0).sum())
    if way.task is None:
        plan = plan_unasked(histories, index, config.max_position_embeddings)
    else:
        index = replace(index, task=np.full(len(index), tokenizer.tasks.index(way.task)))
        plan = histories.plan_prompts(index, config.max_position_embeddings)
    windows = HistoryWindows(histories, plan)
    row_of, lengths = np.arange(len(index)), np.asarray(plan.lengths, np.int64)
    if way.level == "visit" and way.task is None and config.model_type in _READS_FROM_THE_LEFT:
        windows, row_of = _joined(windows)
    names = tokenizer.model_input_names

    def collate(rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        return pad_channels(rows, names)

    return VectorRows(table, windows, collate, row_of, lengths, notes)


def _at_times(histories: EncodedHistories, times: pl.DataFrame) -> tuple[pl.DataFrame, PromptIndex]:
    """A vector for each time."""
    history = np.searchsorted(histories.subject_ids, times["subject_id"].to_numpy())
    instant = times["prediction_time"].to_physical().to_numpy()
    known = rows_until(histories.row_time, histories.row_offsets, history, instant)
    return times, histories.index_rows(_unlabelled(history, instant), known)


def _at_visits(histories: EncodedHistories, times: pl.DataFrame) -> tuple[pl.DataFrame, PromptIndex]:
    """A vector for each visit that has begun by each time: of the record up to its end, or up to the time."""
    history = np.searchsorted(histories.subject_ids, times["subject_id"].to_numpy())
    instant = times["prediction_time"].to_physical().to_numpy()
    known = rows_until(histories.row_time, histories.row_offsets, history, instant)
    columns: dict[str, list[NDArray[Any]]] = {name: [] for name in ("row", "visit", "start", "end", "over", "known")}
    for row, (place, count) in enumerate(zip(history.tolist(), known.tolist(), strict=True)):
        base = int(histories.row_offsets[place])
        orders, at = histories.row_order[base : base + count], histories.row_time[base : base + count]
        visits, first = np.unique(orders, return_index=True)  # of the rows of a patient, visits ascend
        last = np.append(first[1:], count)[: len(first)] - 1
        columns["row"].append(np.full(len(visits), row))
        columns["visit"].append(visits)
        columns["start"].append(at[first])
        columns["end"].append(at[last])
        columns["over"].append((last < count - 1) | ~histories.row_open[base + last].astype(bool))
        columns["known"].append(last + 1)
    flat = {name: np.concatenate(parts or [np.zeros(0, np.int64)]) for name, parts in columns.items()}
    table = times[flat["row"].astype(np.int64)].with_columns(
        visit=pl.Series(flat["visit"].astype(np.int64)),
        start=pl.Series(flat["start"].astype(np.int64)).cast(pl.Datetime("us")),
        end=pl.Series(flat["end"].astype(np.int64)).cast(pl.Datetime("us")),
    )
    table = table.with_columns(end=pl.when(pl.Series(flat["over"].astype(bool))).then("end"))
    rows = flat["row"].astype(np.int64)
    labels = _unlabelled(history[rows], flat["end"].astype(np.int64))
    return table, histories.index_rows(labels, flat["known"].astype(np.int64))


def _unlabelled(history: NDArray[np.int64], instant: NDArray[np.int64]) -> LabelIndex:
    nothing = np.zeros(len(history), np.int64)
    return LabelIndex(history=history, task=nothing, label=nothing, prediction_time=instant)


def plan_unasked(histories: EncodedHistories, index: PromptIndex, max_length: int | None) -> RowPlan:
    """Rows without a question: the record as it was known at each time, ending in [VE] [REG] where no visit is open.

    Args:
        histories: The patients.
        index: What is known of whom.
        max_length: Context length, None = the whole history.
    """
    tokens, count = histories.vocabulary.token_ids, len(index)
    return histories.plan_rows(
        index.history,
        np.zeros(count, np.int64),
        index.end,
        tail=2 * index.closed.astype(np.int64),
        max_length=max_length,
        first_id=np.full(count, tokens["[CLS]"]),
        last_id=np.full(count, tokens["[REG]"]),
        last_time=index.close_time,
        close_time=index.close_time,
        order=index.order,
    )


def _joined(windows: HistoryWindows) -> tuple[HistoryWindows, NDArray[np.int64]]:
    """Rows that hold the others as their beginnings, and which of them each of the rows given is the beginning of."""
    plan = cast("RowPlan", windows.plan)
    row_of = np.zeros(len(windows), np.int64)
    kept: list[int] = []
    whole: dict[str, Any] = {}
    for row in np.lexsort((-plan.lengths, plan.history)).tolist():  # of each patient, the longest first
        channels = windows[row]
        size = len(channels["input_ids"])
        same_patient = bool(kept) and plan.history[kept[-1]] == plan.history[row]
        # A visit's closing marks may differ from those in the longer row: a row without a token came in between.
        if not same_patient or any(not np.array_equal(channels[name], whole[name][:size]) for name in CHANNELS):
            kept.append(row)
            whole = channels
        row_of[row] = len(kept) - 1
    return HistoryWindows(windows.histories, plan.subset(np.asarray(kept, np.int64))), row_of


# -- stays: HyMaTE ---------------------------------------------------------------------------------------------------


def _stay_rows(backbone: Backbone, events: pl.DataFrame, times: pl.DataFrame | None) -> VectorRows:
    extractor = cast("HyMaTEFeatureExtractor", backbone.encoder)
    config: Any = backbone.model.config
    read: Counter[str] = Counter()
    stays = readable_stays(events, extractor, times, read, is_part=True)
    notes = Counter({reason: count for reason, count in read.items() if reason.startswith("triplets")})
    for reason, words in STAY_REASONS.items():
        notes[f"vectors not given: {words}"] = int((stays.answers["reason"] == reason).sum())
    if times is None:
        missing = events["subject_id"].n_unique() - stays.answers["subject_id"].n_unique()
        notes["patients without a stay, without a vector"] = missing
    found = stays.answers.filter(pl.col("row").is_not_null()).sort(LABEL_KEYS)
    row_of = found["row"].to_numpy().astype(np.int64)
    if stays.table is None or not len(row_of):
        nothing = np.zeros(0, np.int64)
        return VectorRows(found.select(LABEL_KEYS), None, None, nothing, nothing, notes)
    rows = TripletRows(stays.table, extractor, max_length=config.max_position_embeddings)
    return VectorRows(
        found.select(LABEL_KEYS), rows, DataCollatorForTriplets(extractor), row_of, rows.lengths[row_of], notes
    )
