"""How long nothing came after a record's last visit: what the end of the data says of those who have not come back.

A record that ends with a closed visit is followed by silence up to the end of the data. The days of that silence stand
at the record's last token (the channel `silent_days`), so that a model learns that the next interval is longer. There
are none where the end of the data is unknown (of dates that are shifted patient by patient no common one is), where a
visit is open, and after a death. (A death without a time makes no token, so that it is not known here.)
"""

from __future__ import annotations

from datetime import date, datetime
from typing import TYPE_CHECKING

import numpy as np

from ehrseq.tasks.timeline import as_instant
from ehrseq.tokenization.ehr_codes import DAY_US
from ehrseq.tokenization.ehr_outcomes import death_ids
from ehrseq.tokenization.ehr_sequence import parse_time

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ehrseq.tokenization.ehr_histories import EncodedHistories
    from ehrseq.tokenization.ehr_rows import HistoryRows
    from ehrseq.tokenization.ehr_vocabulary import EventVocabulary

EndOfData = datetime | date | str
"""Last instant that the data cover, as `label_events` takes it."""


def silence_of_histories(histories: EncodedHistories, end_of_data: EndOfData) -> NDArray[np.float32]:
    """Days between each patient's last row and the end of the data.

    Args:
        histories: The patients.
        end_of_data: Last instant that the data cover: a datetime (UTC where it has no zone), a date (its last instant),
            or ISO 8601 text.

    Returns:
        [patients]; 0 where nothing is known of a silence, see the module's text.

    Raises:
        ValueError: `end_of_data` is no instant.
    """
    return _silence(
        histories.vocabulary,
        end_of_data,
        (histories.row_time, histories.row_open, histories.row_offsets),
        (histories.ids, histories.offsets),
        (histories.static_ids, histories.static_offsets),
    )


def silence_of_rows(rows: HistoryRows, vocabulary: EventVocabulary, end_of_data: EndOfData) -> NDArray[np.float32]:
    """The same of rows that are not laid out yet."""
    return _silence(
        vocabulary,
        end_of_data,
        (rows.time, rows.is_open, rows.row_offsets),
        (rows.ids, rows.row_offsets),
        (rows.static_ids, rows.static_offsets),
    )


def _silence(
    vocabulary: EventVocabulary,
    end_of_data: EndOfData,
    timed: tuple[NDArray[np.int64], NDArray[np.bool_], NDArray[np.int64]],
    *tokens: tuple[NDArray[np.int32], NDArray[np.int64]],
) -> NDArray[np.float32]:
    time, is_open, offsets = timed
    end = parse_time(as_instant(end_of_data), "end_of_data")
    if end is None:
        raise ValueError("end_of_data is null; give the last instant that the data cover.")
    silent = np.zeros(len(offsets) - 1, np.float32)
    has_rows = np.diff(offsets) > 0
    last = offsets[1:][has_rows] - 1
    silent[has_rows] = np.where(is_open[last], 0.0, np.maximum(end - time[last], 0) / DAY_US)
    deaths = np.asarray(death_ids(vocabulary), np.int64)
    for ids, places in tokens:
        before = np.concatenate([[0], np.cumsum(np.isin(ids, deaths))])
        silent[before[places[1:]] > before[places[:-1]]] = 0.0
    return silent
