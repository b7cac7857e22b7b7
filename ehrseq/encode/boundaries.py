"""Starts and ends of encounters in whole tables: which ends close one, and which encounters lapse.

The number of open encounters is a running sum over the whole table; `within` makes it start at zero for each subject.
"""

from __future__ import annotations

import numpy as np

from ehrseq.encode.columns import CONTENT, DROPPED, END, START, EventColumns
from ehrseq.tokenization.ehr_rows import NO_TIME


class Boundaries:
    """Rows at which the number of open encounters changes; a row twice where encounters lapse at a start.

    Attributes:
        rows: Starts, ends that close an encounter, and rows that make encounters lapse, as positions in the table.
        open_after: Encounters of the subject that are open after each of them.
        lapsed: Encounters that lapse right before each of them, 0 for starts and ends.
        ended_rows, ended_keys: Where encounters with a visit_id end or lapse, and `keys` of those, in the rows' order.
    """

    def __init__(self, table: EventColumns) -> None:
        """Pair starts with ends; the ends that close nothing are dropped from the table's roles."""
        rows = np.flatnonzero((table.role >= START) & (table.time != NO_TIME))
        change = np.where(table.role[rows] == START, 1, -1)
        silence = table.silence(rows)
        closes_nothing, runs = _pair(table, rows, change, silence)
        lapses: list[tuple[int, int, int]] = []
        patient: _PatientRows | None = None
        for run in runs:  # patient by patient
            if patient is None or rows[run[0]] >= patient.stop:
                patient = _PatientRows(table, int(table.subject[rows[run[0]]]))
            lapses += _lapses(patient, rows[run], silence[run], closes_nothing, run)
        table.role[rows[closes_nothing]] = DROPPED
        rows, change = rows[~closes_nothing], change[~closes_nothing]
        self.lapsed = np.zeros(len(rows), np.int64)
        ended = (table.role[rows] == END) & table.has_visit[rows]
        self.ended_rows, self.ended_keys = rows[ended], keys(table, rows[ended])
        if lapses:
            at, count, start = np.asarray(lapses, np.int64).T
            rows = np.concatenate([at, rows])
            self.lapsed = np.concatenate([count, self.lapsed])
            order = np.argsort(rows, kind="stable")  # what lapses comes before the row's own change
            rows, self.lapsed = rows[order], self.lapsed[order]
            change = np.concatenate([-count, change])[order]
            known = table.has_visit[start]
            self.ended_rows = np.concatenate([self.ended_rows, at[known]])
            self.ended_keys = np.concatenate([self.ended_keys, keys(table, start[known])])
            order = np.argsort(self.ended_rows, kind="stable")
            self.ended_rows, self.ended_keys = self.ended_rows[order], self.ended_keys[order]
        self.rows, self.open_after = rows, within(np.cumsum(change), table.subject[rows])


def _pair(
    table: EventColumns, rows: np.ndarray, change: np.ndarray, silence: np.ndarray
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Ends that close nothing (a mask of the rows), and the runs of open encounters that may lapse, by subject.

    A run are the positions in `rows` of one (subject, visit_id) from a start that finds none of it open to the next
    such start. Most runs never rest for longer than their patience: they are not among those returned.
    """
    closes_nothing = np.zeros(len(rows), bool)
    if not len(rows):
        return closes_nothing, []
    # 1. Within one (subject, visit_id) the number of open encounters is a walk that does not go below zero: an end that
    # would take the plain sum to a new low closes nothing.
    key = keys(table, rows)
    order = np.argsort(key, kind="stable")
    is_new = np.ones(len(rows), bool)
    np.not_equal(key[order][1:], key[order][:-1], out=is_new[1:])
    group = np.cumsum(is_new)
    apart = group * (len(rows) + 1)  # keeps the lows of one group out of the next
    total = within(np.cumsum(change[order]), group)
    low = np.minimum(np.minimum.accumulate(total - apart) + apart, 0)
    before = np.concatenate([[0], low[:-1]])
    before[is_new] = 0
    closes_nothing[order] = low < before
    # 2. Runs, and how long each of their rows waits for the next one, or for the patient's last where they stay open.
    level = total - low
    level_before = np.concatenate([[0], level[:-1]])
    level_before[is_new] = 0
    first = np.flatnonzero((change[order] > 0) & (level_before == 0))
    if not len(first):
        return closes_nothing, []
    ends = np.flatnonzero(np.append(is_new[1:], True))
    last = np.minimum(np.append(first[1:], len(rows)) - 1, ends[group[first] - 1])
    time = table.time[rows[order]]
    wait = np.append(time[1:], time[-1:]) - time
    wait[ends] = table.time[table.begins[table.subject[rows[order[ends]]] + 1] - 1] - time[ends]
    run_of = np.zeros(len(rows), np.int64)
    run_of[first] = 1
    run_of = np.cumsum(run_of)
    apart = run_of * (silence.max() + 1)  # keeps the patience of one run out of the next
    patience = np.maximum.accumulate(np.where(change[order] > 0, silence[order], 0) + apart) - apart
    may_lapse = np.zeros(len(first) + 1, bool)
    may_lapse[run_of[(level > 0) & (wait > patience)]] = True
    chosen = [order[first[k] : last[k] + 1] for k in np.flatnonzero(may_lapse[1:])]
    return closes_nothing, sorted(chosen, key=lambda run: int(run[0]))


class _PatientRows:
    """Columns of one patient's rows as lists: quicker to walk over; `begin` and `stop` are positions in the table."""

    def __init__(self, table: EventColumns, subject: int) -> None:
        self.begin, self.stop = int(table.begins[subject]), int(table.begins[subject + 1])
        part = slice(self.begin, self.stop)
        self.role, self.time = table.role[part].tolist(), table.time[part].tolist()
        self.visit, self.has_visit = table.visit[part].tolist(), table.has_visit[part].tolist()


def _lapses(
    patient: _PatientRows, run_rows: np.ndarray, run_silence: np.ndarray, closes_nothing: np.ndarray, run: np.ndarray
) -> list[tuple[int, int, int]]:
    """Walk over the patient's rows from the run's start, as `ehr_sequence.patient_rows` does for one visit_id.

    Args:
        patient: The patient's rows.
        run_rows: Rows of the run's starts and ends.
        run_silence: Silence after which they lapse (of starts).
        closes_nothing: Mask of all starts and ends, mended here.
        run: Places of the run in the mask.

    Returns:
        (row that makes them lapse, encounters that lapse, row of the run's start) of each lapse.
    """
    begin, roles, times = patient.begin, patient.role, patient.time
    boundaries = (run_rows - begin).tolist()
    first = boundaries[0]
    visit, has_visit = patient.visit[first], patient.has_visit[first]
    lapses: list[tuple[int, int, int]] = []
    count = patience = since = passed = 0
    row = first
    while row < len(roles):
        role, time = roles[row], times[row]
        is_own = patient.has_visit[row] == has_visit and (not has_visit or patient.visit[row] == visit)
        if count and time - since > patience and role in (START, CONTENT) and not (is_own and has_visit):
            lapses.append((begin + row, count, begin + first))
            count = 0
        if is_own and role != DROPPED:
            since = time
            if role == START:
                patience = max(patience if count else 0, int(run_silence[passed]))
                count += 1
            elif role == END:
                closes_nothing[run[passed]] = count == 0
                count = max(0, count - 1)
            passed += role != CONTENT
        row += 1
        if not count:  # nothing more to watch until the run's next start or end
            if passed == len(boundaries):
                break
            row = boundaries[passed]
    return lapses


def keys(table: EventColumns, rows: np.ndarray) -> np.ndarray:
    """(subject, visit_id) of rows as one number: an odd multiple spreads the subjects over all 64 bits."""
    visit = np.where(table.has_visit[rows], table.visit[rows], np.uint64(0))
    array: np.ndarray = visit ^ (table.subject[rows].astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15))
    return array


def within(total: np.ndarray, group: np.ndarray) -> np.ndarray:
    """A running sum over ascending groups, made to start again in each."""
    if not len(total):
        return total
    begins = np.flatnonzero(np.diff(group, prepend=-1))
    before = np.concatenate([[0], total])[begins]
    array: np.ndarray = total - np.repeat(before, np.diff(np.append(begins, len(total))))
    return array
