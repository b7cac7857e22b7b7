"""From counts to a vocabulary: bins, selection by frequency, ids; deterministic in the events as a set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ehrseq.encode.counts import EventCounts
from ehrseq.tokenization.ehr_codes import category_and_chapter
from ehrseq.tokenization.ehr_plans import MIN_CONTEXT
from ehrseq.tokenization.ehr_vocabulary import (
    KIND_TYPES,
    PAPER_TASK_TOKENS,
    SPECIAL_TOKENS,
    SPECIAL_TYPES,
    TYPE_CLS,
    TYPE_OTHER,
    EventVocabulary,
    bin_token,
)


def fit_vocabulary(
    counts: EventCounts,
    *,
    num_value_bins: int,
    min_count: int,
    min_text_subjects: int,
    max_vocab_size: int | None,
    task_tokens: Sequence[str],
) -> tuple[EventVocabulary, list[int], float]:
    """Bin and select.

    Args:
        counts: Counts of the training subjects' events.
        num_value_bins: Bins of a (code, unit) pair; fewer where its values have ties.
        min_count: Rows that a token needs, those of the codes that it stands for included.
        min_text_subjects: Subjects that a text result needs: rare free text may identify a patient.
        max_vocab_size: Bound on all tokens; the most frequent event tokens stay.
        task_tokens: Tokens of the tasks; they take the last ids.

    Returns:
        The vocabulary; the token type of each id; how far the rank of a bin's edge can be off, as a share of the values
        of its (code, unit), 0 where all are exact.
    """
    # 1. Candidates: token -> rows, and kind. A parent stands for its descendants, so it counts their rows too.
    count_of: dict[str, int] = {}
    kind_of_token: dict[str, str] = {}

    def count(token: str, code: str, number: int) -> None:
        kind = counts.kind(code)
        if kind is not None:
            count_of[token] = count_of.get(token, 0) + number
            kind_of_token.setdefault(token, kind)

    for code, number in sorted(counts.rows.items()):
        for token in (code, *category_and_chapter(code)):
            count(token, code, number)
    value_bins: dict[str, dict[str, list[float]]] = {}
    quantiles = np.arange(1, num_value_bins) / num_value_bins
    groups, totals, largest, edges, errors = counts.values.quantiles(quantiles)
    pairs = list(counts.pairs)
    place_of = {pairs[group]: place for place, group in enumerate(groups.tolist())}
    rank_error = 0.0
    for (code, unit), place in sorted(place_of.items()):
        number = int(totals[place])
        if number < min_count:
            continue
        # No value lies above the largest: an edge there would bound a bin that is never seen.
        inner = sorted({edge for edge in edges[place].tolist() if edge < largest[place]})
        value_bins.setdefault(code, {})[unit] = inner
        rank_error = max(rank_error, int(errors[place]) / number)
        for k in range(len(inner) + 1):  # a quantile bin holds about its share, which is count enough to select by
            count(bin_token(code, unit, k), code, max(min_count, number // (len(inner) + 1)))
    for code, text, number, subjects in counts.texts().iter_rows():
        if subjects >= min_text_subjects:
            count(f"{code}//{text}", code, number)

    # 2. Selection by frequency, ids by name: the same rows give the same ids in any order.
    fixed = {*SPECIAL_TOKENS, *task_tokens}
    chosen = sorted(token for token, number in count_of.items() if number >= min_count and token not in fixed)
    if max_vocab_size is not None:
        room = max(0, max_vocab_size - len(fixed))  # `check_settings` has refused less
        chosen = sorted(sorted(chosen, key=lambda token: (-count_of[token], token))[:room])
    tokens = [*SPECIAL_TOKENS, *chosen, *task_tokens]
    types = [
        *(SPECIAL_TYPES.get(token, TYPE_OTHER) for token in SPECIAL_TOKENS),
        *(KIND_TYPES[kind_of_token[token]] for token in chosen),
        *(TYPE_CLS for _ in task_tokens),
    ]
    token_ids = {token: i for i, token in enumerate(tokens)}
    vocabulary = EventVocabulary(token_ids, value_bins, counts.kinds, counts.code_map, frozenset(fixed))
    return vocabulary, types, rank_error


def check_settings(
    *, max_vocab_size: int | None, tasks: Sequence[str | Mapping[str, Any]], **numbers: Any
) -> dict[str, str]:
    """Check the settings of `EhrTokenizer.train`, before anything is counted; returns task name -> token.

    Raises:
        ValueError: One is out of range, or a task is unknown or repeated.
    """
    least = {"max_num_visits": 2, "model_max_length": MIN_CONTEXT}
    if max_vocab_size is not None:
        numbers["max_vocab_size"] = max_vocab_size
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least.get(name, 1):
            raise ValueError(f"{name} got {value!r}; expected an integer of at least {least.get(name, 1)}.")
    tokens = _task_tokens(tasks)
    fixed = len(SPECIAL_TOKENS) + len(tokens)
    if max_vocab_size is not None and max_vocab_size < fixed:
        raise ValueError(
            f"max_vocab_size={max_vocab_size} is smaller than the {len(SPECIAL_TOKENS)} special and {len(tokens)} task "
            f"tokens; give at least {fixed}."
        )
    return tokens


def _task_tokens(tasks: Sequence[str | Mapping[str, Any]]) -> dict[str, str]:
    if isinstance(tasks, (str, Mapping)):
        raise ValueError(f"tasks got {tasks!r}; expected a list of names, or of mappings with 'name' and 'token'.")
    tokens: dict[str, str] = {}
    for task in tasks:
        if isinstance(task, str):
            name, token = task, PAPER_TASK_TOKENS.get(task, f"[{task.upper()}]")
        elif isinstance(task, Mapping) and {"name", "token"} <= set(task):
            name, token = str(task["name"]), str(task["token"])
        else:
            raise ValueError(
                f"a task got {task!r}; expected a name, or a mapping with 'name' and 'token' (Task.to_config())."
            )
        if name in tokens or token in tokens.values() or token in SPECIAL_TOKENS:
            raise ValueError(
                f"task {name!r} with token {token!r} stands twice, or its token is a special token; names and tokens "
                "must differ."
            )
        tokens[name] = token
    return tokens
