"""Simulated ICU stays in the files of the PhysioNet challenge 2012, with a planted signal and every stay's true risk.

    stays = simulate_stays(2000, seed=7)
    stays.write("simulated/", "a")        # simulated/set-a/<RecordID>.txt and simulated/Outcomes-a.txt
    stays.true_risks                      # P(death in hospital | the stay's hidden course)

The process. Every stay has a hidden severity s(h) at the hours h = 0 .. 47: s(0) ~ N(0, 1), then a mean-reverting walk
around a straight line whose slope is the stay's own, N(0, 1) over 48 hours. A variable measured at hour h has the value

    mean + spread * (0.6 * habit + loading * s(h) + noise),      habit ~ N(0, 1) by stay and variable, noise ~ N(0, 0.5)

with the signs of the clinic in `loading` (the sicker, the faster the heart and the lower the pressure). Measured are
vital signs about hourly and laboratory values a few times, more often in the sick: that something is measured tells as
well. The death is drawn with

    logit P = -2.6 + 0.9 late + 0.7 (late - early) + 0.5 (age - 65) / 15 + 0.4 [ICUType = 3]

where late and early are the means of s over the last and the first 12 hours; so the level, the trend and the static
values all count, and a model that reads a mean only does worse than one that reads the course. The files have the
quirks of the real ones: -1 for what is missing, repeated minutes, outliers, stays without series. Nothing else is meant
to be like real patients.

Long records with something early in them, which only a long context reads:

    simulate_stays(500, seed=7, density=30, shock_effect=4.0)      # about 9,000 triplets a stay

`density` gives every variable that many chances an hour instead of one. `shock_effect` gives four stays in ten one bout
of shock: for four hours, which begin at a uniform hour of the stay, pressures and urine fall by 3 and 2 spreads and the
pulse rises by 3, and the logit of the death rises by the effect. Nothing else tells of it: what is measured when is the
same, and afterwards values are as if nothing had been. So a reader of the last quarter misses three bouts in four.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from ehrseq.work.files import write_text, write_whole

HOURS = 48
STAYS_SIMULATOR_VERSION = "1.0"
"""Changes whenever a seed gives other stays."""

# Variable -> (mean, spread, loading of the severity, measurements a day, decimals).
_VARIABLES: dict[str, tuple[float, float, float, float, int]] = {
    "ALT": (60, 30, 0.3, 0.8, 0),
    "Albumin": (3.2, 0.5, -0.4, 0.6, 1),
    "BUN": (25, 9, 0.6, 1.7, 0),
    "Bilirubin": (1.2, 0.5, 0.4, 0.8, 1),
    "Creatinine": (1.3, 0.4, 0.5, 1.7, 1),
    "DiasABP": (60, 9, -0.3, 12, 0),
    "FiO2": (0.5, 0.1, 0.4, 3, 2),
    "GCS": (12, 2, -0.6, 6, 0),
    "Glucose": (140, 30, 0.2, 1.8, 0),
    "HCO3": (24, 3, -0.4, 1.7, 0),
    "HCT": (31, 4, -0.1, 2.2, 1),
    "HR": (85, 13, 0.5, 20, 0),
    "K": (4.1, 0.4, 0.1, 1.8, 1),
    "Lactate": (2.2, 0.8, 0.8, 1.2, 1),
    "MAP": (78, 11, -0.5, 12, 0),
    "Mg": (2, 0.25, 0.0, 1.7, 1),
    "NISysABP": (118, 16, -0.4, 10, 0),
    "Na": (139, 3.5, 0.0, 1.8, 0),
    "PaCO2": (40, 6, 0.1, 2.5, 0),
    "PaO2": (140, 35, -0.3, 2.5, 0),
    "Platelets": (190, 60, -0.2, 1.7, 0),
    "RespRate": (19, 4, 0.4, 8, 0),
    "SaO2": (97, 1.2, -0.3, 1.5, 0),
    "SysABP": (118, 17, -0.5, 12, 0),
    "Temp": (37, 0.6, 0.1, 8, 1),
    "Urine": (110, 45, -0.5, 14, 0),
    "WBC": (12, 4, 0.2, 1.6, 1),
    "pH": (7.38, 0.05, -0.4, 2.5, 2),
}
_LIMITS = {"FiO2": (0.21, 1), "GCS": (3, 15), "SaO2": (40, 100)}
_INTERCEPT = -2.6
SHOCK_HOURS = 4
SHOCK_SHARE = 0.4
# What a bout of shock adds to a value, in spreads.
_SHOCK = {"DiasABP": -3.0, "HR": 3.0, "MAP": -3.0, "NISysABP": -3.0, "SysABP": -3.0, "Urine": -2.0}
_BLOCK = 2000  # stays of density 1 whose values are computed at once: bounds the memory


@dataclass(frozen=True)
class SimulatedStays:
    """Stays drawn by `simulate_stays`.

    Attributes:
        record_ids: `[n]` RecordIDs.
        true_risks: `[n]` probability of death in hospital, given the hidden course: what no model can beat on average.
        deaths: `[n]` bool, drawn with it.
        severity: `[n, 48]` the hidden severity.
        shocks: `[n]` hour at which a stay's bout of shock begins, -1 = it has none.
        rows: Table of the series: stay (position), minute, parameter, value (as text), line (as the file has it).
        static: Table of Age, Gender, Height, ICUType, Weight by stay, -1 = missing.
    """

    record_ids: NDArray[np.int64]
    true_risks: NDArray[np.float64]
    deaths: NDArray[np.bool_]
    severity: NDArray[np.float64]
    shocks: NDArray[np.int64]
    rows: pl.DataFrame
    static: pl.DataFrame

    def __len__(self) -> int:
        return len(self.record_ids)

    def in_shock(self) -> NDArray[np.bool_]:
        """`[rows]` bool, which rows of `rows` a bout of shock moved: what an explanation of the risk should point at.

        They are the triplets that carry the shock's effect on the death; the severity lies in all rows of a stay, so
        that the rest are not without risk.
        """
        start = self.shocks[self.rows["stay"].to_numpy()]
        hours = self.rows["minute"].to_numpy() // 60 - start
        moved = self.rows["parameter"].is_in(list(_SHOCK)).to_numpy()
        inside: NDArray[np.bool_] = (start >= 0) & (hours >= 0) & (hours < SHOCK_HOURS) & moved
        return inside

    def write(self, folder: str | Path, name: str = "a") -> Path:
        """Write `set-<name>/<RecordID>.txt` and `Outcomes-<name>.txt`.

        Args:
            folder: Folder to write into; made where it is absent.
            name: Name of the set.

        Returns:
            The folder of the stays.

        Raises:
            ValueError: The set is there already.
        """
        target = Path(folder) / f"set-{name}"
        outcomes = Path(folder) / f"Outcomes-{name}.txt"
        if target.exists() or outcomes.exists():
            raise ValueError(f"{target} or {outcomes} exists; give another folder or name.")
        series = dict(self.rows.group_by("stay").agg(pl.col("line").str.join("\n")).iter_rows())

        def write(temporary: Path) -> None:
            temporary.mkdir()
            for stay, (record, static) in enumerate(
                zip(self.record_ids, self.static.iter_rows(named=True), strict=True)
            ):
                lines = ["Time,Parameter,Value", f"00:00,RecordID,{record}"]
                lines += [f"00:00,{parameter},{value:g}" for parameter, value in static.items()]
                if stay in series:
                    lines.append(series[stay])
                (temporary / f"{record}.txt").write_text("\n".join(lines) + "\n", "utf-8")

        write_whole(target, write)
        write_text(outcomes, self._outcomes())
        return target

    def _outcomes(self) -> str:
        late = self.severity[:, -12:].mean(1)
        saps = np.clip(np.round(14 + 4 * late), 0, 34).astype(int)
        sofa = np.clip(np.round(6 + 3 * late), 0, 24).astype(int)
        length = np.clip(np.round(9 + 5 * np.abs(late) + 2 * late), 2, 150).astype(int)
        survival = np.where(self.deaths, length, -1)
        table = zip(self.record_ids, saps, sofa, length, survival, self.deaths.astype(int), strict=True)
        lines = ["RecordID,SAPS-I,SOFA,Length_of_stay,Survival,In-hospital_death"]
        return "\n".join([*lines, *(",".join(map(str, row)) for row in table)]) + "\n"


def simulate_stays(
    num_stays: int, seed: int = 0, *, first_record: int = 100_001, density: int = 1, shock_effect: float = 0.0
) -> SimulatedStays:
    """Draw ICU stays; stay k of a seed is the same whatever the number of stays.

    Args:
        num_stays: Number of stays.
        seed: Seed.
        first_record: RecordID of the first stay; the stays of a seed depend on it, so that two sets can be disjoint.
        density: Measurements of a variable that an hour can hold, a divisor of 60: records are about this many times as
            long as those of 1, which have 300 triplets on average. Hidden courses and static values are the same.
        shock_effect: What a bout of shock adds to the logit of the death; 0: nobody has one.

    Raises:
        ValueError: A number is no integer, or too small; `density` is no divisor of 60; `shock_effect` is negative.
    """
    integers = {
        "num_stays": (num_stays, 1),
        "seed": (seed, 0),
        "first_record": (first_record, 1),
        "density": (density, 1),
    }
    for name, (value, least) in integers.items():
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
            raise ValueError(f"{name} got {value!r}; expected an integer of at least {least}.")
    if 60 % density:
        raise ValueError(f"density got {density}; expected a divisor of 60, the minutes that measurements share.")
    if isinstance(shock_effect, bool) or not isinstance(shock_effect, int | float) or not 0 <= shock_effect < np.inf:
        raise ValueError(f"shock_effect got {shock_effect!r}; expected a number of at least 0, where 0 is no shock.")
    records = np.arange(first_record, first_record + num_stays, dtype=np.int64)
    shocks = np.array([_shock(seed, int(record)) if shock_effect else -1 for record in records], np.int64)
    hidden, series = [], []
    block = max(1, _BLOCK // density)
    for first in range(0, num_stays, block):
        here = slice(first, first + block)
        draws = [_draw(np.random.default_rng((seed, int(record))), density) for record in records[here]]
        *parts, severity, measured, minute, noise, habit, oddity, without = (
            np.stack(column) for column in zip(*draws, strict=True)
        )
        hidden.append((*parts, severity))
        rows = _rows(severity, shocks[here], measured, minute, noise, habit, oddity, without)
        series.append(rows.with_columns(pl.col("stay") + first))
    static, death, severity = (np.concatenate(column) for column in zip(*hidden, strict=True))
    late, early = severity[:, -12:].mean(1), severity[:, :12].mean(1)
    age, icu_type = static[:, 0], static[:, 3]
    logit = _INTERCEPT + 0.9 * late + 0.7 * (late - early) + 0.5 * (age - 65) / 15 + 0.4 * (icu_type == 3)
    risk = 1 / (1 + np.exp(-(logit + shock_effect * (shocks >= 0))))
    names = ["Age", "Gender", "Height", "ICUType", "Weight"]
    return SimulatedStays(
        record_ids=records,
        true_risks=risk,
        deaths=death < risk,
        severity=severity,
        shocks=shocks,
        rows=pl.concat(series),
        static=pl.DataFrame({name: static[:, column] for column, name in enumerate(names)}),
    )


def _shock(seed: int, record: int) -> int:
    """Hour at which a stay's bout of shock begins, -1 = it has none; the same for every density."""
    rng = np.random.default_rng((seed, record, 1))
    return int(rng.integers(0, HOURS - SHOCK_HOURS + 1)) if rng.random() < SHOCK_SHARE else -1


def _draw(rng: np.random.Generator, density: int) -> tuple[NDArray[Any], ...]:
    """Everything random of one stay: static, the death's uniform, severity, measured?, minute, noise, habit, oddity."""
    variables = len(_VARIABLES)
    age = np.clip(np.round(rng.normal(64, 16)), 16, 90)
    gender, icu_type = float(rng.random() < 0.56), float(rng.integers(1, 5))
    height, weight = np.round(rng.normal(165 + 10 * gender, 8), 1), np.round(rng.normal(72 + 12 * gender, 15), 1)
    missing = rng.random(3)
    static = np.array(
        [
            age,
            gender if missing[0] > 0.002 else -1,
            height if missing[1] > 0.47 else -1,
            icu_type,
            max(weight, 35) if missing[2] > 0.08 else -1,
        ]
    )
    severity = np.empty(HOURS)
    severity[0] = rng.normal()
    slope, steps = rng.normal() / HOURS, rng.normal(scale=0.15, size=HOURS)
    line = severity[0]
    for hour in range(1, HOURS):
        line += slope
        severity[hour] = severity[hour - 1] + slope + 0.1 * (line - severity[hour - 1]) + steps[hour]
    shape = (variables, HOURS * density)  # one slot of 60 / density minutes after the other
    return (
        static,
        np.asarray(rng.random()),
        severity,
        rng.random(shape),
        rng.integers(0, 60 // density, shape),
        rng.normal(scale=0.5, size=shape),
        rng.normal(size=variables),
        rng.random(shape),
        np.asarray(rng.random()),
    )


def _rows(
    severity: NDArray[np.float64],
    shocks: NDArray[np.int64],
    measured: NDArray[np.float64],
    minute: NDArray[np.int64],
    noise: NDArray[np.float64],
    habit: NDArray[np.float64],
    oddity: NDArray[np.float64],
    without: NDArray[np.float64],
) -> pl.DataFrame:
    """Lines of the series by stay: what is measured, and of what value."""
    mean, spread, loading, per_day, decimals = (np.array(column) for column in zip(*_VARIABLES.values(), strict=True))
    slots = measured.shape[-1] // HOURS
    severity = np.repeat(severity, slots, axis=1)
    # The sick are measured more often: up to about twice as often as the well.
    often = 0.75 + 0.75 / (1 + np.exp(-severity))
    rate = per_day[None, :, None] / 24 * often[:, None, :]
    standard = 0.6 * habit[:, :, None] + loading[None, :, None] * severity[:, None, :] + noise
    names = list(_VARIABLES)
    since = np.arange(HOURS * slots)[None, :] // slots - shocks[:, None]
    in_shock = (shocks[:, None] >= 0) & (since >= 0) & (since < SHOCK_HOURS)
    standard += np.array([_SHOCK.get(name, 0.0) for name in names])[None, :, None] * in_shock[:, None, :]
    lowest, highest = np.array([_LIMITS.get(name, (0, np.inf)) for name in names]).T[:, None, :, None]
    value = np.clip(mean[None, :, None] + spread[None, :, None] * standard, lowest, highest)
    value = np.where(oddity < 0.0002, value * 100, value)  # a slip of the decimal point
    stay, variable, slot = np.nonzero((measured < rate) & (without >= 0.002)[:, None, None])
    rounded = [f"{v:.{d}f}" for v, d in zip(value[stay, variable, slot], decimals[variable].astype(int), strict=True)]
    frame = pl.DataFrame(
        {
            "stay": stay,
            "minute": slot * (60 // slots) + minute[stay, variable, slot],
            "parameter": np.asarray(names, dtype=object)[variable].tolist(),
            "value": rounded,
        }
    ).sort("stay", "minute", "parameter")
    clock = pl.format(
        "{}:{}",
        (pl.col("minute") // 60).cast(pl.String).str.zfill(2),
        (pl.col("minute") % 60).cast(pl.String).str.zfill(2),
    )
    return frame.with_columns(pl.format("{},{},{}", clock, "parameter", "value").alias("line"))
