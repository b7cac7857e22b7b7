"""A prepared dataset as encoded rows: every file becomes a file, by the columnar encoder, patients in blocks.

    <output>/tokenizer/            what `EhrTokenizer.from_pretrained` loads
    <output>/data/<split>/<n>.arrow (or .parquet), see `ehrseq.encode.files`
    <output>/encoded.json          their provenance, and counts; there only when all is

A file appears whole or not at all, and holds its provenance (digests of its source and of the tokenizer): a run that
was stopped makes only what is missing, and ends with the same bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ehrseq.data.shards import BLOCK_ROWS, Shard, dataset_shards, read_blocks
from ehrseq.encode.encoder import read_rows
from ehrseq.encode.files import FORMATS, FileWriter, file_schema, provenance_of, stream_batches
from ehrseq.tokenization.ehr_vocabulary import SPECIAL_TOKENS, UNK, EventVocabulary
from ehrseq.work.engine import Engine
from ehrseq.work.files import file_digest, remove, write_json, write_whole
from ehrseq.work.parts import Part, run_parts

if TYPE_CHECKING:
    from ehrseq.tokenization.tokenization_ehr import EhrTokenizer

SUMMARY = "encoded.json"
_COUNTS = ("patients", "rows", "tokens", "unknown_rows", "bytes")


@dataclass(frozen=True)
class EncodePart(Part[dict[str, Any]]):
    """Rows of one file; its provenance lies in the file itself, for it stays.

    Attributes:
        shard: The file.
        path: Where its rows go.
        tokenizer: Folder of the tokenizer.
        tokenizer_digest: Digest of the tokenizer.
        format: One of `FORMATS`.
    """

    shard: Shard
    path: str
    tokenizer: str
    tokenizer_digest: str
    format: str

    @property
    def name(self) -> str:
        """The file, in messages."""
        return self.shard.path

    def provenance(self) -> dict[str, str]:
        """Digests of the file and of the tokenizer."""
        return {"source": file_digest(self.shard.path), "tokenizer": self.tokenizer_digest}

    def read(self, provenance: Mapping[str, object]) -> dict[str, Any] | None:
        """Counts of the rows, read from their file: those of a file that was there are those of one just made."""
        if provenance_of(self.path) != provenance:
            return None
        return {**_counts(Path(self.path), read_vocabulary(self.tokenizer)), "source": provenance["source"]}

    def write(self, provenance: Mapping[str, object]) -> dict[str, Any]:
        """See `Part.write`."""
        vocabulary = read_vocabulary(self.tokenizer)
        schema = file_schema(len(vocabulary.token_ids), provenance)

        def write(temporary: Path) -> None:
            with FileWriter(temporary, schema, self.format) as writer:
                for block in read_blocks(self.shard, rows=BLOCK_ROWS):
                    writer.write(read_rows(block, vocabulary))

        write_whole(self.path, write)
        return {**_counts(Path(self.path), vocabulary), "source": provenance["source"]}


def encode_dataset(
    dataset: str | Path,
    output: str | Path,
    tokenizer: EhrTokenizer | str | Path,
    *,
    format: str = "arrow",
    splits: Sequence[str] | None = None,
    engine: Engine | None = None,
) -> dict[str, Any]:
    """Encode the patients of a prepared dataset.

    Args:
        dataset: Folder of a prepared dataset.
        output: Folder to write; what an earlier run has left there is used where it is the same, else replaced.
        tokenizer: A tokenizer, or its folder; it is kept in the output.
        format: `arrow`: mapped into memory for training; `parquet`: a third of the bytes, to keep or to stream.
        splits: Splits to encode, default all.
        engine: Where to work, default all cores of this machine.

    Returns:
        What `encoded.json` holds: counts of all files and of each.

    Raises:
        ValueError: No prepared dataset, an unknown format or split, a file that cannot be read.
    """
    from ehrseq.tokenization.tokenization_ehr import EhrTokenizer

    check_output(dataset, output, format)
    shards = dataset_shards(dataset)
    unknown = sorted(set(splits or ()) - {shard.split for shard in shards})
    if unknown:
        raise ValueError(f"{dataset} has no splits {unknown}; it has {sorted({shard.split for shard in shards})}.")
    if splits is not None:
        shards = [shard for shard in shards if shard.split in splits]
    root = Path(output)
    chosen = EhrTokenizer.from_pretrained(tokenizer) if isinstance(tokenizer, str | Path) else tokenizer
    # 1. The tokenizer, in front of the rows. Another one than was there makes all of them anew.
    root.mkdir(parents=True, exist_ok=True)
    remove(root / SUMMARY)
    kept = root / "tokenizer"
    if not (isinstance(tokenizer, str | Path) and Path(tokenizer).resolve() == kept.resolve()):
        write_whole(kept, chosen.save_pretrained)
    digest = _tokenizer_digest(kept)
    # 2. The rows.
    parts = [
        EncodePart(shard, str(root / "data" / shard.split / f"{shard.number}.{format}"), str(kept), digest, format)
        for shard in shards
    ]
    wanted = {part.path for part in parts}
    for path in (root / "data").rglob("*"):
        if path.is_file() and str(path) not in wanted and provenance_of(path):  # rows of a file that is no more
            remove(path)
    reports = list(run_parts(parts, desc="Encoding", folder=root, engine=engine))
    # 3. What they are.
    summary = {
        "format": format,
        "tokenizer": digest,
        "vocabulary": len(chosen),
        "fitted": chosen.fitted,
        **{name: sum(report[name] for report in reports) for name in _COUNTS},
        "source_bytes": sum(Path(shard.path).stat().st_size for shard in shards),
        "files": {shard.name: report for shard, report in zip(shards, reports, strict=True)},
    }
    write_json(root / SUMMARY, summary, indent=2)
    return summary


def check_output(dataset: str | Path, output: str | Path, format: str) -> None:
    """Refuse an unknown format, and a dataset as the folder for the rows.

    Raises:
        ValueError: See above.
    """
    if format not in FORMATS:
        raise ValueError(f"format got {format!r}; expected one of {list(FORMATS)}.")
    root = Path(output)
    if (root / "metadata").exists() or root.resolve() == Path(dataset).resolve():
        raise ValueError(f"{root} is a dataset; give another folder for the encoded rows, such as {root / 'encoded'}.")


def read_vocabulary(folder: str | Path) -> EventVocabulary:
    """The vocabulary of a saved tokenizer, without transformers: a worker starts in a second."""
    return _read_vocabulary(str(folder), _tokenizer_digest(Path(folder)))


@lru_cache(maxsize=1)
def _read_vocabulary(folder: str, _: str) -> EventVocabulary:
    saved = json.loads((Path(folder) / "tokenizer.json").read_text(encoding="utf-8"))
    stored = json.loads((Path(folder) / "tokenizer_config.json").read_text(encoding="utf-8"))["event_vocabulary"]
    ids = {**saved["model"]["vocab"], **{entry["content"]: entry["id"] for entry in saved["added_tokens"]}}
    reserved = frozenset([*SPECIAL_TOKENS, *(token for _, token in stored["tasks"])])
    return EventVocabulary(ids, stored["value_bins"], stored["kinds"], stored["code_map"], reserved)


def _counts(path: Path, vocabulary: EventVocabulary) -> dict[str, int]:
    """Counts of a file of rows."""
    counts = dict.fromkeys(_COUNTS, 0)
    unknown = vocabulary.token_ids[UNK]
    for batch in stream_batches(path):
        ids = batch.column("ids")
        rows = ids.flatten().to_numpy()
        counts["patients"] += batch.num_rows
        counts["rows"] += len(rows)
        counts["tokens"] += int(batch.column("tokens").to_numpy().sum()) + len(batch.column("static_ids").flatten())
        counts["unknown_rows"] += int(np.count_nonzero(rows == unknown))
    counts["bytes"] = path.stat().st_size
    return counts


def _tokenizer_digest(folder: Path) -> str:
    """One digest over the files that say what a tokenizer is."""
    digests = [file_digest(folder / name) for name in ("tokenizer.json", "tokenizer_config.json")]
    return hashlib.sha256("".join(digests).encode()).hexdigest()
