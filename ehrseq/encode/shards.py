"""A prepared dataset as encoded rows: every file becomes a file, by the columnar encoder, patients in blocks.

    <output>/tokenizer/            what `EhrTokenizer.from_pretrained` loads
    <output>/data/<split>/<n>.arrow (or .parquet), see `ehrseq.encode.files`
    <output>/encoded.json          what they were made of, and counts; there only when all is

A file appears whole or not at all, and says what it was made of (digests of its source and of the tokenizer): a run
that was stopped makes only what is missing, and ends with the same bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ehrseq.data.shards import BLOCK_ROWS, Shard, dataset_shards, read_blocks
from ehrseq.encode.encoder import read_rows
from ehrseq.encode.files import FORMATS, FileWriter, file_schema, made_of, stream_batches
from ehrseq.tokenization.ehr_vocabulary import SPECIAL_TOKENS, UNK, EventVocabulary
from ehrseq.work.engine import Engine, get_engine
from ehrseq.work.files import file_digest, remove, remove_unfinished, write_whole

if TYPE_CHECKING:
    from ehrseq.tokenization.tokenization_ehr import EhrTokenizer

SUMMARY = "encoded.json"
_COUNTS = ("patients", "rows", "tokens", "unknown_rows", "bytes")


@dataclass(frozen=True)
class EncodeWork:
    """One file to encode.

    Attributes:
        shard: The file.
        path: Where its rows go.
        tokenizer: Folder of the tokenizer.
        made_of: Digest of the tokenizer.
        format: One of `FORMATS`.
    """

    shard: Shard
    path: str
    tokenizer: str
    made_of: str
    format: str

    @property
    def name(self) -> str:
        """The file, in messages."""
        return self.shard.path


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
    remove_unfinished(root)
    remove(root / SUMMARY)
    own = root / "tokenizer"
    if not (isinstance(tokenizer, str | Path) and Path(tokenizer).resolve() == own.resolve()):
        write_whole(own, lambda folder: _save_tokenizer(chosen, folder))
    digest = _tokenizer_digest(root / "tokenizer")
    # 2. The rows.
    work = [
        EncodeWork(
            shard,
            str(root / "data" / shard.split / f"{shard.number}.{format}"),
            str(root / "tokenizer"),
            digest,
            format,
        )
        for shard in shards
    ]
    wanted = {entry.path for entry in work}
    for path in (root / "data").rglob("*"):
        if path.is_file() and str(path) not in wanted and made_of(path):  # rows of a file that is no more
            remove(path)
    found = list((engine or get_engine()).map(encode_shard, work, desc="Encoding"))
    # 3. What they are.
    summary = {
        "format": format,
        "tokenizer": digest,
        "vocabulary": len(chosen),
        "fitted": chosen.fitted,
        **{name: sum(counts[name] for counts in found) for name in _COUNTS},
        "source_bytes": sum(Path(shard.path).stat().st_size for shard in shards),
        "files": {shard.name: counts for shard, counts in zip(shards, found, strict=True)},
    }
    text = json.dumps(summary, indent=2) + "\n"
    write_whole(root / SUMMARY, lambda path: _write_text(path, text))
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


def encode_shard(work: EncodeWork) -> dict[str, Any]:
    """Encode one file, if its rows are not there already; returns their counts."""
    source = {"source": file_digest(work.shard.path), "tokenizer": work.made_of}
    vocabulary = read_vocabulary(work.tokenizer)
    path = Path(work.path)
    if made_of(path) != source:
        schema = file_schema(len(vocabulary.token_ids), source)

        def write(temporary: Path) -> None:
            with FileWriter(temporary, schema, work.format) as writer:
                for block in read_blocks(work.shard, rows=BLOCK_ROWS):
                    writer.write(read_rows(block, vocabulary))

        write_whole(path, write)
    return {**_counts(path, vocabulary), "source": source["source"]}


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
    """Counts of a file, read from it: those of a file that was there are those of one just made."""
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


def _save_tokenizer(tokenizer: EhrTokenizer, folder: Path) -> None:
    tokenizer.save_pretrained(folder)


def _tokenizer_digest(folder: Path) -> str:
    """One digest over the files that say what a tokenizer is."""
    parts = [file_digest(folder / name) for name in ("tokenizer.json", "tokenizer_config.json")]
    return hashlib.sha256("".join(parts).encode()).hexdigest()


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
