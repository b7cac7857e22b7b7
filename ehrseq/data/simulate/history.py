"""True risks at any time, read back from the rows that the process recorded.

A task's question is defined at one kind of moment; at another time t it is asked as follows, and the answer depends on
nothing but the rows recorded up to t:

- The discharge tasks: *if the latest admission ended at t with a discharge alive*. The process draws what follows a
  discharge from the features at that minute and from nothing else (`risk`), so this is what a discharge at t
  would draw: in hospital the risk moves with each reading, at the discharge it is the label's own, and at home it fades
  with the age of the readings and moves with those of outpatient visits. It is not the chance that what an earlier
  discharge has drawn is still to come: that fate is settled, whatever is recorded after it.
- `long_stay_7d` in the first 24 hours of an admission: *if the 24 hours were over at t*, of a stay that outlasts them.
  Later the draw is made, and no reading bears on it: the risk is that of the draw, given that the stay goes on at t
  (`long_stay_while_open`). How the later readings are spaced hints at the length of the stay; that is not used.

There is no answer (NaN)

- from the death of the patient on, and after the extraction;
- discharge tasks: before the first admission begins; for a new condition, from its first diagnosis on;
- `long_stay_7d`: outside of an admission, and in one that has lasted 168 hours, where the outcome is known.
"""

from __future__ import annotations

import numpy as np

from ehrseq.data.simulate.codes import CHRONIC, CONDITION_CODES, CONDITION_TASKS, MEASUREMENTS, VOCABULARY
from ehrseq.data.simulate.risk import (
    FEATURE_INDEX,
    SCORES,
    UTILISATION_HALF_LIFE_DAYS,
    Recorded,
    long_stay_while_open,
    outcome_risks,
    score_probabilities,
    standardise,
)
from ehrseq.data.simulate.state import DAY, EXTRACTION, HOUR, NEVER, STATIC, UNITS

_LATEST_MINUTE = 2**32 - 1
_LONG_AGO = -(2**40)
"""Minutes of what has not been recorded."""
_DISCHARGES = ("home", "snf", "hosp", "exp")


def _ids(*codes: str) -> np.ndarray:
    return np.array([VOCABULARY.index[code] for code in codes])


class _Track:
    """Rows of one kind, sorted by patient and time, for "the latest one at or before t".

    Args:
        row: int64 `[m]`, positions of patients.
        minutes: int64 `[m]`, not before 1970 (or any other numbers from 0 on, to look up equal ones).
        columns: What belongs to the rows, `[m]` each.

    Attributes:
        columns: The columns in the order of the track.
    """

    def __init__(self, row: np.ndarray, minutes: np.ndarray, *columns: np.ndarray) -> None:
        key = _key(row, minutes)
        order = np.argsort(key, kind="stable")
        self.columns = [column[order] for column in columns]
        self._keys = key[order]

    @property
    def rows(self) -> np.ndarray:
        """Patients, int64 `[m]`."""
        return self._keys >> 32

    @property
    def minutes(self) -> np.ndarray:
        """Times, int64 `[m]`."""
        return self._keys & _LATEST_MINUTE

    def latest(self, row: np.ndarray, minutes: np.ndarray) -> np.ndarray:
        """Place of the patient's last row at or before the time, -1 for none: int64 `[n]`."""
        place = np.searchsorted(self._keys, _key(row, minutes), side="right") - 1
        return np.where(_taken(self._keys, place, -1) >> 32 == row, place, -1)

    def time(self, place: np.ndarray) -> np.ndarray:
        """Minutes of the rows at these places, long ago where the place is -1."""
        return np.where(place >= 0, _taken(self._keys, place, 0) & _LATEST_MINUTE, _LONG_AGO)


def _taken(column: np.ndarray, place: np.ndarray, none: float) -> np.ndarray:
    """Values at these places of a column, `none` where the place is -1."""
    if len(column) == 0:
        return np.full(len(place), none, dtype=column.dtype)
    return np.where(place >= 0, column[place], none)


def _key(row: np.ndarray, minutes: np.ndarray) -> np.ndarray:
    key: np.ndarray = (row.astype(np.int64) << 32) | np.clip(minutes, 0, _LATEST_MINUTE)
    return key


class RecordedHistory:
    """What is recorded of a block of patients, ready for questions at any time.

    Args:
        events: `events` of a `SimulatedBlock`, in any order; rows after a time never bear on an answer at that time.
        count: Number of patients.
    """

    def __init__(self, events: dict[str, np.ndarray], count: int) -> None:
        self._events = {name: events[name] for name in ("row", "minutes", "code", "value", "unit", "encounter")}
        self.count = count
        self._read_persons()
        self._read_readings()
        self._read_diagnoses()
        self._read_admissions()
        self._events = {}

    def risk(self, task: str, rows: np.ndarray, minutes: np.ndarray) -> np.ndarray:
        """The risk of each patient at each time.

        Args:
            task: One of `SCORES`.
            rows: int64 `[n]`, positions of the patients in the block.
            minutes: int64 `[n]`, whole minutes since 1970.

        Returns:
            float64 `[n]`, NaN where there is no answer (see the head of this module).
        """
        place = self.starts.latest(rows, minutes)
        alive = (minutes < self.death[rows]) & (minutes <= EXTRACTION)
        known = np.flatnonzero(alive & (place >= 0))
        risks = np.full(len(rows), np.nan)
        rows, minutes, place = rows[known], minutes[known], place[known]
        if task == "long_stay_7d":
            risks[known] = self._long_stay(rows, minutes, place)
        else:
            draws = score_probabilities(self._recorded(rows, minutes, place).features(minutes))
            blocked = minutes - self.previous_end[place] < 365 * DAY
            diagnosed = self.diagnosed[rows] <= minutes[:, None]
            risks[known] = outcome_risks(draws, diagnosed, blocked)[task]
        return risks

    def _long_stay(self, rows: np.ndarray, minutes: np.ndarray, place: np.ndarray) -> np.ndarray:
        start = self.starts.time(place)
        lasted = minutes - start
        # What is recorded after 24 hours comes after the draw.
        at = np.minimum(minutes, start + DAY)
        draws = score_probabilities(self._recorded(rows, at, place).features(at))[:, SCORES.index("long_stay_7d")]
        is_open = (minutes < self.ends[place]) & (lasted < 7 * DAY)
        return np.where(is_open, long_stay_while_open(draws, np.minimum(lasted, 7 * DAY)), np.nan)

    def _recorded(self, rows: np.ndarray, minutes: np.ndarray, place: np.ndarray) -> Recorded:
        """What the scores see at these times, the latest admission being the one at `place` of the starts."""
        shape = (len(rows), len(MEASUREMENTS))
        z_last, z_mean = np.zeros(shape), np.zeros(shape)
        t_last = np.full(shape, _LONG_AGO)
        for k, (track, mean) in enumerate(zip(self.readings, self.means, strict=True)):
            latest = track.latest(rows, minutes)
            z_last[:, k], z_mean[:, k] = _taken(track.columns[0], latest, 0.0), _taken(mean, latest, 0.0)
            t_last[:, k] = track.time(latest)
        return Recorded(
            z_last,
            t_last,
            z_mean,
            self.coded_chronic[rows] <= minutes[:, None],
            self.utilisation[place],
            self.starts.time(place),
            self.visit_start[place],
            self.gap[place],
            self.birth[rows],
            self.male[rows],
        )

    # Reading the rows, once

    def _select(self, *codes: np.ndarray) -> dict[str, np.ndarray]:
        wanted = np.zeros(len(VOCABULARY.codes), dtype=bool)
        wanted[np.concatenate(codes)] = True
        keep = wanted[self._events["code"]]
        return {name: column[keep] for name, column in self._events.items()}

    def _first_times(self, groups: list[np.ndarray]) -> np.ndarray:
        """Minutes of each patient's first row of each group of codes, NEVER for none: int64 `[patients, groups]`."""
        first = np.full((self.count, len(groups)), NEVER)
        for k, codes in enumerate(groups):
            events = self._select(codes)
            np.minimum.at(first[:, k], events["row"], events["minutes"])
        return first

    def _read_persons(self) -> None:
        first = self._first_times([_ids("MEDS_BIRTH"), _ids("MEDS_DEATH"), _ids("GENDER//M")])
        self.birth, self.death = first[:, 0], first[:, 1]
        self.male = first[:, 2] == STATIC

    def _read_readings(self) -> None:
        """Per channel: its rows with their z; the mean of the readings up to each row where a score reads it."""
        self.readings: list[_Track] = []
        self.means: list[np.ndarray] = []
        for k, channel in enumerate(MEASUREMENTS):
            codes = _ids(*channel.codes)
            events = self._select(codes)
            factors = np.ones(len(UNITS))
            for unit, factor, _ in channel.units:
                factors[UNITS.index(unit)] = factor
            state = np.where(events["code"] == codes[-1], 1.0, -1.0)
            z = standardise(np.full(len(state), k), events["value"] / factors[events["unit"]], state)
            track = _Track(events["row"], events["minutes"], z)
            is_read = f"{channel.name}_mean" in FEATURE_INDEX
            self.readings.append(track)
            self.means.append(self._running_means(track) if is_read else np.empty(0))

    def _running_means(self, track: _Track) -> np.ndarray:
        """Sum of a patient's values up to each row / (1 + their number), summed one by one as the process does."""
        row = track.rows
        nth = np.arange(len(row)) - np.searchsorted(row, row)
        table = np.zeros((self.count, int(nth.max(initial=-1)) + 1))
        table[row, nth] = track.columns[0]
        means: np.ndarray = np.cumsum(table, axis=1)[row, nth] / (2.0 + nth)
        return means

    def _read_diagnoses(self) -> None:
        self.coded_chronic = self._first_times([_ids(f"DIAGNOSIS//ICD10CM//{code}") for _, code, _ in CHRONIC])
        self.diagnosed = self._first_times(
            [_ids(*(f"DIAGNOSIS//ICD10CM//{code}" for code, _ in CONDITION_CODES[task])) for task in CONDITION_TASKS]
        )

    def _read_admissions(self) -> None:
        """Per admission, in the order of `starts`: its end and the one before, its visit, gap and utilisation."""
        events = self._select(_ids("VISIT_START//IMP"))
        self.starts = _Track(events["row"], events["minutes"], events["encounter"])
        row, start = self.starts.rows, self.starts.minutes
        self.ends = self._ends_of(self.starts, _DISCHARGES)
        nth = np.arange(len(row)) - np.searchsorted(row, row)
        self.previous_end = np.where(nth > 0, np.roll(self.ends, 1), _LONG_AGO)

        # 1. The visit begins with the emergency visit that is open when the admission starts.
        events = self._select(_ids("VISIT_START//EMER"))
        emergency = _Track(events["row"], events["minutes"], events["encounter"])
        latest = emergency.latest(row, start)
        is_open = _taken(self._ends_of(emergency, ("EMER",)), latest, _LONG_AGO) >= start
        self.visit_start = np.where(is_open, emergency.time(latest), start)

        # 2. The gap from the last end of a visit before it.
        events = self._select(_ids(*(f"VISIT_END//{name}" for name in (*_DISCHARGES, "EMER", "AMB"))))
        visit_ends = _Track(events["row"], events["minutes"])
        before = visit_ends.time(visit_ends.latest(row, self.visit_start - 1))
        self.gap = np.maximum(self.visit_start - before, HOUR) / DAY

        # 3. Utilisation, admission by admission.
        self.utilisation = np.ones(len(row))
        for k in range(1, int(nth.max(initial=0)) + 1):
            here = np.flatnonzero(nth == k)
            elapsed = (start[here] - start[here - 1]) / DAY
            self.utilisation[here] = self.utilisation[here - 1] * 2.0 ** (-elapsed / UTILISATION_HALF_LIFE_DAYS) + 1.0

    def _ends_of(self, starts: _Track, dispositions: tuple[str, ...]) -> np.ndarray:
        """Minutes of the ends of the encounters that start there, NEVER for none: int64 `[n]`."""
        events = self._select(_ids(*(f"VISIT_END//{name}" for name in dispositions)))
        ends = _Track(events["row"], events["encounter"], events["minutes"])
        encounter = starts.columns[0]
        place = ends.latest(starts.rows, encounter)
        return _taken(ends.columns[0], np.where(ends.time(place) == encounter, place, -1), NEVER)
