"""Patients of encoded files, and the rows that are cut from them: what `EncodedHistories` is in memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ehrseq.encode.files import first_times, from_batch, is_open, open_batches, row_times
from ehrseq.encode.follow_up import EndOfData, silence_of_rows
from ehrseq.encode.labels import labels_of_subjects, rows_until
from ehrseq.encode.windows import plan_pieces, plan_windows, window_statics
from ehrseq.tokenization.ehr_plans import LabelIndex, PromptIndex, check_context

if TYPE_CHECKING:
    import polars as pl
    import pyarrow as pa

    from ehrseq.tokenization.ehr_histories import EncodedHistories
    from ehrseq.tokenization.tokenization_ehr import EhrTokenizer

_REMEMBERED = 8  # patients that stay decoded: rows of one patient often follow one another


@dataclass(frozen=True)
class FileWindows:
    """Windows of patients in files, one entry a window.

    Attributes:
        history: Position of the patient.
        start: First body token.
        end: Behind the last body token.
        is_last: Whether it ends its history.
        lengths: Tokens of the row.
        max_length: Context length.
    """

    history: np.ndarray
    start: np.ndarray
    end: np.ndarray
    is_last: np.ndarray
    lengths: np.ndarray
    max_length: int


@dataclass(kw_only=True)
class KnownIndex(LabelIndex):
    """Labels of patients in files.

    Attributes:
        known: Timed rows of the patient that are known at the prediction time.
    """

    known: np.ndarray


class EncodedPatients:
    """Patients of encoded files, decoded when they are asked for.

    Args:
        files: Encoded files.
        folder: Folder of the tokenizer.
        tokenizer: The tokenizer, where it is loaded already.

    Attributes:
        subject_ids: Ascending, [patients].
        tokens: Body tokens of each, [patients].
        statics: Static tokens of each, [patients].
        closed: Whether the last visit of each is over, [patients].

    Raises:
        ValueError: A file cannot be read, or a patient stands in two.
    """

    def __init__(self, files: Sequence[str], folder: str | Path, tokenizer: EhrTokenizer | None = None) -> None:
        self.files, self.folder = list(files), str(folder)
        self._open(tokenizer)
        batches = self._batches
        subjects = np.concatenate(
            [np.zeros(0, np.int64), *(batch.column("subject_id").to_numpy() for batch in batches)]
        )
        sizes = [batch.num_rows for batch in batches]
        order = np.argsort(subjects, kind="stable")
        self.subject_ids = subjects[order]
        twice = np.flatnonzero(self.subject_ids[1:] == self.subject_ids[:-1])
        if len(twice):
            raise ValueError(
                f"{len(twice)} patients stand in two files of {self.files[0]} and beside; prepare them again."
            )
        self._batch = np.repeat(np.arange(len(batches), dtype=np.int32), sizes)[order]
        self._place = np.concatenate([np.zeros(0, np.int32), *(np.arange(n, dtype=np.int32) for n in sizes)])[order]
        self.tokens, self.statics, self.closed = (
            np.concatenate([np.zeros(0, dtype), *parts])[order]
            for dtype, parts in (
                (np.int32, [batch.column("tokens").to_numpy() for batch in batches]),
                (np.int32, [np.diff(batch.column("static_ids").offsets.to_numpy()) for batch in batches]),
                (bool, [_closed(batch) for batch in batches]),
            )
        )

    def __len__(self) -> int:
        return len(self.subject_ids)

    def history(self, patient: int) -> EncodedHistories:
        """One patient's history."""
        history = self._decoded.pop(patient, None)
        if history is None:
            batch = self._batches[self._batch[patient]].slice(int(self._place[patient]), 1)
            history = self._encoder.histories(from_batch(batch))
            if len(self._decoded) >= _REMEMBERED:
                self._decoded.pop(next(iter(self._decoded)))
        self._decoded[patient] = history
        return history

    # -- windows -----------------------------------------------------------------------------------------------------

    def plan_windows(self, max_length: int) -> FileWindows:
        """Consecutive windows of every history, see `EncodedHistories.windows`."""
        check_context(max_length)
        # 1. A history that fits is one window: its length is known without its tokens.
        statics = window_statics(self.statics.astype(np.int64), max_length)
        whole = 1 + statics + self.tokens + 2 * self.closed
        fits = whole <= max_length
        patient = np.flatnonzero(fits)
        parts = [(patient, np.zeros(len(patient), np.int64), self.tokens[fits], whole[fits])]
        # 2. The others are cut, which needs their visits.
        for positions, histories in self._parts(~fits):
            plan = plan_windows(histories, max_length)
            cut = ~fits[positions[plan.history]]
            parts.append((positions[plan.history[cut]], plan.start[cut], plan.end[cut], plan.lengths[cut]))
        patient, start, end, lengths = (np.concatenate(column) for column in zip(*parts, strict=True))
        order = np.lexsort((start, patient))
        patient = patient[order].astype(np.int32)
        return FileWindows(
            history=patient,
            start=start[order].astype(np.int32),
            end=end[order].astype(np.int32),
            is_last=np.append(patient[1:] != patient[:-1], True)[: len(order)],
            lengths=lengths[order],
            max_length=max_length,
        )

    def row(self, plan: FileWindows, row: int) -> dict[str, Any]:
        """Channels of one window."""
        histories = self.history(int(plan.history[row]))
        start, end = plan.start[[row]].astype(np.int64), plan.end[[row]].astype(np.int64)
        piece = plan_pieces(histories, np.zeros(1, np.int64), start, end, plan.is_last[[row]], plan.max_length)
        return histories.row(piece, 0)

    def silent_days(self, end_of_data: EndOfData) -> NDArray[np.float32]:
        """`[patients]` days of each between the last visit and the end of the data; see `ehrseq.encode.follow_up`."""
        silent = np.zeros(len(self), np.float32)
        for number, batch in enumerate(self._batches):
            rows = from_batch(batch)
            silent[self._positions(number)] = silence_of_rows(rows, self._encoder.vocabulary, end_of_data)
        return silent

    # -- prompts -----------------------------------------------------------------------------------------------------

    def index_labels(self, labels: Mapping[str, pl.DataFrame]) -> KnownIndex:
        """Rows for labels, 19 bytes each; see `EncodedHistories.index_labels`."""
        rows = labels_of_subjects(labels, self.subject_ids, self._tasks)
        return KnownIndex(
            history=rows.history.astype(np.int32),
            task=rows.task.astype(np.int16),
            label=rows.label,
            prediction_time=rows.prediction_time,
            skipped=rows.skipped,
            known=self.rows_until(rows.history, rows.prediction_time).astype(np.int32),
        )

    def prompted_row(self, index: KnownIndex, row: int, max_length: int | None = None) -> dict[str, Any]:
        """Channels of one row of an index, with `labels` and `task_ids`."""
        histories, prompts = self.of_patient(index, np.asarray([row]))
        return histories.prompted_row(prompts, 0, max_length)

    def prompt_parts(self, index: KnownIndex) -> Iterator[tuple[NDArray[np.int64], EncodedHistories, PromptIndex]]:
        """Batch by batch: which rows of an index, the batch's histories, and the rows as an index into those."""
        wanted = np.zeros(len(self), bool)
        wanted[index.history] = True
        place = np.full(len(self), -1)
        for positions, histories in self._parts(wanted):
            place[positions] = np.arange(len(positions))
            rows = np.flatnonzero(place[index.history] >= 0)
            part = index.subset(rows)
            yield rows, histories, histories.index_rows(replace(part, history=place[part.history]), part.known)
            place[positions] = -1

    def of_patient(self, index: KnownIndex, rows: NDArray[np.int64]) -> tuple[EncodedHistories, PromptIndex]:
        """One patient's history, and some of their rows as an index into it."""
        histories, part = self.history(int(index.history[rows[0]])), index.subset(rows)
        return histories, histories.index_rows(replace(part, history=np.zeros(len(rows), np.int64)), part.known)

    def rows_until(self, patient: NDArray[np.int64], instant: NDArray[np.int64]) -> NDArray[np.int64]:
        """How many timed rows of each patient are known at an instant (microseconds); one entry a question."""
        known = np.zeros(len(patient), np.int64)
        batch_of = self._batch[patient]
        for number in np.unique(batch_of).tolist():
            asked = np.flatnonzero(batch_of == number)
            batch = self._batches[number]
            offsets = batch.column("ids").offsets.to_numpy().astype(np.int64)
            times = row_times(batch, first_times(batch), offsets - offsets[0])
            known[asked] = rows_until(times, offsets - offsets[0], self._place[patient[asked]], instant[asked])
        return known

    def _parts(self, wanted: NDArray[np.bool_]) -> Iterator[tuple[NDArray[np.int64], EncodedHistories]]:
        """Histories batch by batch, of those batches that hold a wanted patient.

        Yields:
            Position of each patient of the batch, and their histories.
        """
        for number in np.unique(self._batch[wanted]).tolist():
            yield self._positions(number), self._encoder.histories(from_batch(self._batches[number]))

    def _positions(self, number: int) -> NDArray[np.int64]:
        of_batch = np.flatnonzero(self._batch == number)
        positions = np.empty(len(of_batch), np.int64)
        positions[self._place[of_batch]] = of_batch
        return positions

    def _open(self, tokenizer: EhrTokenizer | None = None) -> None:
        from ehrseq.tokenization.tokenization_ehr import EhrTokenizer

        tokenizer = tokenizer or EhrTokenizer.from_pretrained(self.folder)
        self._batches = [batch for file in self.files for batch in open_batches(file)]
        self._encoder, self._tasks = tokenizer.encoder(), tokenizer.tasks
        self._decoded: dict[int, EncodedHistories] = {}

    def __getstate__(self) -> dict[str, Any]:
        # Another process maps the files itself; pickled, they would be copied.
        return {name: value for name, value in vars(self).items() if name not in ("_batches", "_encoder", "_decoded")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._open()


def _closed(batch: pa.RecordBatch) -> NDArray[np.bool_]:
    """Whether each patient has rows, and no visit is open after the last."""
    offsets = batch.column("flags").offsets.to_numpy()
    has_rows = offsets[1:] > offsets[:-1]
    closed = np.zeros(len(has_rows), bool)
    values = batch.column("flags").values.to_numpy()
    closed[has_rows] = ~is_open(values[offsets[1:][has_rows] - 1])
    return closed
