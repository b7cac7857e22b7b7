"""What of `EncodedHistories` stays in the package: rows for label tables, and pretraining windows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ehrseq.encode.follow_up import silence_of_histories
from ehrseq.encode.labels import labels_of_subjects, rows_until
from ehrseq.encode.windows import plan_windows

if TYPE_CHECKING:
    from ehrseq.encode.follow_up import EndOfData
    from ehrseq.encode.rows import HistoryWindows
    from ehrseq.tokenization.ehr_histories import EncodedHistories
    from ehrseq.tokenization.ehr_plans import PromptIndex


def index_labels(histories: EncodedHistories, labels: Mapping[str, Any]) -> PromptIndex:
    """Rows for labels, see `EncodedHistories.index_labels`."""
    rows = labels_of_subjects(labels, histories.subject_ids, histories.task_names)
    known = rows_until(histories.row_time, histories.row_offsets, rows.history, rows.prediction_time)
    return histories.index_rows(rows, known)


def windows(histories: EncodedHistories, max_length: int, end_of_data: EndOfData | None = None) -> HistoryWindows:
    """Pretraining rows, see `EncodedHistories.windows`."""
    from ehrseq.encode.rows import HistoryWindows  # here, since it brings torch, which tables do not need

    silent = None if end_of_data is None else silence_of_histories(histories, end_of_data)
    return HistoryWindows(histories, plan_windows(histories, max_length), silent)
