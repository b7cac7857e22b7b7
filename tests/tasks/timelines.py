"""Hand-made timelines: rows of (time, code, visit_id) for one patient or several."""

from datetime import datetime

import polars as pl

from ehrseq.tasks import label_events

END_OF_DATA = "2030-01-01T00:00:00"

IMP, IMP_OUT = "VISIT_START//IMP", "VISIT_END//home"
ED, ED_OUT = "VISIT_START//EMER", "VISIT_END//EMER"
AMB, AMB_OUT = "VISIT_START//AMB", "VISIT_END//AMB"
DIED_OUT = "VISIT_END//exp"
DEATH = "MEDS_DEATH"
I10 = "DIAGNOSIS//ICD10CM//I10"


def at(text: str) -> datetime:
    """'2020-01-01 10:00' or with seconds and microseconds; a bare date is midnight."""
    return datetime.fromisoformat(text)


def events(*rows: tuple, subject: int = 1) -> pl.DataFrame:
    """Rows of (time, code[, visit_id]); time None is static."""
    return pl.DataFrame(
        [
            {
                "subject_id": subject,
                "time": None if row[0] is None else at(row[0]),
                "code": row[1],
                "visit_id": row[2] if len(row) > 2 else None,
            }
            for row in rows
        ],
        schema={"subject_id": pl.Int64, "time": pl.Datetime("us"), "code": pl.String, "visit_id": pl.String},
    )


def stay(
    start: str, end: str | None, visit_id: str | None = None, *, start_code: str = IMP, end_code: str = IMP_OUT
) -> list[tuple]:
    """The two boundary rows of an encounter (one where it is open)."""
    rows: list[tuple] = [(start, start_code, visit_id)]
    return rows if end is None else [*rows, (end, end_code, visit_id)]


# The index stay of most timelines: ten days, discharged on 11 January 2020 at noon.
INDEX = stay("2020-01-01 12:00", "2020-01-11 12:00", "a")
OUT = "2020-01-11 12:00"
ED_STAY = {"start_code": ED, "end_code": ED_OUT}
ICU_STAY = {"start_code": "VISIT_START//ICU", "end_code": "VISIT_END//ICU"}
CLINIC = {"start_code": AMB, "end_code": AMB_OUT}


GOES_ON = "VISIT_END//in-progress"


def check(
    task: str, rows: list[tuple], expected: dict[str, int], dropped: dict[str, int], competing: dict[str, int]
) -> None:
    """Label one patient; compare labels {prediction time: label}, drop reasons, competing events (zeros left out)."""
    result = label_events(events(*rows), task, end_of_data=END_OF_DATA)
    got = dict(result.labels[task].select("prediction_time", "boolean_value").iter_rows())
    assert got == {at(time): bool(label) for time, label in expected.items()}
    assert {reason: count for reason, count in result.report[task].items() if count} == dropped
    assert {event: count for event, count in result.competing[task].items() if count} == competing
    assert result.candidates[task] == len(expected) + sum(dropped.values())
