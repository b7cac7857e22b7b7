"""Trajectories as MEDS files, one file a trajectory number: `GeneratedTrajectorySchema` of MEDS_trajectory_evaluation.

    FOLDER/0.parquet ... FOLDER/<n - 1>.parquet

Each holds one future of every (subject, prediction time): subject_id, prediction_time, time, code, numeric_value, in
this order. A token of a value says only its bin; its numeric_value is the middle of the bin, of an outer one its edge.
The last row of each future is `TRAJECTORY_END//<why>` (HORIZON, DEATH, UNTIL, LENGTH) at the time up to which it is
known, so that whoever labels it can tell what did not happen from what was not drawn.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from ehrseq.modeling.ehr_trajectories import PatientTrajectories, TrajectoryEnd
from ehrseq.tokenization.ehr_codes import DAY_US
from ehrseq.work.files import check_replaceable, write_whole

if TYPE_CHECKING:
    from ehrseq.tokenization.ehr_forecast_questions import TokenMeaning

TRAJECTORY_SCHEMA = pl.Schema(
    {
        "subject_id": pl.Int64(),
        "prediction_time": pl.Datetime("us"),
        "time": pl.Datetime("us"),
        "code": pl.String(),
        "numeric_value": pl.Float32(),
    }
)
END_CODE = "TRAJECTORY_END"

_FILE = re.compile(r"\d+\.parquet")
_NUMBERED = pl.Schema({"trajectory": pl.Int32(), **TRAJECTORY_SCHEMA})


class TokenRows:
    """What the tokens of a vocabulary become in a MEDS file.

    Args:
        meanings: Token id -> what it says (`EhrTokenizer.token_meanings`); others are marks and make no row.
        size: Of the vocabulary.
    """

    def __init__(self, meanings: Mapping[int, TokenMeaning], size: int) -> None:
        codes: list[str | None] = [None] * size
        self.is_event = np.zeros(size, bool)
        self.values = np.full(size, np.nan, np.float32)
        for number, meaning in meanings.items():
            codes[number] = meaning.code
            self.is_event[number] = True
            bounds = [bound for bound in (meaning.low, meaning.high) if bound is not None]
            if bounds:
                self.values[number] = np.mean(bounds)
        self.codes = pl.Series(codes, dtype=pl.String)

    def table(self, subject_id: int, prediction_time: int, drawn: PatientTrajectories) -> pl.DataFrame:
        """Rows of one prompt's trajectories, with their number.

        Args:
            subject_id: Whose they are.
            prediction_time: Microseconds.
            drawn: With their tokens.
        """
        tokens, days, numbers = [], [], []
        for number, (ids, at) in enumerate(zip(drawn.tokens or [], drawn.days or [], strict=True)):
            shown = self.is_event[ids]
            tokens.append(ids[shown])
            days.append(at[shown])
            numbers.append(np.full(int(shown.sum()), number, np.int32))
        ids = np.concatenate([*tokens, np.zeros(0, np.int64)])
        events = pl.DataFrame(
            {
                "trajectory": np.concatenate([*numbers, np.zeros(0, np.int32)]),
                "time": _instants(prediction_time, np.concatenate([*days, np.zeros(0)])),
                "code": self.codes.gather(ids),
                "numeric_value": pl.Series(self.values[ids]).fill_nan(None),
            }
        )
        why = [f"{END_CODE}//{TrajectoryEnd(end).name}" for end in drawn.ends.tolist()]
        ends = pl.DataFrame(
            {
                "trajectory": np.arange(len(why), dtype=np.int32),
                "time": _instants(prediction_time, drawn.end_days),
                "code": pl.Series(why, dtype=pl.String),
                "numeric_value": pl.Series([None] * len(why), dtype=pl.Float32),
            }
        )
        asked = pl.lit(prediction_time, pl.Int64).cast(pl.Datetime("us"))
        table = pl.concat([events, ends]).with_columns(
            subject_id=pl.lit(subject_id, pl.Int64), prediction_time=asked, time=pl.col("time").cast(pl.Datetime("us"))
        )
        return table.select(pl.col(name).cast(dtype) for name, dtype in _NUMBERED.items())


def no_trajectories() -> pl.DataFrame:
    """A table without a row, as `TokenRows.table` makes it."""
    return pl.DataFrame(schema=_NUMBERED)


def check_trajectory_folder(folder: str | Path) -> None:
    """Raise ValueError where files of trajectories would replace what is none of them."""
    check_replaceable(folder, lambda name: _FILE.fullmatch(name) is not None, "files of trajectories")


def write_trajectories(tables: Sequence[Path] | pl.DataFrame, folder: str | Path, num: int) -> Path:
    """Write one file a trajectory number, the folder whole or not at all.

    Args:
        tables: Numbered rows: Parquet files, or a table.
        folder: Where to; replaced where it is there.
        num: Number of trajectories a prompt.

    Raises:
        ValueError: The folder holds something else.
    """
    check_trajectory_folder(folder)
    lazy = tables.lazy() if isinstance(tables, pl.DataFrame) else pl.concat([pl.scan_parquet(file) for file in tables])

    def write(unfinished: Path) -> None:
        unfinished.mkdir(parents=True)
        for number in range(num):
            rows = lazy.filter(pl.col("trajectory") == number).drop("trajectory").collect()
            order = ["subject_id", "prediction_time", "time"]
            rows.sort(order, maintain_order=True).write_parquet(unfinished / f"{number}.parquet")

    write_whole(folder, write)
    return Path(folder)


def _instants(prediction_time: int, days: np.ndarray) -> np.ndarray:
    instants: np.ndarray = prediction_time + np.rint(days * DAY_US).astype(np.int64)
    return instants
