"""Pretraining rows file after file: what one process of many reads is what its own files hold."""

from __future__ import annotations

import os
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from ehrseq.encode.files import from_batch, stream_batches
from ehrseq.encode.follow_up import EndOfData
from ehrseq.tokenization.ehr_plans import SEGMENTS

_passes: Counter[tuple[str, str]] = Counter()
"""How often this process has begun to read a file for a stream: `datasets` calls `stream_windows` anew for every file
and every time it begins again, and each time is to have an order of its own."""


def stream_windows(
    files: Sequence[str],
    tokenizer: str,
    max_length: int,
    seed: int,
    packable: bool,
    stream: str,
    end_of_data: EndOfData | None = None,
) -> Iterator[dict[str, Any]]:
    """Windows of the files, see `EncodedDataset.stream`.

    Args:
        files: Encoded files; `datasets` gives every process and loader worker some of them.
        tokenizer: Folder of the tokenizer.
        max_length: Context length.
        seed: Seed of the order.
        packable: Whether the rows are marked for the packing collators.
        stream: Name of the stream; another one starts its passes from the first.
        end_of_data: As of `EncodedHistories.windows`.
    """
    encoder = _encoder(tokenizer)
    for file in files:
        name = "/".join(Path(file).parts[-2:])
        order = np.random.default_rng([seed, _passes[stream, file], zlib.crc32(name.encode())])
        _passes[stream, file] += 1
        for batch in stream_batches(file):
            windows = encoder.histories(from_batch(batch)).windows(max_length, end_of_data)
            for row in order.permutation(len(windows)).tolist():
                values = windows[row]
                if packable:
                    values[SEGMENTS] = np.ones(len(values["input_ids"]), np.int64)
                yield values


@lru_cache(maxsize=1)
def _encoder(folder: str) -> Any:
    from ehrseq.tokenization.tokenization_ehr import EhrTokenizer

    return EhrTokenizer.from_pretrained(folder).encoder()


def process_count() -> int:
    """Processes of this `torchrun`."""
    return int(os.environ.get("WORLD_SIZE", "1"))
