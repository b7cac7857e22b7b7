"""What simulated lives are recorded in: the simulator's clock, its units and texts, the tables of a block."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from ehrseq.data.simulate.codes import MEASUREMENTS

HOUR = 60
DAY = 1440
STATIC = np.iinfo(np.int64).min
"""Time of a row that has none."""
NEVER = np.iinfo(np.int64).max
"""Time of what does not happen."""
YEAR_MINUTES = 365.25 * DAY


def minutes_of(date: str) -> int:
    """Minutes since 1970 of an ISO date."""
    return int(np.datetime64(date, "m").astype(np.int64))


ENTRY = (minutes_of("2010-01-01"), minutes_of("2015-01-01"))
"""A record begins at a uniform time in this span."""
EXTRACTION = minutes_of("2022-01-01")
"""Nothing later is recorded."""

UNITS: tuple[str, ...] = ("", *sorted({unit for channel in MEASUREMENTS for unit, _, _ in channel.units}), "{count}")
"""Units by id; 0 stands for none."""
TEXTS: tuple[str, ...] = ("", "negative", "positive")
"""Text results by id; 0 stands for none."""


@dataclass
class Columns:
    """Columns collected piece by piece, then joined.

    Attributes:
        pieces: One tuple of equally long arrays per call of `add`.
    """

    names: tuple[str, ...]
    dtypes: tuple[type, ...]
    pieces: list[tuple[np.ndarray, ...]] = field(default_factory=list)

    def add(self, *columns: np.ndarray | float | int) -> None:
        """Append rows; the first column is an array, the others arrays of its length or scalars."""
        first = np.asarray(columns[0])
        if len(first) == 0:
            return
        self.pieces.append(
            tuple(
                np.broadcast_to(np.asarray(column, dtype=dtype), first.shape)
                for column, dtype in zip(columns, self.dtypes, strict=True)
            )
        )

    def join(self) -> dict[str, np.ndarray]:
        """The joined columns by name."""
        if not self.pieces:
            return {name: np.empty(0, dtype=dtype) for name, dtype in zip(self.names, self.dtypes, strict=True)}
        return {name: np.concatenate([piece[k] for piece in self.pieces]) for k, name in enumerate(self.names)}


@dataclass
class SimulatedBlock:
    """What the process left of a block of patients, as columns of equal length per table.

    Attributes:
        events: row (position in the block), minutes, code (id), value (NaN for none), unit (id), text (id), encounter
            (number within the patient).
        encounters: row, number, code of the start, start, end (NEVER while open at the extraction), parent (-1 for
            none), disposition (-1 for none).
        admissions: row, cycle, visit_start (of the overlapping emergency visit, else of the admission), start, end,
            alive (discharged alive), long_stay (probability at 24 h, NaN for a shorter stay) and one column per
            discharge task (NaN where there is no label).
        birth: int64 `[n]`, minutes.
        male: bool `[n]`.
        race: int64 `[n]`, position in `RACES`.
        death: int64 `[n]`, minutes or NEVER.
    """

    events: dict[str, np.ndarray]
    encounters: dict[str, np.ndarray]
    admissions: dict[str, np.ndarray]
    birth: np.ndarray
    male: np.ndarray
    race: np.ndarray
    death: np.ndarray
