"""Short hand-made patients, and the words of their sequences."""

from datetime import datetime, timedelta
from typing import Any

import polars as pl

from ehrseq.tokenization.tokenization_ehr import EhrTokenizer

START = datetime(2020, 1, 1)
SCHEMA: dict[str, Any] = {
    "subject_id": pl.Int64,
    "time": pl.Datetime("us"),
    "code": pl.String,
    "numeric_value": pl.Float32,
    "text_value": pl.String,
    "visit_id": pl.String,
    "unit": pl.String,
}


def at(hours: float | None) -> datetime | None:
    """Hours after the start of 2020; None = static."""
    return None if hours is None else START + timedelta(hours=hours)


def event(hours: float | None, code: str, visit_id: str | None = None, **more: Any) -> dict[str, Any]:
    return {"time": at(hours), "code": code, "visit_id": visit_id, **more}


def table(*patients: list[dict[str, Any]], first: int = 1) -> pl.DataFrame:
    """Event table of patients numbered from `first`."""
    rows = [
        {name: row.get(name) for name in SCHEMA} | {"subject_id": subject}
        for subject, patient in enumerate(patients, first)
        for row in patient
    ]
    return pl.DataFrame(rows, schema=SCHEMA, orient="row")


def fitted(*patients: list[dict[str, Any]], **settings: Any) -> EhrTokenizer:
    return EhrTokenizer.train(table(*patients), **{"tasks": ["mortality_30d", "readmission_30d"], **settings})


def words(tokenizer: EhrTokenizer, patient: list[dict[str, Any]], **settings: Any) -> str:
    """The tokens of a patient's row, one string."""
    row = tokenizer({"subject_id": 1, "events": patient}, **settings)
    return " ".join(tokenizer.convert_ids_to_tokens(row["input_ids"]))
