"""The silence after a record's last visit: hand-counted days, and the way to a model's batch."""

from datetime import UTC, date, datetime, timedelta

import numpy as np
import polars as pl
import pytest

from ehrseq.batches.collation import DataCollatorForNextToken
from ehrseq.batches.packing import DataCollatorForPackedNextToken, PackableRows
from ehrseq.data.dataset import write_dataset
from ehrseq.encode import EncodedDataset, encode_dataset, fit_tokenizer
from ehrseq.tokenization.tokenization_ehr import EhrTokenizer
from ehrseq.work.engine import get_engine

START = datetime(2020, 1, 1, 8)
END = datetime(2020, 7, 1, 8)


def visit(subject: int, days: float, *, closed: bool = True, end: str = "home") -> list[tuple]:
    begin = START + timedelta(days=days)
    rows = [(subject, begin, "VISIT_START//IMP"), (subject, begin, "DIAGNOSIS//ICD10CM//I10")]
    return [*rows, (subject, begin + timedelta(days=2), f"VISIT_END//{end}")] if closed else rows


def events() -> pl.DataFrame:
    rows = [
        *visit(1, 0),
        *visit(1, 100),  # last row on day 102: 80 days before the end (day 182)
        *visit(2, 0, closed=False),  # still in the visit
        *visit(3, 0),
        (3, START + timedelta(days=50), "MEDS_DEATH"),
        *visit(4, 0, end="exp"),  # the discharge says that the patient died
        *visit(5, 300),  # behind the end of the data
        (6, None, "GENDER//F"),  # no visit at all
        *visit(7, 0),
        (7, None, "MEDS_DEATH"),  # nobody knows when: no token says it
        *(row for k in range(12) for row in visit(8, 10 * k)),  # many windows; last row on day 112
    ]
    frame = pl.DataFrame(
        [(*row, str(row[1])) for row in rows], ["subject_id", "time", "code", "visit_id"], orient="row"
    )
    return frame.with_columns(
        pl.col("time").cast(pl.Datetime("us")),
        numeric_value=pl.lit(None, pl.Float32),
        visit_id=pl.lit(None, pl.String),
    ).sort("subject_id", maintain_order=True)


EXPECTED = {1: 80.0, 7: 180.0, 8: 70.0}


@pytest.fixture(scope="module")
def tokenizer() -> EhrTokenizer:
    return EhrTokenizer.train(events(), min_count=1)


def silences(windows) -> dict[int, float]:
    """Silence of each patient's last window; those of the others must be 0."""
    found: dict[int, float] = {}
    subjects = windows.subject_ids
    for place in range(len(windows)):
        row = windows[place]
        assert row["silent_days"].dtype == np.float32
        assert not row["silent_days"][:-1].any()
        assert found.get(int(subjects[place]), 0.0) == 0.0
        found[int(subjects[place])] = float(row["silent_days"][-1])
    return {subject: days for subject, days in found.items() if days}


@pytest.mark.parametrize("end", [END, END.replace(tzinfo=UTC), END.isoformat()])
@pytest.mark.parametrize("context", [16, 512])
def test_days_by_hand(tokenizer, end, context) -> None:
    assert silences(tokenizer.encode_histories(events()).windows(context, end)) == EXPECTED


def test_a_date_is_its_last_instant(tokenizer) -> None:
    found = silences(tokenizer.encode_histories(events()).windows(64, date(2020, 7, 1)))
    assert found == pytest.approx({subject: days + 16 / 24 for subject, days in EXPECTED.items()}, abs=1e-5)


def test_without_an_end_there_is_no_such_channel(tokenizer) -> None:
    windows = tokenizer.encode_histories(events()).windows(64)
    assert all("silent_days" not in windows[place] for place in range(len(windows)))


@pytest.mark.parametrize(
    ("end", "message"), [("soon", "end_of_data='soon' is no ISO 8601"), (3, "end_of_data is a int")]
)
def test_bad_ends(tokenizer, end, message) -> None:
    with pytest.raises(ValueError, match=message):
        tokenizer.encode_histories(events()).windows(64, end)


def test_batches_have_the_channel(tokenizer) -> None:
    windows = tokenizer.encode_histories(events()).windows(512, END)
    rows = [windows[place] for place in range(len(windows))]
    padded = DataCollatorForNextToken(tokenizer)(rows)
    assert padded["silent_days"].shape == padded["input_ids"].shape
    assert sorted(padded["silent_days"][padded["silent_days"] > 0].tolist()) == sorted(EXPECTED.values())
    marked = PackableRows(windows)
    packed = DataCollatorForPackedNextToken(tokenizer, 512)([marked[place] for place in range(len(marked))])
    reg = tokenizer.convert_tokens_to_ids("[REG]")
    at = packed["silent_days"] > 0
    assert sorted(packed["silent_days"][at].tolist()) == sorted(EXPECTED.values())
    assert (packed["input_ids"][at] == reg).all()
    with pytest.raises(ValueError, match="lacks the channel 'silent_days'"):
        DataCollatorForNextToken(tokenizer)([rows[0], tokenizer.encode_histories(events()).windows(512)[1]])


@pytest.mark.parametrize("format", ["arrow", "parquet"])
def test_files_say_the_same(tmp_path, format) -> None:
    frame = events()
    splits = frame.select(pl.col("subject_id").unique().sort()).with_columns(split=pl.lit("train"))
    dataset = write_dataset(frame, tmp_path / "dataset", dataset_name="test", splits=splits)
    one = get_engine(num_workers=1)
    fitted = fit_tokenizer(dataset.path, tmp_path / "parts", tasks=[], engine=one, min_count=1)
    encode_dataset(dataset.path, tmp_path / "encoded", fitted, format=format, engine=one)
    encoded = EncodedDataset(tmp_path / "encoded")
    for context in (16, 512):
        assert silences(encoded.windows(context, end_of_data=END)) == EXPECTED
    rows = list(encoded.stream(512, repeat=False, end_of_data=END))
    assert sorted(max(row["silent_days"]) for row in rows if max(row["silent_days"])) == sorted(EXPECTED.values())
