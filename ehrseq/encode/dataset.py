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
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import numpy as np

from ehrseq.encode.follow_up import EndOfData
from ehrseq.encode.patients import EncodedPatients
from ehrseq.encode.rows import HistoryWindows, PromptedDataset
from ehrseq.encode.shards import SUMMARY
from ehrseq.tokenization.ehr_plans import check_context

if TYPE_CHECKING:
    import polars as pl

    from ehrseq.tokenization.tokenization_ehr import EhrTokenizer


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

    def windows(
        self,
        max_length: int,
        splits: str | Sequence[str] | None = None,
        end_of_data: EndOfData | None = None,
    ) -> HistoryWindows:
        """Pretraining rows: each history in consecutive windows cut at visit boundaries, no event lost.

        Args:
            max_length: Context length.
            splits: Splits of the patients, default all.
            end_of_data: As of `EncodedHistories.windows`.
        """
        patients = self.patients(splits)
        silent = None if end_of_data is None else patients.silent_days(end_of_data)
        return HistoryWindows(patients, patients.plan_windows(max_length), silent)

    def prompts(
        self, labels: Mapping[str, pl.DataFrame], max_length: int, splits: str | Sequence[str] | None = None
    ) -> PromptedDataset:
        """MPF rows: one for each label of these patients.

        Args:
            labels: Task -> label table, as `read_labels` gives them; labels of other patients are skipped.
            max_length: Context length, task tokens included.
            splits: Splits of the patients, default all.

        Raises:
            ValueError: A task that the tokenizer has no token for.
        """
        patients = self.patients(splits)
        return PromptedDataset(patients, patients.index_labels(labels), check_context(max_length))

    def stream(
        self,
        max_length: int,
        splits: str | Sequence[str] | None = None,
        *,
        seed: int = 0,
        repeat: bool = True,
        packable: bool = False,
        end_of_data: EndOfData | None = None,
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
            end_of_data: As of `EncodedHistories.windows`.

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
                "end_of_data": end_of_data,
            },
        )
        return stream.repeat(None) if repeat else stream
