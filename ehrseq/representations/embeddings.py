"""Vectors of the patients or visits of a whole dataset, from any model of the package, in one Parquet file.

    report = embed_dataset("runs/finetuned", "data/prepared", "vectors.parquet", labels="data/prepared")
    found = read_embeddings("vectors.parquet")          # found.table, found.vectors [n, d]

A file of the dataset is a part: neither the events nor the vectors of all patients are ever held together, and a run
that was stopped goes on. A vector is the same up to the rounding of float32 whatever batch it stood in.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypedDict

import numpy as np
import polars as pl

from ehrseq.batches.requests import check_request
from ehrseq.batches.scoring import check_batch_size
from ehrseq.data.report import ConversionReport
from ehrseq.data.schema import LABEL_KEYS
from ehrseq.data.shards import Shard, ShardPart, read_blocks, scan_shard
from ehrseq.data.sources import read_source
from ehrseq.hub.checkpoints import checkpoint_digest, kept_backbone
from ehrseq.representations.embedding_files import join_embeddings, with_vectors
from ehrseq.representations.vectors import VectorWay, embed_rows, vector_rows, vector_size, vector_way
from ehrseq.tasks.moments import LabelSource, check_known, checked_times, of_patients, read_labelled_times
from ehrseq.work.engine import Engine
from ehrseq.work.files import file_digest, remove, write_whole
from ehrseq.work.parts import kept_parts, run_parts, table_digest


class EmbeddingCounts(TypedDict):
    """What was read of one file, and how many vectors were made."""

    events: int
    subjects: int
    vectors: int
    notes: dict[str, int]


@dataclass(frozen=True)
class EmbeddingPart(ShardPart[EmbeddingCounts]):
    """Vectors of the patients of one file.

    Attributes:
        checkpoint: Folder or name of the checkpoint.
        way: How vectors are made.
        times: Parquet file of subject_id, prediction_time; None = the ends.
        batch_size: Rows in one forward pass.
    """

    checkpoint: str
    way: VectorWay
    times: str | None
    batch_size: int

    def make(self) -> EmbeddingCounts:
        """See `RecordedPart.make`."""
        backbone = kept_backbone(self.checkpoint, checkpoint_digest(self.checkpoint))
        times = None if self.times is None else pl.read_parquet(self.times)
        notes: Counter[str] = Counter()
        events_read = subjects_read = 0
        nothing = np.empty((0, vector_size(backbone, self.way.pooling)), np.float32)
        frames: list[pl.DataFrame] = []
        for events in read_blocks(self.shard):
            subjects = events["subject_id"].unique()
            events_read += events.height
            subjects_read += len(subjects)
            here = None if times is None else times.filter(pl.col("subject_id").is_in(subjects.implode()))
            if here is None or not here.is_empty():
                asked = vector_rows(backbone, events, here, self.way)
                notes.update(asked.notes)
                vectors = embed_rows(backbone, asked, self.way.pooling, batch_size=self.batch_size)
                frames.append(with_vectors(asked.table, vectors))
        if not frames:
            frames.append(with_vectors(_no_rows(self.way), nothing))
        table = pl.concat(frames)
        write_whole(self.beside(".parquet"), table.write_parquet)
        counts = dict(+notes)
        return {"events": events_read, "subjects": subjects_read, "vectors": table.height, "notes": counts}


def embed_dataset(
    checkpoint: str | Path,
    data: str | Path | pl.DataFrame,
    out: str | Path,
    *,
    level: str = "patient",
    pooling: str | None = None,
    task: str | None = None,
    prediction_times: str | Path | pl.DataFrame | None = None,
    labels: LabelSource | None = None,
    splits: Sequence[str] | None = None,
    batch_size: int = 32,
    parts: str | Path | None = None,
    on_error: str = "raise",
    engine: Engine | None = None,
) -> ConversionReport:
    """Write the vectors of many patients or visits.

    Args:
        checkpoint: Folder of any model of the package with its tokenizer or feature extractor, pretrained or
            finetuned, or `owner/name` on the Hub.
        data: Folder of a prepared dataset; FHIR or MEDS (folder or file); or an event table.
        out: Parquet file to write: subject_id, prediction_time, of visits also visit (from 1), start, end (null where
            it is open at that time), and vector, a list of fixed size of float32. In the order of the dataset's files,
            subjects ascending in each. It appears whole or not at all.
        level: "patient": one vector a time; "visit": one for each visit that has begun by then, of the record as it
            stood when the visit ended.
        pooling: "last" token's state, "mean" of all, "first", a bi-LSTM's "ends", HyMaTE's "fused" vector; None: what
            the family's own classifier reads.
        task: A task whose question stands at the end of each row, as in finetuning; None = no question.
        prediction_times: Table (or Parquet or CSV file) of subject_id, prediction_time; None = the end of each record,
            or of each stay's window. Nothing later than it is read.
        labels: Labels whose times are the prediction times, those of all tasks together.
        splits: Splits of a prepared dataset whose patients are embedded, None = all.
        batch_size: Rows in one forward pass.
        parts: Folder for the vectors of each file: a run that was stopped goes on where it was. Removed at the end.
            None: a temporary one, so that it begins anew.
        on_error: FHIR only: "raise" or "skip" (counted in the report).
        engine: Where to work, default all cores of this machine.

    Returns:
        What was read, and what was left out.

    Raises:
        ValueError: An unknown level, pooling, task, patient or split; a way that this model does not have; unreadable
            data; a checkpoint without its encoder or with weights missing; nobody to embed.
    """
    check_batch_size(batch_size)
    check_request(data, None, prediction_times, labels)
    out = Path(out)
    digest = checkpoint_digest(checkpoint)
    backbone = kept_backbone(str(checkpoint), digest)
    way = vector_way(backbone, level, pooling, task)
    notice = getattr(backbone.model.config, "notice", None)
    events, shards, report = read_source(data, splits, on_error, purpose="embed")
    source = [table_digest(events)] if events is not None else [file_digest(shard.path) for shard in shards]
    times = _asked_times(prediction_times, labels)
    asked = None if times is None else table_digest(times)
    settings = [source, [shard.name for shard in shards], digest, asdict(way), batch_size, asked]
    with kept_parts(None if parts is None else Path(parts) / "vectors", settings) as folder:
        if events is not None:
            shards = [Shard(str(folder / "events.parquet"), "all", "0")]
            write_whole(shards[0].path, events.write_parquet)
        times_file = None
        if times is not None:
            found = [scan_shard(shard).select(pl.col("subject_id").unique()).collect() for shard in shards]
            times = _times_of(times, pl.concat(found)["subject_id"], report, from_labels=labels is not None)
            times_file = str(folder / "times.parquet")
            write_whole(times_file, times.write_parquet)
        work = [EmbeddingPart(shard, str(folder), str(checkpoint), way, times_file, batch_size) for shard in shards]
        report.events_written = report.subjects = vectors = 0
        for counts in run_parts(work, desc="Embedding", folder=folder, engine=engine):
            report.events_written += counts["events"]
            report.subjects += counts["subjects"]
            report.notes.update(counts["notes"])
            vectors += counts["vectors"]
        if not vectors:
            raise ValueError(f"{_named(data)} holds nobody to embed. What was read:\n{report}")
        report.notes["vectors written"] = vectors
        about = {"model": str(checkpoint), "digest": digest, **asdict(way), "notice": notice}
        write_whole(out, lambda file: join_embeddings([part.beside(".parquet") for part in work], file, about))
    if parts is not None:
        remove(Path(parts))
    return report


def _asked_times(prediction_times: str | Path | pl.DataFrame | None, labels: LabelSource | None) -> pl.DataFrame | None:
    """The times that are wanted, those of all labels together."""
    if labels is not None:
        tables = read_labelled_times(labels)
        if not tables:
            raise ValueError("the labels have no row; give times, or leave both out for the end of each record.")
        return pl.concat([table.select(LABEL_KEYS) for table in tables.values()]).unique().sort(LABEL_KEYS)
    return None if prediction_times is None else checked_times(prediction_times).sort(LABEL_KEYS)


def _times_of(times: pl.DataFrame, subjects: pl.Series, report: ConversionReport, *, from_labels: bool) -> pl.DataFrame:
    """The times of patients that are there; those of labels may speak of others, which are counted."""
    if not from_labels:
        check_known(times, subjects)
        return times
    notes: Counter[str] = Counter()
    known = of_patients(times, subjects, notes)
    if known.height < times.height:
        report.notes["labelled times of other patients, not embedded"] = times.height - known.height
    return known


def _no_rows(way: VectorWay) -> pl.DataFrame:
    keys = [*LABEL_KEYS, *(["visit", "start", "end"] if way.level == "visit" else [])]
    return pl.DataFrame(schema=dict.fromkeys(keys, pl.Null))


def _named(data: object) -> str:
    return str(data) if isinstance(data, str | Path) else "the table"
