"""A tokenizer for a prepared dataset of any size: one pass over the training patients, file by file.

Every file is counted by itself, the counts are merged in the order of the files: the tokenizer depends neither on who
works nor on how many. It equals `EhrTokenizer.train` on the whole table where no (code, unit) has more than
`sketches.EXACT_VALUES` distinct values; beyond, its bins' edges are off by no more than the stored
`bin_rank_error`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ehrseq.data.metadata import read_settings
from ehrseq.data.shards import ShardPart, dataset_shards, read_blocks
from ehrseq.encode.counts import EventCounts
from ehrseq.encode.sketches import EXACT_VALUES
from ehrseq.encode.vocabulary import check_settings
from ehrseq.work.engine import Engine
from ehrseq.work.files import write_whole
from ehrseq.work.parts import run_parts, settings_key

if TYPE_CHECKING:
    from ehrseq.tokenization.tokenization_ehr import EhrTokenizer

FITTED_SPLITS = ("pretrain", "train")
"""Splits whose patients a tokenizer may know."""
_COLUMNS = ("subject_id", "code", "numeric_value", "text_value", "unit")


@dataclass(frozen=True)
class CountPart(ShardPart[dict[str, int]]):
    """Counts of one file.

    Attributes:
        input_kinds: See `EventCounts`.
        code_map: See `EventCounts`.
        max_values: See `EventCounts`.
    """

    input_kinds: tuple[str, ...] | str | None
    code_map: tuple[tuple[str, ...], ...] | None
    max_values: int

    @property
    def settings(self) -> dict[str, Any]:
        """Arguments of `EventCounts`."""
        return {"input_kinds": self.input_kinds, "code_map": self.code_map, "max_values": self.max_values}

    def make(self) -> dict[str, int]:
        """See `RecordedPart.make`."""
        counts = EventCounts(**self.settings)
        for block in read_blocks(self.shard, columns=_COLUMNS):
            counts.add(block)

        def write(path: Path) -> None:
            with path.open("wb") as stream:
                np.savez(stream, allow_pickle=False, **counts.state())

        write_whole(self.beside(".npz"), write)
        return {"rows": counts.num_rows}

    def counts(self) -> EventCounts:
        """What was counted."""
        with np.load(self.beside(".npz"), allow_pickle=False) as state:
            return EventCounts.from_state(dict(state), **self.settings)


def fit_tokenizer(
    dataset: str | Path,
    parts: str | Path,
    *,
    splits: Sequence[str] = FITTED_SPLITS,
    input_kinds: str | Iterable[str] | None = None,
    code_map: Sequence[Sequence[str]] | None = None,
    max_values: int = EXACT_VALUES,
    engine: Engine | None = None,
    **settings: Any,
) -> EhrTokenizer:
    """Fit a tokenizer on the patients of some splits; their digest is stored in it.

    Args:
        dataset: Folder of a prepared dataset.
        parts: Folder for the counts of each file: a run that was stopped goes on where it was. Of no more use once the
            tokenizer is saved.
        splits: Splits to fit on; those that the dataset has.
        input_kinds: As of `EhrTokenizer.train`.
        code_map: As of `EhrTokenizer.train`; default: that of the dataset's metadata before the tokenizer's.
        max_values: Distinct values of a (code, unit) up to which its bins are exact.
        engine: Where to work, default all cores of this machine.
        settings: Further settings of `EhrTokenizer.train`.

    Raises:
        ValueError: No prepared dataset, no patients in these splits, or what `EhrTokenizer.train` refuses.
    """
    from ehrseq.tokenization.tokenization_ehr import EhrTokenizer

    known = {"num_value_bins": 1, "min_count": 1, "min_text_subjects": 1, "max_vocab_size": None, "tasks": ()}
    check_settings(**{**known, **settings})
    shards = [shard for shard in dataset_shards(dataset) if shard.split in splits]
    if not shards:
        there = sorted({shard.split for shard in dataset_shards(dataset)})
        raise ValueError(
            f"{dataset} has no patients in the splits {list(splits)} that the tokenizer is fitted on; it has {there}. "
            "Name training splits of it, never those that models are tested on."
        )
    if code_map is None:
        code_map = read_settings(dataset).rules
    counting: dict[str, Any] = {
        "input_kinds": input_kinds if input_kinds is None or isinstance(input_kinds, str) else tuple(input_kinds),
        "code_map": None if code_map is None else tuple(tuple(pair) for pair in code_map),
        "max_values": max_values,
    }
    counts = EventCounts(**counting)  # says what is wrong with a setting before anything is read
    folder = Path(parts) / settings_key(counting)
    work = [CountPart(shard, str(folder), **counting) for shard in shards]
    reports = run_parts(work, desc="Counting codes and values", folder=parts, engine=engine)
    for part, _ in zip(work, reports, strict=True):
        counts.merge(part.counts())
    return EhrTokenizer.from_counts(counts, **settings)
