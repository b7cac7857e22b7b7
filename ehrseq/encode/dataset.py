"""Training rows of encoded files: windows and prompts, cut from the mapped patients when they are asked for.

    data = EncodedDataset("runs/data/dataset/encoded")
    Trainer(train_dataset=PackableRows(data.windows(2048, ["pretrain", "train"])), ...)     # next-token prediction
    Trainer(train_dataset=data.prompts(read_labels(dataset), 2048, ["train"]), ...)         # multitask prompts

Rows are those of `EhrTokenizer.encode_histories(events)` with `windows` or `PromptedDataset`, in the same order; only
indices are held in memory. Every process of a `torchrun` may map the same files, each reads the rows that it is given;
`EncodedDataset.stream` gives every process files of its own instead.

The files themselves hold patients (`ehrseq.encode.files`): `datasets` maps or streams those like any Arrow or Parquet.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch.utils.data import Dataset

from ehrseq.encode.files import first_times, from_batch, is_open, open_batches, row_times
from ehrseq.encode.histories import prompt_table
from ehrseq.encode.labels import label_rows, rows_until
from ehrseq.encode.shards import SUMMARY
from ehrseq.tokenization.ehr_histories import window_statics
from ehrseq.tokenization.ehr_plans import check_context

if TYPE_CHECKING:
    import polars as pl
    import pyarrow as pa

    from ehrseq.tokenization.ehr_histories import EncodedHistories
    from ehrseq.tokenization.ehr_plans import PromptIndex
    from ehrseq.tokenization.tokenization_ehr import EhrTokenizer

_REMEMBERED = 8  # patients that stay decoded: rows of one patient often follow one another


def is_encoded(path: str | Path) -> bool:
    """Whether a folder is one that `ehrseq tokenize` has finished."""
    return (Path(path) / SUMMARY).is_file()


class EncodedDataset:
    """What `ehrseq tokenize` wrote.

    Args:
        path: Its folder.

    Raises:
        ValueError: The folder holds no finished encoding.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not is_encoded(path):
            raise ValueError(
                f"{self.path} holds no finished encoding (no {SUMMARY}); run `ehrseq tokenize`, again where it was "
                "stopped."
            )
        self.summary: dict[str, Any] = json.loads((self.path / SUMMARY).read_text(encoding="utf-8"))

    @cached_property
    def tokenizer(self) -> EhrTokenizer:
        """The tokenizer that the rows were encoded with."""
        from ehrseq.tokenization.tokenization_ehr import EhrTokenizer

        result: EhrTokenizer = EhrTokenizer.from_pretrained(self.path / "tokenizer")
        return result

    @property
    def splits(self) -> list[str]:
        """Names of the splits."""
        return sorted({name.partition("/")[0] for name in self.summary["files"]})

    def files(self, splits: str | Sequence[str] | None = None) -> list[str]:
        """The files of some splits, default all.

        Raises:
            ValueError: An unknown split.
        """
        wanted = self.splits if splits is None else [splits] if isinstance(splits, str) else list(splits)
        unknown = [name for name in wanted if name not in self.splits]
        if unknown:
            raise ValueError(f"{self.path} has no splits {unknown}; it has {self.splits}.")
        ending = self.summary["format"]
        names = [name for name in self.summary["files"] if name.partition("/")[0] in wanted]
        return [str(self.path / "data" / f"{name}.{ending}") for name in names]

    def patients(self, splits: str | Sequence[str] | None = None) -> EncodedPatients:
        """The patients of some splits, default all, mapped into memory (Parquet: read into it)."""
        return EncodedPatients(self.files(splits), self.path / "tokenizer", self.tokenizer)

    def windows(self, max_length: int, splits: str | Sequence[str] | None = None) -> EncodedWindows:
        """Pretraining rows: each history in consecutive windows cut at visit boundaries, no event lost.

        Args:
            max_length: Context length.
            splits: Splits of the patients, default all.
        """
        return EncodedWindows(self.patients(splits), max_length)

    def prompts(
        self, labels: Mapping[str, pl.DataFrame], max_length: int, splits: str | Sequence[str] | None = None
    ) -> EncodedPrompts:
        """MPF rows: one for each label of these patients.

        Args:
            labels: Task -> label table, as `read_labels` gives them; labels of other patients are skipped.
            max_length: Context length, task tokens included.
            splits: Splits of the patients, default all.

        Raises:
            ValueError: A task that the tokenizer has no token for.
        """
        patients = self.patients(splits)
        return EncodedPrompts(patients, _index(patients, labels), max_length)

    def stream(
        self,
        max_length: int,
        splits: str | Sequence[str] | None = None,
        *,
        seed: int = 0,
        repeat: bool = True,
        packable: bool = False,
    ) -> Any:
        """Pretraining rows as a `datasets.IterableDataset` whose files the processes and loader workers share out.

        For datasets that no machine holds whole: a process opens only files of its own. Trainer needs `max_steps`, and
        `accelerator_config={"dispatch_batches": False}`, without which the first process reads for all.

        Args:
            max_length: Context length.
            splits: Splits of the patients, default all.
            seed: Seed of the order: of the files, and of the windows within a batch of a file (about 600,000 rows),
                which is another one every time.
            repeat: Begin again at the end, without end: processes have unequal numbers of rows, and none may stop
                before the others.
            packable: Mark the rows for the packing collators, as `PackableRows` does.

        Raises:
            ValueError: Fewer files than processes.
        """
        from datasets import IterableDataset

        from ehrseq.encode.streaming import process_count, stream_windows

        check_context(max_length)
        files = self.files(splits)
        if len(files) < process_count():
            raise ValueError(
                f"{self.path} has {len(files)} files of {splits or 'all splits'} for {process_count()} processes; "
                "write smaller shards, or use windows(), which every process can map."
            )
        order = np.random.default_rng(seed).permutation(len(files)).tolist()
        stream = IterableDataset.from_generator(
            stream_windows,
            gen_kwargs={
                "files": [files[number] for number in order],
                "tokenizer": str(self.path / "tokenizer"),
                "max_length": max_length,
                "seed": seed,
                "packable": packable,
                "stream": uuid4().hex,
            },
        )
        return stream.repeat(None) if repeat else stream


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
        found = self._decoded.pop(patient, None)
        if found is None:
            batch = self._batches[self._batch[patient]].slice(int(self._place[patient]), 1)
            found = self._encoder.histories(from_batch(batch))
            if len(self._decoded) >= _REMEMBERED:
                self._decoded.pop(next(iter(self._decoded)))
        self._decoded[patient] = found
        return found

    def parts(self, wanted: NDArray[np.bool_]) -> Iterator[tuple[NDArray[np.int64], EncodedHistories]]:
        """Histories batch by batch, of those batches that hold a wanted patient.

        Yields:
            Position of each patient of the batch, and their histories.
        """
        for number in np.unique(self._batch[wanted]).tolist():
            yield self._positions(number), self._encoder.histories(from_batch(self._batches[number]))

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

    @property
    def task_names(self) -> list[str]:
        """The tokenizer's tasks."""
        return list(self._tasks)

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


class EncodedWindows(Dataset[dict[str, Any]]):
    """Pretraining rows, see `EncodedDataset.windows`.

    Attributes:
        lengths: Tokens of each window, [windows].
    """

    def __init__(self, patients: EncodedPatients, max_length: int) -> None:
        self.patients, self.max_length = patients, check_context(max_length)
        # 1. A history that fits is one window: its length is known without its tokens.
        statics = window_statics(patients.statics.astype(np.int64), max_length)
        whole = 1 + statics + patients.tokens + 2 * patients.closed
        fits = whole <= max_length
        patient = np.flatnonzero(fits)
        parts = [(patient, np.zeros(len(patient), np.int64), patients.tokens[fits], whole[fits])]
        # 2. The others are cut, which needs their visits.
        for positions, histories in patients.parts(~fits):
            plan = histories.plan_windows(max_length)
            cut = ~fits[positions[plan.history]]
            parts.append((positions[plan.history[cut]], plan.start[cut], plan.end[cut], plan.lengths[cut]))
        patient, start, end, lengths = (np.concatenate(column) for column in zip(*parts, strict=True))
        order = np.lexsort((start, patient))
        self._patient, self._start, self._end, self.lengths = (
            column[order].astype(dtype)
            for column, dtype in ((patient, np.int32), (start, np.int32), (end, np.int32), (lengths, np.int64))
        )
        self._is_last = np.append(self._patient[1:] != self._patient[:-1], True)[: len(order)]

    def __len__(self) -> int:
        return len(self._patient)

    def __getitem__(self, row: int) -> dict[str, Any]:
        if not -len(self) <= row < len(self):
            raise IndexError(f"window {row} of {len(self)}")
        histories = self.patients.history(int(self._patient[row]))
        plan = histories.plan_pieces(
            np.zeros(1, np.int64),
            np.asarray([self._start[row]], np.int64),
            np.asarray([self._end[row]], np.int64),
            np.asarray([self._is_last[row]]),
            self.max_length,
        )
        return histories.row(plan, 0)

    @property
    def subject_ids(self) -> NDArray[np.int64]:
        """Patient of each window."""
        array: np.ndarray = self.patients.subject_ids[self._patient]
        return array


class EncodedPrompts(Dataset[dict[str, Any]]):
    """MPF rows as indices into encoded patients, see `EncodedDataset.prompts`; what `PromptedDataset` is in memory.

    Args:
        patients: The patients.
        index: `patient`, `known` (rows), `task`, `label`, `prediction_time` of each row, and nothing else: 19 bytes.
        max_length: Context length.
    """

    def __init__(self, patients: EncodedPatients, index: Mapping[str, NDArray[Any]], max_length: int) -> None:
        self.patients, self.index, self.max_length = patients, dict(index), check_context(max_length)

    def __len__(self) -> int:
        return len(self.index["patient"])

    def __getitem__(self, row: int) -> dict[str, Any]:
        if not -len(self) <= row < len(self):
            raise IndexError(f"row {row} is outside 0..{len(self) - 1}")
        histories, prompts = self.of_patient(np.asarray([row]))
        return histories.prompted_row(prompts, 0, self.max_length)

    @property
    def subject_ids(self) -> NDArray[np.int64]:
        """`[n]` patient of each row (for the bootstrap over patients)."""
        array: np.ndarray = self.patients.subject_ids[self.index["patient"]]
        return array

    @property
    def labels(self) -> NDArray[np.int64]:
        """`[n]` labels."""
        return self.index["label"].astype(np.int64)

    @property
    def task_ids(self) -> NDArray[np.int64]:
        """`[n]` task ids."""
        return self.index["task"].astype(np.int64)

    @property
    def prediction_times(self) -> NDArray[np.datetime64]:
        """`[n]` prediction times, datetime64[us] (naive UTC)."""
        return self.index["prediction_time"].astype("datetime64[us]")

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """`[n]` tokens of each row; the patients are decoded for it, batch by batch."""
        lengths = np.zeros(len(self), np.int64)
        for rows, histories, prompts in self.parts():
            lengths[rows] = histories.plan_prompts(prompts, self.max_length).lengths
        return lengths

    def tables(self) -> Iterator[pa.Table]:
        """The rows as tables of `EhrTokenizer.encode_table`, batch by batch, in the order of the files."""
        for _, histories, prompts in self.parts():
            yield prompt_table(histories, prompts, self.max_length)

    def parts(self) -> Iterator[tuple[NDArray[np.int64], EncodedHistories, PromptIndex]]:
        """Batch by batch: which rows, the batch's histories, and the rows as an index into them."""
        wanted = np.zeros(len(self.patients), bool)
        wanted[self.index["patient"]] = True
        place = np.full(len(self.patients), -1)
        for positions, histories in self.patients.parts(wanted):
            place[positions] = np.arange(len(positions))
            rows = np.flatnonzero(place[self.index["patient"]] >= 0)
            yield rows, histories, self._prompts(histories, rows, place[self.index["patient"][rows]])
            place[positions] = -1

    def of_patient(self, rows: NDArray[np.int64]) -> tuple[EncodedHistories, PromptIndex]:
        """One patient's history, and some of their rows as an index into it."""
        histories = self.patients.history(int(self.index["patient"][rows[0]]))
        return histories, self._prompts(histories, rows, np.zeros(len(rows), np.int64))

    def subset(self, rows: ArrayLike) -> EncodedPrompts:
        """The dataset of these rows, in this order (repeats allowed)."""
        chosen = np.asarray(rows)
        return EncodedPrompts(
            self.patients, {name: column[chosen] for name, column in self.index.items()}, self.max_length
        )

    def _prompts(self, histories: EncodedHistories, rows: NDArray[np.int64], history: NDArray[np.int64]) -> PromptIndex:
        return histories.index_rows(
            history,
            self.index["known"][rows],
            task=self.index["task"][rows],
            label=self.index["label"][rows],
            prediction_time=self.index["prediction_time"][rows],
        )


def _index(patients: EncodedPatients, labels: Mapping[str, pl.DataFrame]) -> dict[str, NDArray[Any]]:
    rows = label_rows(labels, patients.subject_ids, patients.task_names)
    return {
        "patient": rows.history.astype(np.int32),
        "known": patients.rows_until(rows.history, rows.prediction_time).astype(np.int32),
        "task": rows.task.astype(np.int16),
        "label": rows.label.astype(np.int8),
        "prediction_time": rows.prediction_time,
    }


def _closed(batch: pa.RecordBatch) -> NDArray[np.bool_]:
    """Whether each patient has rows, and no visit is open after the last."""
    offsets = batch.column("flags").offsets.to_numpy()
    has_rows = offsets[1:] > offsets[:-1]
    closed = np.zeros(len(has_rows), bool)
    values = batch.column("flags").values.to_numpy()
    closed[has_rows] = ~is_open(values[offsets[1:][has_rows] - 1])
    return closed
