"""The simulated disease process, for a block of patients at a time.

A patient's life is a chain of cycles: a gap with outpatient and emergency visits, then an admission, then a discharge
whose draws decide the next gap.

    phase 3j      the gap before admission j, and the admission's first day (a stay shorter than a day ends here)
    phase 3j + 1  after 24 hours: the length of stay is drawn from the long-stay score, then come the rest of the stay
                  and the discharge or the death in hospital
    phase 3j + 2  at the discharge: death within 30 days, new conditions, readmission or a later admission
                  (`risk.outcome_risks`)

A draw at 24 hours or at a discharge depends on rows recorded by then and on nothing hidden, and nothing drawn earlier
is still pending then:

- a death in hospital after the first day happens only later than 30 days after the previous discharge, whose own draw
  covers those days; likewise a death at home after a readmission falls behind the previous discharge's 30 days;
- a new condition drawn at a discharge is coded at the very next admission, so once that admission has begun nothing
  hidden is left of the draw.

So the probabilities in `risk` are exact. Hidden are only: which chronic diseases a patient has before they
are coded, base levels of the measurements, directions of the next readings, how often a patient sees a doctor; they
shape what is recorded next, never an outcome directly.

Times are whole minutes since 1970 (naive UTC), kept away from the tasks' limits (24 h, 168 h, 30 d, 365 d) by several
hours: an admission counts from its inpatient encounter, but a label would be the same counted from the emergency visit
that overlaps it.
"""

from __future__ import annotations

import numpy as np

from ehrseq.data.simulate.codes import (
    CHANNEL_INDEX,
    CHRONIC,
    CONDITION_CODES,
    CONDITION_TASKS,
    CULTURE_CODE,
    DISPOSITIONS,
    IS_LOGARITHMIC,
    IS_PAIR,
    LOCATIONS,
    LOG_LOCATIONS,
    MEASUREMENTS,
    RACES,
    SCALES,
    VACCINES,
    VOCABULARY,
)
from ehrseq.data.simulate.random import PatientStreams, poisson_from_uniform
from ehrseq.data.simulate.risk import (
    NEXT_ADMISSION,
    READMISSION_BEFORE_DEATH,
    SCORES,
    SHORT_STAY_HOURS,
    UTILISATION_HALF_LIFE_DAYS,
    Recorded,
    outcome_risks,
    score_probabilities,
    standardise,
)
from ehrseq.data.simulate.state import (
    DAY,
    ENTRY,
    EXTRACTION,
    HOUR,
    NEVER,
    STATIC,
    UNITS,
    YEAR_MINUTES,
    Columns,
    SimulatedBlock,
)

N_CHANNELS = len(MEASUREMENTS)
_AMPLITUDE = np.array([1.0 if c.is_pair else 0.6 if c.name == "ldl" else 1.0 for c in MEASUREMENTS])
_BASE_SD = np.array([0.0 if c.is_pair else 0.9 if c.name == "ldl" else 0.25 for c in MEASUREMENTS])
_NOISE = np.array([0.0 if c.is_pair else 0.35 for c in MEASUREMENTS])
_MEASURED = np.array([channel.measured for channel in MEASUREMENTS])
_INFORMATIVE = np.where(np.isin(np.arange(N_CHANNELS), [CHANNEL_INDEX["crp"], CHANNEL_INDEX["lactate"]]), 0.10, 0.03)
_HAS_OTHER_UNIT = np.array([len(channel.units) > 1 for channel in MEASUREMENTS])
_UNIT_IDS = np.array(
    [[UNITS.index(c.units[min(j, len(c.units) - 1)][0]) if c.units else 0 for j in (0, 1)] for c in MEASUREMENTS]
)
_FACTORS = np.array([[c.units[min(j, len(c.units) - 1)][1] if c.units else 1.0 for j in (0, 1)] for c in MEASUREMENTS])
_DECIMALS = np.array(
    [[10.0 ** c.units[min(j, len(c.units) - 1)][2] if c.units else 1.0 for j in (0, 1)] for c in MEASUREMENTS]
)
_CHANNEL_CODES = np.array([[VOCABULARY.index[c.codes[0]], VOCABULARY.index[c.codes[-1]]] for c in MEASUREMENTS])
_CHRONIC_CODES = np.array([VOCABULARY.index[f"DIAGNOSIS//ICD10CM//{code}"] for _, code, _ in CHRONIC])
_CHRONIC_SHARE = np.array([share for _, _, share in CHRONIC])
_CONDITION_SHARE_BEFORE = np.array([0.18, 0.10, 0.18])
_EXPIRED, _ALIVE_DISPOSITIONS = 3, (0.72, 0.2, 0.08)

# Other unit than the first in a quarter of the visits.
_OTHER_UNIT_SHARE = 0.25


def _id(code: str) -> int:
    return VOCABULARY.index[code]


class DiseaseProcess:
    """Runs the process for one block of patients, all in step.

    Args:
        streams: Random numbers of the block's patients.
        count: Number of patients.
    """

    def __init__(self, streams: PatientStreams, count: int) -> None:
        self.random = streams
        self.count = count
        self.events = Columns(
            ("row", "minutes", "code", "value", "unit", "text", "encounter"),
            (np.int32, np.int64, np.int32, np.float64, np.int16, np.int8, np.int32),
        )
        self.encounters = Columns(
            ("row", "number", "start_code", "start", "end", "parent", "disposition"),
            (np.int32, np.int32, np.int32, np.int64, np.int64, np.int32, np.int8),
        )
        self.admissions = Columns(
            ("row", "cycle", "visit_start", "start", "end", "alive", *SCORES),
            (np.int32, np.int32, np.int64, np.int64, np.int64, np.bool_, *([np.float64] * len(SCORES))),
        )
        everyone = np.arange(count)
        draw = self.random
        # Traits, fixed for life.
        age = np.clip(62 + 14 * draw.normal(everyone, 0, "age"), 22, 95)
        self.entry = ENTRY[0] + ((ENTRY[1] - ENTRY[0]) * draw.uniform(everyone, 0, "entry")).astype(np.int64)
        self.birth = ((self.entry - age * YEAR_MINUTES) // DAY * DAY).astype(np.int64)
        self.male = draw.happens(everyone, 0, "male", 0.48)
        self.race = draw.choice(everyone, 0, "race", [share for _, _, share in RACES])
        self.has_chronic = draw.uniform(everyone, 0, "chronic", len(CHRONIC)) < _CHRONIC_SHARE * (
            0.6 + 0.8 * draw.uniform(everyone, 0, "frailty")[:, None]
        )
        self.base = _BASE_SD * draw.normal(everyone, 0, "base", N_CHANNELS)
        self.visit_spacing = 80.0 * np.exp(0.7 * draw.normal(everyone, 0, "visit spacing"))
        self.personal = draw.uniform(everyone, 0, "personal codes", 8)
        # What has been recorded so far: all that the scores see.
        self.z_last = np.zeros((count, N_CHANNELS))
        self.t_last = np.full((count, N_CHANNELS), ENTRY[0] - 3650 * DAY, dtype=np.int64)
        self.z_sum = np.zeros((count, N_CHANNELS))
        self.z_count = np.zeros((count, N_CHANNELS))
        self.coded_chronic = np.zeros((count, len(CHRONIC)), dtype=bool)
        self.diagnosed = np.zeros((count, 3), dtype=bool)
        self.utilisation = np.zeros(count)
        self.utilisation_at = self.entry.copy()
        self.last_end = self.entry.copy()
        self.previous_discharge = np.full(count, -NEVER, dtype=np.int64)
        # Hidden: conditions to be coded at the next visit, direction of the last readings.
        self.due = draw.uniform(everyone, 0, "earlier conditions", 3) < _CONDITION_SHARE_BEFORE
        self.direction = np.where(draw.uniform(everyone, 0, "direction", N_CHANNELS) < 0.5, -1.0, 1.0)
        self.encounter_count = np.zeros(count, dtype=np.int64)
        self.death = np.full(count, NEVER, dtype=np.int64)

    def run(self) -> SimulatedBlock:
        """Simulate the whole block until the extraction."""
        everyone = np.arange(self.count)
        self.events.add(everyone, STATIC, np.where(self.male, _id("GENDER//M"), _id("GENDER//F")), np.nan, 0, 0, -1)
        races = np.array([_id(f"RACE//{name.upper()}") for _, name, _ in RACES])
        self.events.add(everyone, STATIC, races[self.race], np.nan, 0, 0, -1)
        self.events.add(everyone, self.birth, _id("MEDS_BIRTH"), np.nan, 0, 0, -1)
        rows = everyone
        gap_start = self.entry
        admission = gap_start + ((150 + 390 * self.random.uniform(rows, 0, "first admission")) * DAY).astype(np.int64)
        gap_end = admission.copy()
        carried = np.zeros((self.count, 3), dtype=bool)
        death = np.full(self.count, NEVER, dtype=np.int64)
        cycle = 0
        while len(rows):
            self._gap(rows, gap_start, gap_end, 3 * cycle)
            at_home = (death != NEVER) & (admission == NEVER)
            self._die(rows[at_home], death[at_home])
            stays = (admission != NEVER) & (admission <= EXTRACTION)
            rows, admission, carried, death = rows[stays], admission[stays], carried[stays], death[stays]
            rows, discharge, draws, blocked = self._admission(rows, admission, carried, death, cycle)
            admission, gap_end, death, carried = self._draw_fate(rows, discharge, draws, blocked, 3 * cycle + 2)
            self.previous_discharge[rows] = discharge
            gap_start = discharge
            cycle += 1
        return self._block()

    # Gaps between admissions

    def _gap(self, rows: np.ndarray, start: np.ndarray, end: np.ndarray, phase: int) -> None:
        """Outpatient and emergency visits in (start, end), at least a day from both."""
        days = (end - start) / DAY
        most = np.minimum((days // 8).astype(np.int64), 8)
        number = np.minimum(
            poisson_from_uniform(self.random.uniform(rows, phase, "visits"), days / self.visit_spacing[rows], 8), most
        )
        if phase == 0:
            number = np.maximum(number, 2)
        places = self.random.uniform(rows, phase, "visit times", 8)
        for visit in range(int(number.max(initial=0))):
            go = number > visit
            place = (visit + 0.15 + 0.7 * places[go, visit]) / number[go]
            time = start[go] + (place * (end[go] - start[go])).astype(np.int64)
            within = time <= EXTRACTION
            self._short_visit(rows[go][within], time[within], phase, visit)

    def _short_visit(self, rows: np.ndarray, start: np.ndarray, phase: int, visit: int) -> None:
        draw, name = self.random, f"visit {visit} "
        emergency = draw.happens(rows, phase, name + "emergency", 0.25)
        length = np.where(
            emergency,
            120 + 420 * draw.uniform(rows, phase, name + "hours"),
            25 + 40 * draw.uniform(rows, phase, name + "stay"),
        ).astype(np.int64)
        encounter = self._open(rows, np.where(emergency, _id("VISIT_START//EMER"), _id("VISIT_START//AMB")), start)
        end = start + length
        self._close(rows, np.where(emergency, _id("VISIT_END//EMER"), _id("VISIT_END//AMB")), end, encounter)
        self.encounters.add(
            rows, encounter, np.where(emergency, _id("VISIT_START//EMER"), _id("VISIT_START//AMB")), start, end, -1, -1
        )
        # One reading of some channels.
        usual = np.where(_MEASURED > 0.85, 0.8, 0.25)
        measured = draw.uniform(rows, phase, name + "measured", N_CHANNELS) < np.where(
            emergency[:, None], usual + 0.2, usual
        )
        self._turn(rows, phase, name)
        self._read(rows, measured, self.direction[rows], start + 10, encounter, phase, name + "reading")
        self._code_chronic(rows, start + 12, encounter, phase, name, 0.3)
        due = self.due[rows]
        self._code_conditions(rows, due, start + 14, encounter, phase, name)
        self.due[rows] = False
        again = self.diagnosed[rows] & ~due & (draw.uniform(rows, phase, name + "again", 3) < 0.25)
        self._code_conditions(rows, again, start + 14, encounter, phase, name)
        self._background(rows, start + 2, length - 4, np.where(emergency, 3.0, 1.5), encounter, phase, name)
        vaccinated = ~emergency & draw.happens(rows, phase, name + "vaccine", 0.15)
        kind = draw.choice(rows, phase, name + "vaccine kind", (0.8, 0.2))
        codes = np.array([_id(code) for code in VACCINES])[kind]
        self.events.add(
            rows[vaccinated], start[vaccinated] + 16, codes[vaccinated], np.nan, 0, 0, encounter[vaccinated]
        )
        self.last_end[rows] = end

    # Admissions

    def _admission(
        self, rows: np.ndarray, start: np.ndarray, carried: np.ndarray, death: np.ndarray, cycle: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """A stay, from the emergency visit to the discharge.

        Returns:
            Of who is discharged alive before the extraction: rows, discharge times, draws `[n, tasks]` and whether
                the previous window blocks.
        """
        draw, phase = self.random, 3 * cycle
        via_emergency = draw.happens(rows, phase, "via emergency", 0.6)
        lead = (HOUR * (1 + 3 * draw.uniform(rows, phase, "lead"))).astype(np.int64)
        visit_start = np.where(via_emergency, start - lead, start)
        gap = np.maximum(visit_start - self.last_end[rows], HOUR) / DAY
        dying = death != NEVER
        short = ~dying & draw.happens(rows, phase, "short stay", 0.06)
        early_end = np.where(
            dying, death, start + (HOUR * (6 + 12 * draw.uniform(rows, phase, "short hours"))).astype(np.int64)
        )
        brief = dying | short

        # 1. The emergency visit overlaps the admission by half an hour to an hour.
        er = np.flatnonzero(via_emergency)
        er_encounter = np.full(len(rows), -1, dtype=np.int64)
        er_encounter[er] = self._open(rows[er], _id("VISIT_START//EMER"), visit_start[er])
        er_end = start + 30 + (30 * draw.uniform(rows, phase, "handover")).astype(np.int64)
        self._close(rows[er], _id("VISIT_END//EMER"), er_end[er], er_encounter[er])
        self.encounters.add(rows[er], er_encounter[er], _id("VISIT_START//EMER"), visit_start[er], er_end[er], -1, -1)
        encounter = self._open(rows, _id("VISIT_START//IMP"), start)
        elapsed = (start - self.utilisation_at[rows]) / DAY
        self.utilisation[rows] = self.utilisation[rows] * 2.0 ** (-elapsed / UTILISATION_HALF_LIFE_DAYS) + 1.0
        self.utilisation_at[rows] = start

        # 2. The first day, all within 22 hours of the visit's start.
        window = np.where(brief, early_end - visit_start - 20, 22 * HOUR)
        measured = self._stay_measured(rows, phase, "day one ")
        self._turn(rows, phase, "day one ")
        first = visit_start + 5 + (window * (0.02 + 0.3 * draw.uniform(rows, phase, "first draw"))).astype(np.int64)
        second = visit_start + 5 + (window * (0.7 + 0.25 * draw.uniform(rows, phase, "second draw"))).astype(np.int64)
        for time, sign, name in ((first, -1.0, "day one first "), (second, 1.0, "day one second ")):
            owner = np.where(time < start, er_encounter, encounter)
            self._read(rows, measured, sign * self.direction[rows], time, owner, phase, name)
        admitted = start + 60 + (90 * draw.uniform(rows, phase, "admission codes")).astype(np.int64)
        self._code_conditions(rows, carried | self.due[rows], admitted, encounter, phase, "admission ")
        self.due[rows] = False
        self._code_chronic(rows, admitted + 1, encounter, phase, "admission ", 0.6)
        again = self.diagnosed[rows] & (draw.uniform(rows, phase, "again", 3) < 0.5)
        self._code_conditions(rows, again & ~carried, admitted + 2, encounter, phase, "again ")
        rest = np.where(brief, early_end - start, 21 * HOUR - lead) - 20
        self._background(rows, start + 10, rest, np.full(len(rows), 2.0), encounter, phase, "day one ")
        self._intensive_care(
            rows, start + 2 * HOUR, np.minimum(rest - 2 * HOUR, 14 * HOUR), ~brief, 0.06, encounter, phase
        )

        # 3. At 24 hours the length of stay is drawn from the score; what is drawn later does not bear on it.
        at_24h = start + DAY
        features = self._features(rows, at_24h, visit_start, gap)
        long_stay = score_probabilities(features)[:, SCORES.index("long_stay_7d")]
        long_stay[brief] = np.nan
        phase += 1
        is_long = draw.happens(rows, phase, "long stay", long_stay)
        spread = draw.uniform(rows, phase, "length of stay")
        least, width, power = SHORT_STAY_HOURS
        hours = np.where(is_long, np.minimum(178 + 90 * -np.log(spread), 900), least + width * spread**power)
        end = np.where(brief, early_end, start + (HOUR * hours).astype(np.int64))

        # 4. The rest of the stay.
        go = np.flatnonzero(~brief & (at_24h <= EXTRACTION))
        self._later_days(rows[go], start[go] + DAY + 30, end[go], encounter[go], phase)

        # 5. The end: death in hospital, or discharge alive, with a culture that may come back late.
        since = end - np.maximum(self.previous_discharge[rows], ENTRY[0] - 10_000 * DAY)
        mortality = score_probabilities(self._features(rows, end, visit_start, gap))[:, 0]
        expired = dying | (
            ~brief & (since > 30.5 * DAY) & draw.happens(rows, phase, "death in hospital", 0.4 * mortality)
        )
        disposition = np.where(expired, _EXPIRED, draw.choice(rows, phase, "disposition", _ALIVE_DISPOSITIONS))
        end_codes = np.array([_id(f"VISIT_END//{name}") for name in DISPOSITIONS])[disposition]
        self._close(rows, end_codes, end, encounter)
        self.encounters.add(rows, encounter, _id("VISIT_START//IMP"), start, end, -1, disposition)
        self._background(rows, end - 15, np.full(len(rows), 12), np.full(len(rows), 2.0), encounter, phase, "final ")
        self._culture(rows, start, end, ~expired, encounter, phase)
        self._die(rows[expired], end[expired])
        self.last_end[rows] = end

        # 6. What the discharge draws are made from.
        features = self._features(rows, end, visit_start, gap)
        draws = score_probabilities(features)
        blocked = end - self.previous_discharge[rows].clip(-(2**60)) < 365 * DAY
        risks = outcome_risks(draws, self.diagnosed[rows], blocked)
        alive = ~expired & (end <= EXTRACTION)
        columns = [np.where(alive, risks[task], np.nan) if task in risks else long_stay for task in SCORES]
        columns[1] = np.where(at_24h <= EXTRACTION, columns[1], np.nan)
        self.admissions.add(rows, cycle, visit_start, start, end, alive, *columns)
        return rows[alive], end[alive], draws[alive], blocked[alive]

    def _stay_measured(self, rows: np.ndarray, phase: int, name: str) -> np.ndarray:
        """Which channels are read in this phase of a stay: the more chronic diseases are coded, the more."""
        burden = self.coded_chronic[rows].sum(axis=1, keepdims=True)
        chance = np.clip(_MEASURED + _INFORMATIVE * burden, 0.05, 0.97)
        measured: np.ndarray = self.random.uniform(rows, phase, name + "measured", N_CHANNELS) < chance
        return measured

    def _later_days(
        self, rows: np.ndarray, begin: np.ndarray, end: np.ndarray, encounter: np.ndarray, phase: int
    ) -> None:
        """The stay after 24 hours: two readings of a channel, low and high in either order, and background."""
        draw = self.random
        length = end - begin - 30
        measured = self._stay_measured(rows, phase, "later ")
        self._turn(rows, phase, "later ")
        for low, width, sign, name in ((0.02, 0.35, -1.0, "later first "), (0.75, 0.23, 1.0, "later second ")):
            time = begin + (length * (low + width * draw.uniform(rows, phase, name + "time"))).astype(np.int64)
            self._read(rows, measured, sign * self.direction[rows], time, encounter, phase, name)
        self._background(rows, begin, length, 1.5 + 0.4 * np.minimum(length / DAY, 10), encounter, phase, "later ")
        self._intensive_care(rows, begin, length, np.ones(len(rows), dtype=bool), 0.1, encounter, phase)

    def _intensive_care(
        self,
        rows: np.ndarray,
        begin: np.ndarray,
        length: np.ndarray,
        allowed: np.ndarray,
        share: float,
        parent: np.ndarray,
        phase: int,
    ) -> None:
        """A stay in intensive care: a child encounter, whose rows carry the root's number."""
        draw = self.random
        go = np.flatnonzero(allowed & draw.happens(rows, phase, "intensive care", share))
        rows, begin, length, parent = rows[go], begin[go], length[go], parent[go]
        part = draw.uniform(rows, phase, "intensive care times", 2)
        start = begin + (length * 0.3 * part[:, 0]).astype(np.int64)
        end = begin + (length * (0.45 + 0.5 * part[:, 1])).astype(np.int64)
        number = self.encounter_count[rows]
        self.encounter_count[rows] += 1
        self.events.add(rows, start, _id("VISIT_START//ACUTE"), np.nan, 0, 0, parent)
        self.events.add(rows, end, _id("VISIT_END//ACUTE"), np.nan, 0, 0, parent)
        self.encounters.add(rows, number, _id("VISIT_START//ACUTE"), start, end, parent, -1)

    def _culture(
        self, rows: np.ndarray, start: np.ndarray, end: np.ndarray, alive: np.ndarray, encounter: np.ndarray, phase: int
    ) -> None:
        """A blood culture drawn in the stay, reported 1 to 5 days after the discharge; it bears on nothing."""
        go = np.flatnonzero(alive & self.random.happens(rows, phase, "culture", 0.3))
        rows = rows[go]
        time = end[go] + (DAY * (0.3 + 4.0 * self.random.uniform(rows, phase, "culture time"))).astype(np.int64)
        positive = self.random.happens(rows, phase, "culture result", 0.12)
        self.events.add(rows, time, _id(CULTURE_CODE), np.nan, 0, np.where(positive, 2, 1), encounter[go])

    # At the discharge

    def _draw_fate(
        self, rows: np.ndarray, discharge: np.ndarray, draws: np.ndarray, blocked: np.ndarray, phase: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Draw what follows a discharge.

        Returns:
            Next admission (NEVER for none), end of the gap, death (NEVER for none), conditions newly coded at that
            admission `[n, 3]`.
        """
        draw, count = self.random, len(rows)
        admission = np.full(count, NEVER, dtype=np.int64)
        death = np.full(count, NEVER, dtype=np.int64)
        previous = self.previous_discharge[rows].clip(-(2**60))
        place = draw.uniform(rows, phase, "place")

        # 1. Death within 30 days, behind the 30 days of the previous discharge; some come back for the last hours.
        dies = draw.happens(rows, phase, "death", draws[:, 0])
        returns = dies & draw.happens(rows, phase, "returns to die", READMISSION_BEFORE_DEATH)
        earliest = np.maximum((previous - discharge) / DAY + 30.3, np.where(returns, 2.6, 0.3))
        earliest = np.minimum(earliest, 29.2)
        when = discharge + (DAY * (earliest + (29.5 - earliest) * place)).astype(np.int64)
        death = np.where(dies, when, NEVER)
        last_hours = (HOUR * (4 + 15 * draw.uniform(rows, phase, "last hours"))).astype(np.int64)
        admission = np.where(returns, when - last_hours, admission)

        # 2. New conditions, coded at the next admission.
        carried = (
            ~dies[:, None] & ~self.diagnosed[rows] & (draw.uniform(rows, phase, "new conditions", 3) < draws[:, 3:])
        )
        carrier = carried.any(axis=1)
        behind = np.maximum(previous + 365 * DAY, discharge + 31 * DAY)
        opening = discharge + 365 * DAY - behind
        blocked_time = behind + (opening * (0.25 + 0.5 * place)).astype(np.int64)

        # 3. Readmission within 30 days, else an admission within 365 days, else later or never.
        readmitted = draw.happens(rows, phase, "readmission", draws[:, 2])
        soon = discharge + (DAY * (1.3 + 28.1 * place**1.2)).astype(np.int64)
        within_year = discharge + (DAY * (31 + 332 * place**1.2)).astype(np.int64)
        late = discharge + (DAY * (368 + 250 * -np.log(place))).astype(np.int64)
        comes = carrier | draw.happens(rows, phase, "within a year", NEXT_ADMISSION)
        remains = draw.happens(rows, phase, "remains", 0.5)
        living = np.where(
            carrier & blocked,
            blocked_time,
            np.where(readmitted, soon, np.where(comes, within_year, np.where(remains, late, NEVER))),
        )
        admission = np.where(dies, admission, living)
        leaves = discharge + (DAY * (366 + 300 * place)).astype(np.int64)
        gap_end = np.where(admission != NEVER, admission - 5 * HOUR, np.where(dies, death, leaves))
        return admission, gap_end, death, carried

    # What is recorded

    def _features(self, rows: np.ndarray, now: np.ndarray, visit_start: np.ndarray, gap: np.ndarray) -> np.ndarray:
        """Features of the scores at `now`, float64 `[n, features]`; see `risk`."""
        recorded = Recorded(
            self.z_last[rows],
            self.t_last[rows],
            self.z_sum[rows] / (1.0 + self.z_count[rows]),
            self.coded_chronic[rows],
            self.utilisation[rows],
            self.utilisation_at[rows],
            visit_start,
            gap,
            self.birth[rows],
            self.male[rows],
        )
        return recorded.features(now)

    def _open(self, rows: np.ndarray, code: np.ndarray | int, time: np.ndarray) -> np.ndarray:
        """Start an encounter; returns its number within the patient."""
        number: np.ndarray = self.encounter_count[rows].copy()
        self.encounter_count[rows] += 1
        self.events.add(rows, time, code, np.nan, 0, 0, number)
        return number

    def _close(self, rows: np.ndarray, code: np.ndarray | int, time: np.ndarray, number: np.ndarray) -> None:
        self.events.add(rows, time, code, np.nan, 0, 0, number)

    def _die(self, rows: np.ndarray, time: np.ndarray) -> None:
        self.events.add(rows, time, _id("MEDS_DEATH"), np.nan, 0, 0, -1)
        self.death[rows] = time

    def _turn(self, rows: np.ndarray, phase: int, name: str) -> None:
        """Direction of the next readings: rising (+1) or falling (-1), like the last with probability 0.85."""
        flips = self.random.uniform(rows, phase, name + "direction", N_CHANNELS) < 0.15
        self.direction[rows] = np.where(flips, -self.direction[rows], self.direction[rows])

    def _read(
        self,
        rows: np.ndarray,
        measured: np.ndarray,
        sign: np.ndarray,
        time: np.ndarray,
        encounter: np.ndarray,
        phase: int,
        name: str,
    ) -> None:
        """Record one reading of each measured channel and take it, as recorded, into the state.

        Args:
            rows: Positions in the block.
            measured: bool `[n, channels]`.
            sign: float64 `[n, channels]`, -1 for a low reading, +1 for a high one.
            time: int64 `[n]`; measurements are recorded then, pairs of treatments 3 minutes later.
            encounter: int64 `[n]`.
            phase: Phase of the process.
            name: Name of the draws.
        """
        row, channel = np.nonzero(measured)
        if len(row) == 0:
            return
        noise = self.random.normal(rows, phase, name + "noise", N_CHANNELS)
        other = self.random.uniform(rows, phase, name + "unit", N_CHANNELS) < _OTHER_UNIT_SHARE
        patient, up = rows[row], sign[row, channel]
        unit = (other[row, channel] & _HAS_OTHER_UNIT[channel]).astype(np.int64)
        z = self.base[patient, channel] + _AMPLITUDE[channel] * up + _NOISE[channel] * noise[row, channel]
        linear = LOCATIONS[channel] + SCALES[channel] * z
        value = np.where(IS_LOGARITHMIC[channel], np.exp(LOG_LOCATIONS[channel] + SCALES[channel] * z), linear)
        digits, factor = _DECIMALS[channel, unit], _FACTORS[channel, unit]
        value = np.round(value * factor * digits) / digits
        # The state holds what a reader of the row sees: rounded, in its unit.
        z = standardise(channel, value / factor, up)
        minutes = time[row] + np.where(IS_PAIR[channel], 3, 0)
        code = _CHANNEL_CODES[channel, np.where(IS_PAIR[channel] & (up > 0), 1, 0)]
        shown = np.where(IS_PAIR[channel], np.nan, value)
        self.events.add(patient, minutes, code, shown, _UNIT_IDS[channel, unit], 0, encounter[row])
        self.z_last[patient, channel] = z
        self.t_last[patient, channel] = minutes
        self.z_sum[patient, channel] += z
        self.z_count[patient, channel] += 1

    def _code_chronic(
        self, rows: np.ndarray, time: np.ndarray, encounter: np.ndarray, phase: int, name: str, share: float
    ) -> None:
        coded = self.has_chronic[rows] & (self.random.uniform(rows, phase, name + "chronic", len(CHRONIC)) < share)
        row, disease = np.nonzero(coded)
        self.events.add(rows[row], time[row], _CHRONIC_CODES[disease], np.nan, 0, 0, encounter[row])
        self.coded_chronic[rows] |= coded

    def _code_conditions(
        self, rows: np.ndarray, which: np.ndarray, time: np.ndarray, encounter: np.ndarray, phase: int, name: str
    ) -> None:
        for k, task in enumerate(CONDITION_TASKS):
            go = np.flatnonzero(which[:, k])
            options = CONDITION_CODES[task]
            pick = self.random.choice(rows[go], phase, f"{name}{task}", [share for _, share in options])
            codes = np.array([_id(f"DIAGNOSIS//ICD10CM//{code}") for code, _ in options])[pick]
            self.events.add(rows[go], time[go], codes, np.nan, 0, 0, encounter[go])
            self.diagnosed[rows[go], k] = True

    def _background(
        self,
        rows: np.ndarray,
        begin: np.ndarray,
        length: np.ndarray,
        mean: np.ndarray,
        encounter: np.ndarray,
        phase: int,
        name: str,
    ) -> None:
        """Zipf-distributed codes without meaning, half of them from eight codes of the patient's own."""
        draw, most = self.random, 24
        number = poisson_from_uniform(draw.uniform(rows, phase, name + "background"), mean, most)
        widest = int(number.max(initial=0))
        if widest == 0:
            return
        row, place = np.nonzero(np.arange(widest) < number[:, None])
        picks = draw.uniform(rows, phase, name + "background codes", widest)[row, place]
        is_personal = picks < 0.5
        index = np.minimum((picks * 16).astype(np.int64), 7)
        picks = np.where(is_personal, self.personal[rows[row], index], 2 * picks - 1)
        rank = np.searchsorted(VOCABULARY.cumulative, np.maximum(picks, 0.0))
        offset = draw.uniform(rows, phase, name + "background times", widest)[row, place]
        minutes = begin[row] + (np.maximum(length[row], 1) * offset).astype(np.int64)
        noise = draw.normal(rows, phase, name + "background values", widest)[row, place]
        is_lab = VOCABULARY.background_is_lab[rank]
        value = np.where(is_lab, np.round(np.exp(2.0 + 0.5 * noise), 1), np.nan)
        unit = np.where(is_lab, UNITS.index("{count}"), 0)
        self.events.add(rows[row], minutes, VOCABULARY.background[rank], value, unit, 0, encounter[row])

    # The result

    def _block(self) -> SimulatedBlock:
        """Cut at the extraction and at death."""
        events = self.events.join()
        keep = (events["minutes"] <= EXTRACTION) & (events["minutes"] <= self.death[events["row"]])
        events = {name: column[keep] for name, column in events.items()}
        encounters = self.encounters.join()
        keep = encounters["start"] <= EXTRACTION
        encounters = {name: column[keep] for name, column in encounters.items()}
        still_open = encounters["end"] > EXTRACTION
        encounters["end"] = np.where(still_open, NEVER, encounters["end"])
        encounters["disposition"] = np.where(still_open, -1, encounters["disposition"]).astype(np.int8)
        death = np.where(self.death > EXTRACTION, NEVER, self.death)
        return SimulatedBlock(events, encounters, self.admissions.join(), self.birth, self.male, self.race, death)
