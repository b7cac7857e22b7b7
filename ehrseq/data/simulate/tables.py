"""A block of simulated patients as tables: its events in order, as the MEDS table, and its admissions."""

from __future__ import annotations

import numpy as np
import polars as pl

from ehrseq.data.simulate.codes import VOCABULARY
from ehrseq.data.simulate.risk import SCORES
from ehrseq.data.simulate.state import STATIC, TEXTS, UNITS, SimulatedBlock
from ehrseq.tokenization.ehr_codes import MINUTE_US

_CODES = pl.Series("code", VOCABULARY.codes, dtype=pl.String)
_UNIT_NAMES = pl.Series("unit", [None, *UNITS[1:]], dtype=pl.String)
_TEXT_NAMES = pl.Series("text_value", [None, *TEXTS[1:]], dtype=pl.String)


_KIND_RANKS = {
    "GENDER": 0,
    "RACE": 1,
    "MEDS_BIRTH": 2,
    "VISIT_START": 3,
    "DIAGNOSIS": 4,
    "IMMUNIZATION": 5,
    "MEDICATION": 6,
    "LAB": 7,
    "VITAL": 7,
    "PROCEDURE": 8,
    "VISIT_END": 9,
    "MEDS_DEATH": 10,
}
# Place of a row among the rows of one instant: the event table's order, and inside it the order of the FHIR files.
_RANKS = np.array([_KIND_RANKS[code.split("//")[0]] for code in VOCABULARY.codes])


def block_events(subject_ids: np.ndarray, block: SimulatedBlock) -> pl.DataFrame:
    """MEDS rows of a block, in the contract's order, exact duplicates removed.

    Args:
        subject_ids: int64 `[n]`.
        block: What the process left of these patients.
    """
    events = ordered_events(block)
    subjects = subject_ids[events["row"]]
    encounter = pl.Series(events["encounter"])
    frame = pl.DataFrame(
        {
            "subject_id": pl.Series(subjects, dtype=pl.Int64),
            "time": _times(events["minutes"], int(STATIC)),
            "code": _CODES.gather(events["code"]),
            "numeric_value": pl.Series(events["value"]).fill_nan(None).cast(pl.Float32),
            "text_value": _TEXT_NAMES.gather(events["text"]),
            "visit_id": encounter,
            "unit": _UNIT_NAMES.gather(events["unit"]),
        }
    )
    visit = pl.format("{}-{}", "subject_id", "visit_id")
    return frame.with_columns(pl.when(pl.col("visit_id") >= 0).then(visit).alias("visit_id"))


def ordered_events(block: SimulatedBlock) -> dict[str, np.ndarray]:
    """Columns of a block's events sorted by patient, time, the contract's order, and code; exact duplicates removed."""
    events = block.events
    order = np.lexsort((events["value"], events["code"], _RANKS[events["code"]], events["minutes"], events["row"]))
    events = {name: column[order] for name, column in events.items()}
    same = np.ones(max(len(order) - 1, 0), dtype=bool)
    for name in ("row", "minutes", "code", "unit", "text", "encounter"):
        same &= events[name][1:] == events[name][:-1]
    same &= (events["value"][1:] == events["value"][:-1]) | (
        np.isnan(events["value"][1:]) & np.isnan(events["value"][:-1])
    )
    keep = np.concatenate([np.ones(min(len(order), 1), dtype=bool), ~same])
    return {name: column[keep] for name, column in events.items()}


def block_admissions(subject_ids: np.ndarray, block: SimulatedBlock) -> pl.DataFrame:
    """One row an admission, see `Simulation.admissions`."""
    table = block.admissions
    times = {name: table[name] for name in ("visit_start", "start", "end")}
    return pl.DataFrame(
        {
            "subject_id": pl.Series(subject_ids[table["row"]], dtype=pl.Int64),
            **{name: _times(column, int(STATIC)) for name, column in times.items()},
            "alive": table["alive"],
            **{task: pl.Series(table[task]).fill_nan(None) for task in SCORES},
        }
    ).sort("subject_id", "start")


def _times(minutes: np.ndarray, none: int) -> pl.Series:
    """Datetime("us") of minutes since 1970, null where they equal `none`."""
    absent = minutes == none
    microseconds = np.where(absent, 0, minutes) * MINUTE_US
    series = pl.Series(microseconds).cast(pl.Datetime("us"))
    return (
        series if not absent.any() else series.zip_with(pl.Series(~absent), pl.Series([None], dtype=pl.Datetime("us")))
    )
