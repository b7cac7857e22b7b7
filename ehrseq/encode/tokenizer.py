"""What of `EhrTokenizer` needs tables: fitting it, encoding whole tables, and how well it covers one.

A checkpoint's tokenizer carries what reads one patient; its table methods come here, where the package is installed.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import polars as pl
import pyarrow as pa
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from ehrseq.data.tables import check_columns
from ehrseq.encode.assembly import assemble, channel_columns, prompt_table
from ehrseq.encode.counts import EventCounts
from ehrseq.encode.encoder import Encoder, coverage_of
from ehrseq.encode.vocabulary import check_settings, fit_vocabulary
from ehrseq.encode.windows import plan_windows
from ehrseq.tokenization.ehr_histories import EncodedHistories
from ehrseq.tokenization.ehr_plans import check_context
from ehrseq.tokenization.ehr_sequence import subjects_digest
from ehrseq.tokenization.ehr_vocabulary import (
    CLS,
    LONG_TERM,
    MASK,
    MONTHS,
    PAD,
    REG,
    UNK,
    VE,
    VS,
    WEEKS,
    EventVocabulary,
)

logger = logging.getLogger(__name__)


class EventTokenizer(Protocol):
    """What of an `EhrTokenizer` the encoding of tables needs."""

    @property
    def vocabulary(self) -> EventVocabulary:
        """Rows to token ids."""

    @property
    def task_tokens(self) -> dict[str, str]:
        """Task name -> token, in the order of `task_ids`."""

    @property
    def max_num_visits(self) -> int:
        """Visit orders lie below it."""


def count_events(
    events: pl.DataFrame,
    settings: Mapping[str, Any],
    *,
    input_kinds: str | Iterable[str] | None,
    code_map: Sequence[Sequence[str]] | None,
) -> EventCounts:
    """The counts of one table, for `EhrTokenizer.train`; its settings are checked before anything is counted.

    Raises:
        ValueError: What `EhrTokenizer.train` refuses.
    """
    events = check_columns(events, ("subject_id", "code"), "EhrTokenizer.train: the event table")
    if events.height == 0:
        raise ValueError("EhrTokenizer.train got a table without rows; give the events of the training subjects.")
    check_settings(**settings)
    counts = EventCounts(input_kinds=input_kinds, code_map=code_map)
    counts.add(events)
    return counts


def fitted_settings(
    counts: EventCounts, *, tasks: Sequence[str | Mapping[str, Any]], model_max_length: int, **settings: Any
) -> dict[str, Any]:
    """Arguments of an `EhrTokenizer` that is fitted on counts, see `EhrTokenizer.from_counts`.

    Raises:
        ValueError: No events were counted, or a setting is out of range.
    """
    task_tokens = check_settings(tasks=tasks, model_max_length=model_max_length, **settings)
    if not counts.num_rows:
        raise ValueError("EhrTokenizer.from_counts got counts of no row; give the events of the training subjects.")
    max_num_visits = settings.pop("max_num_visits")
    vocabulary, types, rank_error = fit_vocabulary(counts, task_tokens=list(task_tokens.values()), **settings)
    subjects = counts.subjects.tolist()
    return {
        "tokenizer_object": Tokenizer(WordLevel(vocabulary.token_ids, unk_token=UNK)),
        "pad_token": PAD,
        "unk_token": UNK,
        "mask_token": MASK,
        "cls_token": CLS,
        "extra_special_tokens": [VS, VE, REG, *WEEKS, *MONTHS, LONG_TERM, *task_tokens.values()],
        "model_max_length": model_max_length,
        "event_vocabulary": {
            "value_bins": vocabulary.value_bins,
            "kinds": vocabulary.kinds,
            "code_map": vocabulary.code_map,
            "token_types": types,
            # Pairs, not a dict: transformers sorts the keys of what it saves, and the order is that of `task_ids`.
            "tasks": [[name, token] for name, token in task_tokens.items()],
            "max_num_visits": max_num_visits,
            "num_value_bins": settings["num_value_bins"],
            "min_count": settings["min_count"],
            "num_fitted_subjects": len(subjects),
            "fitted_subjects_digest": subjects_digest(subjects),
            "bin_rank_error": rank_error,
        },
    }


def encoder(tokenizer: EventTokenizer) -> Encoder:
    """What encodes event tables for a tokenizer, see `EhrTokenizer.encoder`."""
    vocabulary, tasks = tokenizer.vocabulary, tokenizer.task_tokens
    tokens = [vocabulary.token_ids[token] for token in tasks.values()]
    return Encoder(vocabulary, list(tasks), tokens, tokenizer.max_num_visits)


def encode_table(
    tokenizer: EventTokenizer,
    events: pl.DataFrame,
    labels: Mapping[str, pl.DataFrame] | None = None,
    max_length: int | None = None,
) -> pa.Table:
    """Rows of a whole table, see `EhrTokenizer.encode_table`."""
    if max_length is not None:
        check_context(max_length)
    if labels is not None:
        histories = encoder(tokenizer).encode(events)
        index = histories.index_labels(labels)
        if index.skipped:
            logger.warning("labels left out: %s", index.skipped)
        return prompt_table(histories, index, max_length)

    def assemble_part(histories: EncodedHistories) -> tuple[np.ndarray, tuple[dict[str, np.ndarray], np.ndarray]]:
        plan = histories.plan_histories() if max_length is None else plan_windows(histories, max_length)
        return histories.subject_ids[plan.history], assemble(histories, plan)

    parts = encoder(tokenizer).encode_parts(events, assemble_part)
    subjects = np.concatenate([subject_ids for subject_ids, _ in parts])
    return pa.table({"subject_id": pa.array(subjects, pa.int64())} | channel_columns([rows for _, rows in parts]))


def coverage(tokenizer: EventTokenizer, events: pl.DataFrame) -> dict[str, Any]:
    """How a table's rows are mapped, see `EhrTokenizer.coverage`."""
    counts = coverage_of(events, tokenizer.vocabulary)
    total = counts["exact"] + counts["fallback"] + counts["lost"]
    shares = {how: counts[how] / total if total else 0.0 for how in ("exact", "fallback", "lost")}
    numbers = {f"{how}_events": counts[how] for how in ("exact", "fallback", "lost")}
    others = {name: counts[name] for name in ("visit_boundaries", "not_used", "lapsed_encounters")}
    return shares | {"events": total} | numbers | others
