"""`ehrseq tokenize` as a function: fit a tokenizer where none is given, then encode; a stopped run goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ehrseq.data.shards import Shard, dataset_shards
from ehrseq.encode.fitting import FITTED_SPLITS, fit_tokenizer
from ehrseq.encode.shards import check_output, encode_dataset
from ehrseq.tasks.storage import label_tokens
from ehrseq.version import __version__
from ehrseq.work.engine import Engine, get_engine
from ehrseq.work.files import file_digest, remove, write_whole

FITTED_ON = "fitted_on.json"
"""Beside a tokenizer that was fitted here: its settings, and the digests of the files that it was fitted on."""


def tokenize_dataset(
    dataset: str | Path,
    output: str | Path | None = None,
    *,
    tokenizer: str | Path | None = None,
    tasks: Sequence[Any] | None = None,
    fit_splits: Sequence[str] = FITTED_SPLITS,
    format: str = "arrow",
    engine: Engine | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Fit a tokenizer on the training patients of a prepared dataset and encode all of its patients.

    Args:
        dataset: Folder of a prepared dataset.
        output: Folder to write, default `encoded` in the dataset.
        tokenizer: Folder of a tokenizer to use instead of a new one.
        tasks: As of `EhrTokenizer.train`; default: the tasks that the dataset has labels of.
        fit_splits: Splits of the patients that the tokenizer is fitted on.
        format: As of `encode_dataset`.
        engine: Where to work, default all cores of this machine.
        settings: Further settings of `fit_tokenizer`.

    Returns:
        What `encode_dataset` returns.

    Raises:
        ValueError: What `fit_tokenizer` and `encode_dataset` refuse; settings of a new tokenizer beside a given one.
    """
    root = Path(dataset) / "encoded" if output is None else Path(output)
    check_output(dataset, root, format)
    runner = engine or get_engine()
    if tokenizer is not None:
        unused = sorted(name for name, value in {"tasks": tasks, **settings}.items() if value is not None)
        if unused:
            raise ValueError(f"{unused} are settings of a new tokenizer, but {tokenizer} was given; leave out either.")
        return encode_dataset(dataset, root, tokenizer, format=format, engine=runner)
    if tasks is None:
        tasks = [{"name": name, "token": token} for name, token in label_tokens(dataset).items()]
    fit = {"version": __version__, "splits": sorted(fit_splits), "tasks": list(tasks), **settings}
    record: dict[str, Any] = {
        "settings": hashlib.sha256(json.dumps(fit, sort_keys=True, default=str).encode()).hexdigest(),
        "sources": {},
    }
    shards = [shard for shard in dataset_shards(dataset) if shard.split in fit_splits]
    folder = root / "tokenizer"
    kept = _read_record(folder)
    if kept.get("settings") == record["settings"]:
        # Fitted before; on the same files?
        record["sources"] = _digests(shards, runner)
    if kept != record or not shards:
        parts = root / ".counts"
        fitted = fit_tokenizer(dataset, parts, splits=fit_splits, tasks=tasks, engine=runner, **settings)
        record["sources"] = _digests(shards, runner)

        def write(temporary: Path) -> None:
            fitted.save_pretrained(temporary)
            (temporary / FITTED_ON).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")

        write_whole(folder, write)
        remove(parts)
    return encode_dataset(dataset, root, folder, format=format, engine=runner)


def _digests(shards: Sequence[Shard], engine: Engine) -> dict[str, str]:
    digests = engine.map(file_digest, [shard.path for shard in shards], desc="Comparing files")
    return {shard.name: digest for shard, digest in zip(shards, digests, strict=True)}


def _read_record(folder: Path) -> dict[str, Any]:
    try:
        record: dict[str, Any] = json.loads((folder / FITTED_ON).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record
