"""Whole tables -> sequences, column by column: the fast twin of `ehr_sequence.py`, with the same rows to the last bit.

Every history is encoded once. What a patient looks like at some time is a prefix of that (segmentation is an online
process, see `ehr_visits.py`), so that any number of (patient, prediction time, task) rows are index arithmetic on
flat arrays: nothing is copied until a row is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .ehr_sequence import CHANNEL_DTYPES, MAX_STATIC_SHARE, WEEK_US, YEAR_US
from .ehr_vocabulary import (
    CLS,
    REG,
    TYPE_CLS,
    TYPE_INTERVAL,
    TYPE_REG,
    TYPE_STATIC,
    TYPE_VE,
    TYPE_VS,
    VE,
    VS,
    EventVocabulary,
)

NO_TIME = np.iinfo(np.int64).min
"""Stands for an absent instant (microseconds): a static row, an unknown birth."""
_ROW_CHUNK = 20_000  # rows assembled at once by `assemble_all`: bounds its index arrays


@dataclass
class PromptIndex:
    """(patient, prediction time, task) rows, as positions in an `EncodedHistories`; all arrays have one entry a row.

    Attributes:
        history: Position of the patient's history.
        end: Tokens of the history's body that are known at the prediction time.
        closed: Whether the last visit is closed then.
        close_time: Time of the latest known row (microseconds), which is when a closed visit ended.
        order: Order of the last visit, 0 where nothing is known yet.
        task: Position of the task in the tokenizer's tasks.
        label: 0 or 1.
        prediction_time: Microseconds.
        skipped: Labels that no row was made of, by reason.
    """

    history: np.ndarray
    end: np.ndarray
    closed: np.ndarray
    close_time: np.ndarray
    order: np.ndarray
    task: np.ndarray
    label: np.ndarray
    prediction_time: np.ndarray
    skipped: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.history)

    def subset(self, rows: Any) -> PromptIndex:
        """The index of some rows, in the order given (positions, repeated ones too, or a mask)."""
        rows = np.asarray(rows)
        arrays = {name: value[rows] for name, value in vars(self).items() if isinstance(value, np.ndarray)}
        return PromptIndex(**arrays, skipped=dict(self.skipped))


@dataclass
class RowPlan:
    """Which pieces make up each sequence: head, an inserted [VS], a slice of a body, a tail. One entry a row."""

    history: np.ndarray
    statics: np.ndarray  # number of static tokens behind the first token
    first_id: np.ndarray  # [CLS] or a task's token
    start: np.ndarray
    end: np.ndarray
    needs_vs: np.ndarray
    shift: np.ndarray  # subtracted from visit orders
    tail: np.ndarray  # 0, 1 (last token) or 2 ([VE] and last token)
    last_id: np.ndarray
    last_time: np.ndarray  # microseconds
    close_time: np.ndarray
    order: np.ndarray


@dataclass
class EncodedHistories:
    """Token sequences of many patients as flat arrays, offsets per patient.

    Attributes:
        subject_ids: [patients], ascending.
        first: First timed event (microseconds), [patients].
        birth: Birth (microseconds; the smallest int64 where unknown), [patients].
        static_offsets, static_ids: Static tokens.
        offsets: Body tokens of patient k lie at offsets[k] .. offsets[k + 1].
        ids, types, times, ages, orders: Channels of the body tokens; times in weeks, ages in years, orders not clamped.
        row_offsets: Timed rows of patient k.
        row_time, row_end, row_open, row_order: For each timed row its time, the body tokens up to it, whether a visit
            is open after it, its visit.
    """

    vocabulary: EventVocabulary
    task_names: list[str]
    task_token_ids: np.ndarray
    max_num_visits: int
    subject_ids: np.ndarray
    first: np.ndarray
    birth: np.ndarray
    static_offsets: np.ndarray
    static_ids: np.ndarray
    offsets: np.ndarray
    ids: np.ndarray
    types: np.ndarray
    times: np.ndarray
    ages: np.ndarray
    orders: np.ndarray
    row_offsets: np.ndarray
    row_time: np.ndarray
    row_end: np.ndarray
    row_open: np.ndarray
    row_order: np.ndarray
    _next_content: np.ndarray | None = field(default=None, repr=False)
    _visit_starts: np.ndarray | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.subject_ids)

    @property
    def num_tokens(self) -> int:
        """Body and static tokens of all patients."""
        return len(self.ids) + len(self.static_ids)

    # -- prompted rows -----------------------------------------------------------------------------------------------

    def index_labels(self, labels: Mapping[str, Any]) -> PromptIndex:
        """Rows for labels.

        Args:
            labels: Task name -> table of subject_id, prediction_time, boolean_value.

        Returns:
            One row per (label, task), tasks in the order given; labels of patients without events are counted in
            `skipped`.

        Raises:
            ValueError: A task that the tokenizer has no token for, or a table without these columns.
        """
        import polars as pl

        unknown = [task for task in labels if task not in self.task_names]
        if unknown:
            raise ValueError(
                f"labels name the tasks {unknown}; the tokenizer knows {self.task_names}. Add one with tokenizer.add_task(name, token)."
            )
        rows = pl.DataFrame(
            {
                "history": np.repeat(np.arange(len(self)), np.diff(self.row_offsets)),
                "prediction_time": self.row_time,
                "row": np.arange(len(self.row_time)),
            }
        ).set_sorted("history")
        parts, skipped = [], 0
        for task, table in labels.items():
            missing = [c for c in ("subject_id", "prediction_time", "boolean_value") if c not in table.columns]
            if missing:
                raise ValueError(
                    f"labels of {task!r} lack {missing}; expected subject_id, prediction_time, boolean_value."
                )
            frame = table.select(
                pl.col("subject_id").cast(pl.Int64),
                pl.col("prediction_time").cast(pl.Datetime("us")).to_physical(),
                pl.col("boolean_value").cast(pl.Int8).alias("label"),
            ).with_columns(task=pl.lit(self.task_names.index(task), pl.Int32))
            subjects = frame["subject_id"].to_numpy()
            position = np.minimum(np.searchsorted(self.subject_ids, subjects), max(0, len(self) - 1))
            known = np.zeros(len(subjects), bool) if not len(self) else self.subject_ids[position] == subjects
            skipped += int((~known).sum())
            parts.append(frame.with_columns(history=pl.Series(position)).filter(pl.Series(known)))
        schema = {
            "subject_id": pl.Int64,
            "prediction_time": pl.Int64,
            "label": pl.Int8,
            "task": pl.Int32,
            "history": pl.Int64,
        }
        wanted = (pl.concat(parts) if parts else pl.DataFrame(schema=schema)).with_row_index("place")
        found = (
            wanted.sort("prediction_time")
            .join_asof(
                rows.sort("prediction_time", maintain_order=True),
                on="prediction_time",
                by="history",
                strategy="backward",
                check_sortedness=False,  # both sides are sorted just above
            )
            .sort("place")
        )
        # join_asof takes any of the rows at one instant: the last of them is meant
        row = found["row"].fill_null(-1).to_numpy()
        row = np.where(row >= 0, _pick(self._last_of_instant, row), -1)
        return PromptIndex(
            history=found["history"].to_numpy(),
            end=_pick(self.row_end, row),
            closed=(row >= 0) & ~_pick(self.row_open, row).astype(bool),
            close_time=_pick(self.row_time, row),
            order=_pick(self.row_order, row),
            task=found["task"].to_numpy(),
            label=found["label"].to_numpy(),
            prediction_time=found["prediction_time"].to_numpy(),
            skipped={"subject_without_events": skipped} if skipped else {},
        )

    def prompted_row(self, index: PromptIndex, row: int, max_length: int | None = None) -> dict[str, np.ndarray]:
        """Channels of one row of the index, with `labels` and `task_ids`.

        Args:
            index: From `index_labels`.
            row: Position in it.
            max_length: Context length, None = the whole history.
        """
        one = index.subset([row])
        channels, _ = self._assemble(self._plan_prompts(one, max_length))
        return channels | {"labels": np.int64(one.label[0]), "task_ids": np.int64(one.task[0])}

    def _plan_prompts(self, index: PromptIndex, max_length: int | None) -> RowPlan:
        token = self.task_token_ids[index.task]
        return self._plan(
            index.history,
            np.zeros(len(index), np.int64),
            index.end,
            tail=1 + index.closed.astype(np.int64),
            max_length=max_length,
            first_id=token,
            last_id=token,
            last_time=index.prediction_time,
            close_time=index.close_time,
            order=index.order,
        )

    # -- whole histories and windows ---------------------------------------------------------------------------------

    def plan_histories(self, max_length: int | None = None) -> RowPlan:
        """One unprompted sequence a patient, the most recent tokens."""
        last = np.where(np.diff(self.row_offsets) > 0, self.row_offsets[1:] - 1, -1)
        closed = (last >= 0) & ~_pick(self.row_open, last).astype(bool)
        count = len(self)
        return self._plan(
            np.arange(count),
            np.zeros(count, np.int64),
            np.diff(self.offsets),
            tail=2 * closed.astype(np.int64),
            max_length=max_length,
            first_id=np.full(count, self.vocabulary.token_ids[CLS]),
            last_id=np.full(count, self.vocabulary.token_ids[REG]),
            last_time=_pick(self.row_time, last),
            close_time=_pick(self.row_time, last),
            order=_pick(self.row_order, last),
        )

    def plan_windows(self, max_length: int) -> RowPlan:
        """Consecutive windows of every history, cut before a [VS] where one lies in the window: every event is in
        exactly one.
        """
        whole = self.plan_histories()
        starts_of = self.visit_starts
        pieces: list[tuple[int, int, int, bool]] = []  # history, start, end, is last
        bounds = np.searchsorted(starts_of, self.offsets)
        for k in range(len(self)):
            length = int(self.offsets[k + 1] - self.offsets[k])
            head = 1 + int(whole.statics[k])
            if head * MAX_STATIC_SHARE > max_length:
                head = 1
            mine = starts_of[bounds[k] : bounds[k + 1]] - self.offsets[k]
            start, tail = 0, int(whole.tail[k])
            while True:
                inside = start > 0 and not _contains(mine, start)
                room = max_length - head - int(inside)
                if length - start + tail <= room:
                    pieces.append((k, start, length, True))
                    break
                end = min(start + room, length)
                before = int(np.searchsorted(mine, end, side="right")) - 1
                if end < length and before >= 0 and mine[before] > start:
                    end = int(mine[before])
                elif end == length:  # all tokens fit, the closing marks do not: they go with the last visit's rest
                    end = int(mine[-1]) if len(mine) and mine[-1] > start else length - max(1, room // 2)
                pieces.append((k, start, end, False))
                start = end
        table = np.asarray([piece[:3] for piece in pieces], dtype=np.int64).reshape(-1, 3)
        last = np.asarray([piece[3] for piece in pieces], dtype=bool)
        history, start, end = table.T
        plan = self._plan(
            history,
            start,
            end,
            tail=np.where(last, whole.tail[history], 0),
            max_length=None,
            first_id=whole.first_id[history],
            last_id=whole.last_id[history],
            last_time=whole.last_time[history],
            close_time=whole.close_time[history],
            order=whole.order[history],
        )
        plan.statics = np.where((1 + plan.statics) * MAX_STATIC_SHARE > max_length, 0, plan.statics)
        return plan

    def windows(self, max_length: int) -> HistoryWindows:
        """Pretraining rows: a sequence (`len`, `[i]`, `.subject_ids`) of dicts of channels, see `plan_windows`."""
        return HistoryWindows(self, self.plan_windows(max_length))

    # -- assembling --------------------------------------------------------------------------------------------------

    def assemble_all(self, plan: RowPlan) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Channels of all rows end to end, and the offsets [rows + 1]."""
        count = len(plan.history)
        parts = [self._assemble(_rows_of(plan, slice(k, k + _ROW_CHUNK))) for k in range(0, count, _ROW_CHUNK)]
        if not parts:
            return {name: np.zeros(0, dtype) for name, dtype in CHANNEL_DTYPES.items()}, np.zeros(1, np.int64)
        lengths = np.concatenate([np.diff(offsets) for _, offsets in parts])
        channels = {name: np.concatenate([part[name] for part, _ in parts]) for name in CHANNEL_DTYPES}
        return channels, np.concatenate([[0], np.cumsum(lengths)])

    def _plan(
        self,
        history: np.ndarray,
        start: np.ndarray,
        end: np.ndarray,
        *,
        tail: np.ndarray,
        max_length: int | None,
        **rest: Any,
    ) -> RowPlan:
        """Truncate from the left where a row exceeds `max_length`; the rules of `ehr_sequence.truncate`, for many
        rows.
        """
        statics = (self.static_offsets[history + 1] - self.static_offsets[history]).astype(np.int64)
        base = self.offsets[history]
        if max_length is not None:
            too_long = 1 + statics + (end - start) + tail > max_length
            statics = np.where(too_long & ((1 + statics) * MAX_STATIC_SHARE > max_length), 0, statics)
            budget = max_length - 1 - statics - tail
            cut = end - budget
            needs_cut = too_long & (cut > 0)
            if needs_cut.any():
                start = start.copy()
                rows = np.flatnonzero(needs_cut)
                at, budget, stop = base[rows] + cut[rows], budget[rows], base[rows] + end[rows]
                at = self.next_content[at]
                # inside a visit with no slot freed for its [VS]: one token more goes
                crowded = (self.types[at] != TYPE_VS) & (stop - at >= budget)
                at = np.where(crowded, self.next_content[np.minimum(at + 1, len(self.types) - 1)], at)
                start[rows] = at - base[rows]
        flat = np.minimum(base + start, max(0, len(self.types) - 1))
        has_body = end > start
        if len(self.types):
            needs_vs = has_body & (start > 0) & (self.types[flat] != TYPE_VS)
            shift = np.where(has_body & (start > 0), self.orders[flat].astype(np.int64) - 1, 0)
        else:
            needs_vs, shift = np.zeros(len(start), bool), np.zeros(len(start), np.int64)
        return RowPlan(
            history=history, statics=statics, start=start, end=end, needs_vs=needs_vs, shift=shift, tail=tail, **rest
        )

    def _assemble(self, plan: RowPlan) -> tuple[dict[str, np.ndarray], np.ndarray]:
        ids = self.vocabulary.token_ids
        span = plan.end - plan.start
        head = 1 + plan.statics
        lengths = head + plan.needs_vs + span + plan.tail
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        first = offsets[:-1]
        total = int(offsets[-1])
        out = {name: np.zeros(total, dtype) for name, dtype in CHANNEL_DTYPES.items()}
        out["attention_mask"][:] = 1
        # 1. Head: [CLS] or the task, then static tokens.
        out["input_ids"][first], out["token_type_ids"][first] = plan.first_id, TYPE_CLS
        source, target = _ranges(self.static_offsets[plan.history], plan.statics), _ranges(first + 1, plan.statics)
        out["input_ids"][target], out["token_type_ids"][target] = self.static_ids[source], TYPE_STATIC
        # 2. Body, and the [VS] of a visit that was cut, with the attributes of the first token that is left.
        at = first + head + plan.needs_vs
        source, target = _ranges(self.offsets[plan.history] + plan.start, span), _ranges(at, span)
        out["input_ids"][target], out["token_type_ids"][target] = self.ids[source], self.types[source]
        out["times"][target], out["ages"][target] = self.times[source], self.ages[source]
        orders = self.orders[source] - np.repeat(plan.shift, span)
        out["visit_orders"][target] = orders
        out["visit_segments"][target] = np.where(self.types[source] == TYPE_INTERVAL, 0, 1 + (orders - 1) % 2)
        inserted = at[plan.needs_vs]
        for name in ("times", "ages", "visit_orders", "visit_segments"):
            out[name][inserted - 1] = out[name][inserted]
        out["input_ids"][inserted - 1], out["token_type_ids"][inserted - 1] = ids[VS], TYPE_VS
        # 3. Tail: [VE] of a closed visit, then [REG] or the task.
        order = np.where(plan.order > 0, plan.order - plan.shift, 0)
        segment = np.where(order > 0, 1 + (order - 1) % 2, 0)
        for back, rows, token, token_type, instant in (
            (2, plan.tail == 2, ids[VE], TYPE_VE, plan.close_time),
            (1, plan.tail > 0, plan.last_id, TYPE_REG, plan.last_time),
        ):
            place = offsets[1:][rows] - back
            history = plan.history[rows]
            out["input_ids"][place] = token if np.isscalar(token) else token[rows]
            out["token_type_ids"][place] = token_type
            out["times"][place] = (instant[rows] - self.first[history]) / WEEK_US
            out["ages"][place] = _ages(instant[rows], self.birth[history])
            out["visit_orders"][place], out["visit_segments"][place] = order[rows], segment[rows]
        # Where nothing timed is known, there is no clock to tell the time by.
        nothing = offsets[1:][(plan.tail > 0) & (plan.order == 0)] - 1
        out["times"][nothing] = 0
        np.minimum(out["visit_orders"], self.max_num_visits - 1, out=out["visit_orders"])
        return out, offsets

    @property
    def next_content(self) -> np.ndarray:
        """For each body token the first token from it on that is no [VE], [REG] or interval (flat positions)."""
        if self._next_content is None:
            closing = np.isin(self.types, (TYPE_VE, TYPE_REG, TYPE_INTERVAL))
            places = np.where(closing, len(self.types), np.arange(len(self.types)))
            self._next_content = np.minimum.accumulate(places[::-1])[::-1]
        return self._next_content

    @property
    def visit_starts(self) -> np.ndarray:
        """Flat positions of [VS]."""
        if self._visit_starts is None:
            self._visit_starts = np.flatnonzero(self.types == TYPE_VS)
        return self._visit_starts

    @property
    def _last_of_instant(self) -> np.ndarray:
        """For each row the last row of the same patient at the same time."""
        count = len(self.row_time)
        if not count:
            return np.zeros(0, np.int64)
        is_last = np.ones(count, bool)
        is_last[:-1] = self.row_time[1:] != self.row_time[:-1]
        is_last[self.row_offsets[1:-1][self.row_offsets[1:-1] > 0] - 1] = True
        places = np.where(is_last, np.arange(count), count)
        return np.minimum.accumulate(places[::-1])[::-1]


class HistoryWindows:
    """Pretraining rows, assembled when they are asked for; a map-style dataset."""

    def __init__(self, histories: EncodedHistories, plan: RowPlan) -> None:
        self.histories, self.plan = histories, plan

    def __len__(self) -> int:
        return len(self.plan.history)

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        if not -len(self) <= row < len(self):
            raise IndexError(f"window {row} of {len(self)}")
        return self.histories._assemble(_rows_of(self.plan, [row % len(self)]))[0]

    @property
    def subject_ids(self) -> np.ndarray:
        """Patient of each window."""
        return self.histories.subject_ids[self.plan.history]

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each window."""
        plan = self.plan
        return 1 + plan.statics + plan.needs_vs + plan.end - plan.start + plan.tail


def _pick(values: np.ndarray, places: np.ndarray) -> np.ndarray:
    """values[places], 0 where a place is negative."""
    if not len(values):
        return np.zeros(len(places), values.dtype)
    return np.where(places >= 0, values[places], 0)


def _contains(ascending: np.ndarray, value: int) -> bool:
    k = int(np.searchsorted(ascending, value))
    return k < len(ascending) and int(ascending[k]) == value


def _rows_of(plan: RowPlan, rows: Any) -> RowPlan:
    return RowPlan(**{name: value[rows] for name, value in vars(plan).items()})


def _ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """start, start + 1 ... of every row, end to end."""
    lengths = np.asarray(lengths, np.int64)
    total = int(lengths.sum())
    first = np.cumsum(lengths) - lengths
    return np.arange(total) + np.repeat(np.asarray(starts, np.int64) - first, lengths)


def _ages(instant: np.ndarray, birth: np.ndarray) -> np.ndarray:
    years = np.maximum(0.0, (instant - np.where(birth == NO_TIME, instant, birth)) / YEAR_US)
    return np.where(birth == NO_TIME, 0.0, years)
