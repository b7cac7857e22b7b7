"""Pretraining rows: every history in consecutive windows, cut at visit boundaries."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ehrseq.tokenization.ehr_plans import MAX_STATIC_SHARE, RowPlan, check_context
from ehrseq.tokenization.ehr_vocabulary import TYPE_VS

if TYPE_CHECKING:
    from ehrseq.tokenization.ehr_histories import EncodedHistories


def plan_windows(histories: EncodedHistories, max_length: int) -> RowPlan:
    """Consecutive windows of every history, cut before a [VS] where one lies in the window: every event is in
    exactly one.
    """
    check_context(max_length)
    whole = histories.plan_histories()
    lengths = whole.end
    head = 1 + window_statics(whole.statics, max_length)
    # 1. Histories that fit are one window each; the others are cut one after the other.
    fits = head + lengths + whole.tail <= max_length
    history, start, end, last = (
        [np.flatnonzero(fits)],
        [np.zeros(fits.sum(), np.int64)],
        [lengths[fits]],
        [fits[fits]],
    )
    for k in np.flatnonzero(~fits).tolist():
        pieces = _cut(histories, k, max_length - int(head[k]), int(whole.tail[k]))
        history.append(np.full(len(pieces), k))
        start.append(np.asarray([piece[0] for piece in pieces]))
        end.append(np.asarray([piece[1] for piece in pieces]))
        last.append(np.arange(len(pieces)) == len(pieces) - 1)
    place, starts, ends, is_last = (np.concatenate(part) for part in (history, start, end, last))
    order = np.argsort(place, kind="stable")
    return plan_pieces(histories, place[order], starts[order], ends[order], is_last[order], max_length)


def plan_pieces(
    histories: EncodedHistories,
    history: np.ndarray,
    start: np.ndarray,
    end: np.ndarray,
    is_last: np.ndarray,
    max_length: int,
) -> RowPlan:
    """Windows that were cut before, one entry a window in every argument; the last of a history carries its closing
    marks.
    """
    whole = histories.plan_histories()
    plan = histories.plan_rows(
        history,
        start,
        end,
        tail=np.where(is_last, whole.tail[history], 0),
        max_length=None,
        first_id=whole.first_id[history],
        last_id=whole.last_id[history],
        last_time=whole.last_time[history],
        close_time=whole.close_time[history],
        order=whole.order[history],
    )
    plan.statics = window_statics(whole.statics, max_length)[history]
    return plan


def _cut(histories: EncodedHistories, k: int, budget: int, tail: int) -> list[tuple[int, int]]:
    """Windows (start, end) of one history's body, each within the budget, the last with its closing marks too."""
    base, stop = int(histories.offsets[k]), int(histories.offsets[k + 1])
    first, behind = np.searchsorted(histories.visit_starts, (base, stop))
    visits = histories.visit_starts[first:behind]
    at, pieces = base, []
    while True:
        room = budget - int(histories.types[at] != TYPE_VS)  # inside a visit its [VS] is put back
        if stop - at + tail <= room:
            pieces.append((at - base, stop - base))
            return pieces
        # Cut before the last [VS] that the window reaches, else inside the visit; the rest must not be empty,
        # since the closing marks belong to some event.
        end = min(at + room, stop - 1)
        visit = int(visits[np.searchsorted(visits, end, side="right") - 1])
        if visit > at:
            end = visit
        pieces.append((at - base, end - base))
        # The marks between two visits do not lead a window.
        at = int(histories.next_content[end])


def window_statics(statics: np.ndarray, max_length: int) -> np.ndarray:
    """Static tokens in each window of histories that have so many: all, or none where they would crowd it."""
    return np.where((1 + statics) * MAX_STATIC_SHARE > max_length, 0, statics)
