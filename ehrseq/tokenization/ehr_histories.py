"""Encoded patients, and the rows that are cut from them: one layout for one patient and for whole tables.

Every history is encoded once. What a patient looks like at some time is a prefix of that (segmentation is an online
process, see `ehr_visits.py`), so that any number of (patient, prediction time, task) rows are index arithmetic on
flat arrays: nothing is copied until a row is asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from .ehr_codes import WEEK_US, YEAR_US
from .ehr_plans import MAX_STATIC_SHARE, LabelIndex, PromptIndex, RowPlan, check_context
from .ehr_rows import NO_TIME, OTHER_SEGMENT
from .ehr_vocabulary import (
    CLS,
    REG,
    TABLES_NEED_PACKAGE,
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

if TYPE_CHECKING:
    try:  # noqa: SIM105  (guarded, or transformers would ask for the package before it loads this file)
        from ehrseq.encode.rows import HistoryWindows
    except ImportError:
        pass


@dataclass
class EncodedHistories:
    """Token sequences of many patients as flat arrays, offsets per patient.

    Attributes:
        subject_ids: [patients], ascending.
        first: First timed event (microseconds), [patients].
        birth: Birth (microseconds; the smallest int64 where unknown), [patients].
        static_offsets, static_ids: Static tokens.
        offsets: Body tokens of patient k lie at offsets[k] .. offsets[k + 1].
        ids, types, times, ages, orders: Channels of the body tokens; times in weeks, ages in years, orders not
            clamped.
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

    def __post_init__(self) -> None:
        self._vs_id, self._ve_id = self.vocabulary.token_ids[VS], self.vocabulary.token_ids[VE]

    @cached_property
    def segments(self) -> np.ndarray:
        """Segment of each body token, by its order in the whole history."""
        array: np.ndarray = (2 - (self.orders & 1)).astype(np.int8) * (self.types != TYPE_INTERVAL)
        return array

    @cached_property
    def swapped_segments(self) -> np.ndarray:
        """The other segment of each body token."""
        array: np.ndarray = OTHER_SEGMENT[self.segments]
        return array

    @cached_property
    def next_content(self) -> np.ndarray:
        """For each body token the first one from it on that is no [VE], [REG] or interval (flat position)."""
        closing = (self.types == TYPE_VE) | (self.types == TYPE_REG) | (self.types == TYPE_INTERVAL)
        places = np.where(closing, len(self.types), np.arange(len(self.types)))
        return np.minimum.accumulate(places[::-1])[::-1]

    @cached_property
    def visit_starts(self) -> np.ndarray:
        """Flat positions of [VS]."""
        return np.flatnonzero(self.types == TYPE_VS)

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
        index: PromptIndex = _tables().index_labels(self, labels)
        return index

    def index_rows(self, labels: LabelIndex, known: np.ndarray) -> PromptIndex:
        """Labels of patients of whom so many timed rows are known, one entry a label."""
        row = np.where(known > 0, self.row_offsets[labels.history] + known - 1, -1) if len(labels) else known
        return PromptIndex(
            history=labels.history,
            task=labels.task,
            label=labels.label,
            prediction_time=labels.prediction_time,
            skipped=labels.skipped,
            end=_pick(self.row_end, row),
            closed=(row >= 0) & ~_pick(self.row_open, row).astype(bool),
            close_time=_pick(self.row_time, row),
            order=_pick(self.row_order, row),
        )

    def prompt_parts(self, index: PromptIndex) -> Iterator[tuple[np.ndarray, EncodedHistories, PromptIndex]]:
        """All rows of an index, as one part: which they are, the histories, and the rows as an index into those."""
        yield np.arange(len(index)), self, index

    def prompted_row(self, index: PromptIndex, row: int, max_length: int | None = None) -> dict[str, Any]:
        """Channels of one row of the index, with `labels` and `task_ids`.

        Args:
            index: From `index_labels`.
            row: Position in it.
            max_length: Context length, None = the whole history.
        """
        plan = self.plan_prompts(index, max_length)
        channels = self.row(plan, row)
        channels["labels"], channels["task_ids"] = np.int64(index.label[row]), np.int64(index.task[row])
        return channels

    def plan_prompts(self, index: PromptIndex, max_length: int | None) -> RowPlan:
        """Rows of an index; the index keeps the plan, so that the next row of it costs nothing but its own tokens."""
        if index._plan is not None and index._plan[:2] == (id(self), max_length):
            return index._plan[2]
        if max_length is not None:
            check_context(max_length)
        token = self.task_token_ids[index.task]
        plan = self.plan_rows(
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
        index._plan = (id(self), max_length, plan)
        return plan

    # -- one patient -------------------------------------------------------------------------------------------------

    def plan_patient(
        self, tasks: Sequence[int | None], prediction_time: int | None, max_length: int | None = None
    ) -> RowPlan:
        """Rows of the one patient that is held here, of whom everything is known: one for each task.

        Args:
            tasks: Positions in the tokenizer's tasks; None = no prompt.
            prediction_time: Time of the prompts (microseconds); None: the time of the last token.
            max_length: Context length, None = the whole history.
        """
        tokens = self.vocabulary.token_ids
        closed, latest, order = self._end
        asked = NO_TIME
        if len(self.row_time):
            # Rows behind the last token make none; a visit's closing marks have the time of its last row.
            asked = latest if closed else int(self.row_time[self.row_end.searchsorted(len(self.ids))])
        if prediction_time is not None:
            asked = prediction_time
        rows = []
        for task in tasks:
            if task is None:
                question = tokens[CLS], tokens[REG], latest, 2 * closed
            else:
                token = int(self.task_token_ids[task])
                question = token, token, asked, 1 + closed
            rows.append((0, 0, len(self.ids), *question, latest, order))
        columns = np.asarray(rows, np.int64).reshape(-1, 9).T
        history, start, end, first_id, last_id, last_time, tail, close_time, order_of_last = columns
        return self.plan_rows(
            history,
            start,
            end,
            tail=tail,
            max_length=max_length,
            first_id=first_id,
            last_id=last_id,
            last_time=last_time,
            close_time=close_time,
            order=order_of_last,
        )

    def plan_cut(
        self, start: int, first_id: int, last_id: int, last_time: int, max_length: int | None = None
    ) -> RowPlan:
        """The row of the one patient that is held here that begins at a token of the body, and asks as another row did.

        Args:
            start: The token; where it is the end, the row holds static tokens alone, and no visit.
            first_id, last_id, last_time: Of that row.
            max_length: Context length, to which the row is cut further where it exceeds it; None = any.
        """
        closed, latest, order = self._end if start < len(self.ids) else (False, NO_TIME, 0)

        def plan(start: int) -> RowPlan:
            column = {
                "tail": 1 + closed,
                "first_id": first_id,
                "last_id": last_id,
                "last_time": last_time,
                "close_time": latest,
                "order": order,
            }
            arrays = {name: np.asarray([number], np.int64) for name, number in column.items()}
            nothing = np.zeros(1, np.int64)
            return self.plan_rows(
                nothing,
                nothing + start,
                nothing + len(self.ids),
                tail=arrays.pop("tail"),
                max_length=max_length,
                **arrays,
            )

        whole = plan(start)
        if max_length is None or whole.lengths[0] <= max_length:
            return whole
        return plan(int(self.next_content[start + 1]))  # no slot for the [VS] that its cut visit got back

    @property
    def _end(self) -> tuple[bool, int, int]:
        """Of the one patient that is held here: whether the last visit is closed, the last row's time and its visit."""
        if not len(self.row_time):
            return False, NO_TIME, 0
        return not self.row_open[-1], int(self.row_time[-1]), int(self.row_order[-1])

    # -- whole histories and windows ---------------------------------------------------------------------------------

    def plan_histories(self, max_length: int | None = None) -> RowPlan:
        """One unprompted sequence a patient, the most recent tokens."""
        last = np.where(np.diff(self.row_offsets) > 0, self.row_offsets[1:] - 1, -1)
        closed = (last >= 0) & ~_pick(self.row_open, last).astype(bool)
        count = len(self)
        return self.plan_rows(
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

    def windows(self, max_length: int, end_of_data: Any = None) -> HistoryWindows:
        """Pretraining rows: a sequence (`len`, `[i]`, `.subject_ids`) of dicts of channels.

        Consecutive windows of every history, cut before a [VS] where one lies in the window: every event is in exactly
        one.

        Args:
            max_length: Context length.
            end_of_data: Last instant that the data cover (datetime, date, or ISO 8601 text). The rows then have the
                channel `silent_days` (`ehrseq.encode.follow_up`); None: it is not known.
        """
        windows: HistoryWindows = _tables().windows(self, max_length, end_of_data)
        return windows

    # -- rows --------------------------------------------------------------------------------------------------------

    def plan_rows(
        self,
        history: np.ndarray,
        start: np.ndarray,
        end: np.ndarray,
        *,
        tail: np.ndarray,
        max_length: int | None,
        **rest: Any,
    ) -> RowPlan:
        """Cut rows from the left where they exceed `max_length`: the most recent tokens stay.

        The first token and the static ones (while they take at most a quarter) are kept, and a visit that is cut gets
        its [VS] back; the marks between two visits lead no row; visit orders start again at 1.
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
        vs_at, shift = np.full(len(start), -1), np.zeros(len(start), np.int64)
        cut = ((start > 0) & (end > start)).nonzero()[0]  # rows that begin inside their history
        if len(cut):
            first = base[cut] + start[cut]
            visit = self.visit_starts[np.searchsorted(self.visit_starts, first, side="right") - 1]
            vs_at[cut] = np.where(self.types[first] == TYPE_VS, -1, visit)
            shift[cut] = self.orders[first] - 1
        return RowPlan(
            history=history, statics=statics, start=start, end=end, vs_at=vs_at, shift=shift, tail=tail, **rest
        )

    def row(self, plan: RowPlan, row: int) -> dict[str, Any]:
        """Channels of one row; `assemble` makes the same of many."""
        # Python's own numbers throughout: a training loop waits for every row, and numpy's cost more than the copying.
        k, statics, first_id, start, end, vs_at, shift, tail, last_id, last_time, close_time, order = plan.row(row)
        base = int(self.offsets[k])
        lo, hi = base + start, base + end
        begin = 1 + statics + (vs_at >= 0)
        stop = begin + hi - lo
        ids, mask, types, orders, segments = np.zeros((5, stop + tail), np.int64)
        times, ages = np.zeros((2, stop + tail), np.float32)
        mask.fill(1)
        # 1. Head.
        ids[0], types[0] = first_id, TYPE_CLS
        if statics:
            at = int(self.static_offsets[k])
            ids[1 : 1 + statics], types[1 : 1 + statics] = self.static_ids[at : at + statics], TYPE_STATIC
        # 2. Body; an odd shift of the orders swaps the segments.
        ids[begin:stop], types[begin:stop] = self.ids[lo:hi], self.types[lo:hi]
        times[begin:stop], ages[begin:stop] = self.times[lo:hi], self.ages[lo:hi]
        orders[begin:stop] = self.orders[lo:hi]
        if shift:
            orders[begin:stop] -= shift
        segments[begin:stop] = (self.swapped_segments if shift % 2 else self.segments)[lo:hi]
        if vs_at >= 0:
            at = begin - 1
            ids[at], types[at], orders[at], segments[at] = self._vs_id, TYPE_VS, 1, 1
            times[at], ages[at] = self.times[vs_at], self.ages[vs_at]
        # 3. Tail.
        if tail:
            latest = order - shift if order else 0
            segment = 2 - latest % 2 if latest else 0
            first, birth = int(self.first[k]), int(self.birth[k])
            for place, token, token_type, instant in (
                (stop, self._ve_id, TYPE_VE, close_time),
                (stop + tail - 1, last_id, TYPE_REG, last_time),
            )[2 - tail :]:
                ids[place], types[place], orders[place], segments[place] = token, token_type, latest, segment
                times[place] = (instant - first) / WEEK_US if latest else 0.0
                ages[place] = 0.0 if birth == NO_TIME else max(0.0, (instant - birth) / YEAR_US)
        if order - shift >= self.max_num_visits:
            np.minimum(orders, self.max_num_visits - 1, out=orders)
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "token_type_ids": types,
            "times": times,
            "ages": ages,
            "visit_orders": orders,
            "visit_segments": segments,
        }


def _pick(values: np.ndarray, places: np.ndarray) -> np.ndarray:
    """values[places], 0 where a place is negative."""
    if not len(values):
        return np.zeros(len(places), values.dtype)
    return np.where(places >= 0, values[places], 0)


def join_offsets(parts: list[np.ndarray]) -> np.ndarray:
    """Offsets of arrays laid end to end, from the offsets of each."""
    lengths = np.concatenate([np.diff(part) for part in parts])
    return np.concatenate([[0], np.cumsum(lengths)])


def _tables() -> ModuleType:
    """What reads and makes tables: it stays in the package, a checkpoint travels without it."""
    try:
        from ehrseq.encode import histories
    except ImportError as error:
        raise ImportError(TABLES_NEED_PACKAGE) from error
    return histories
