"""Plain reader, columnar reader and naive twin give the same rows; a cut history is a prefix of the whole."""

from datetime import datetime, timedelta

import numpy as np
import polars as pl
import pytest
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

from ehrseq.encode import assembly, encoder
from ehrseq.tokenization.ehr_plans import CHANNELS
from ehrseq.tokenization.tokenization_ehr import EhrTokenizer
from tests.properties import examples
from tests.tokenization.naive_sequence import naive_row

START = datetime(2020, 1, 1)
SCHEMA = {
    "subject_id": pl.Int64,
    "time": pl.Datetime("us"),
    "code": pl.String,
    "numeric_value": pl.Float32,
    "text_value": pl.String,
    "visit_id": pl.String,
    "unit": pl.String,
}
CODES = [
    *["VISIT_START//IMP", "VISIT_START//AMB", "VISIT_START//EMER", "VISIT_START//ICU"],
    *["VISIT_END//home", "VISIT_END//IMP", "VISIT_END//ICU"],
    *[
        "DIAGNOSIS//ICD10CM//I10.1",
        "DIAGNOSIS//ICD10CM//Q99.9",
        "LAB//LOINC//1",
        "VITAL//LOINC//2",
        "MEDICATION//RXNORM//3",
    ],
    *["GENDER//F", "MEDS_DEATH", "MEDS_BIRTH", "SOMETHING//ELSE"],
]
# Hours that make ties, same-day pairs, days apart, months apart likely.
HOURS = st.sampled_from([0, 0, 1, 2, 5, 23, 24, 25, 47, 200, 700, 2000, 9000])
EVENTS = st.lists(
    st.fixed_dictionaries(
        {
            "gap": HOURS,
            "code": st.sampled_from(CODES),
            "numeric_value": st.sampled_from(
                [None, None, 0.5, 1.0, 2.5, 99.0, float("nan"), float("inf"), float("-inf")]
            ),
            "text_value": st.sampled_from([None, None, "positive", "never seen", ""]),
            "visit_id": st.sampled_from([None, "a", "b", "c"]),
            "unit": st.sampled_from([None, "mg/dL", "mmol/L", ""]),
            "static": st.sampled_from([False] * 9 + [True]),
        }
    ),
    min_size=1,
    max_size=25,
)
# Few codes and visit_ids, many starts, gaps on either side of every patience (1, 3 and 30 days).
OPEN_ENDED = st.lists(
    st.fixed_dictionaries(
        {
            "gap": st.sampled_from([0, 1, 12, 23, 24, 25, 71, 72, 73, 719, 720, 721]),
            "code": st.sampled_from(
                [*CODES[:4], *CODES[:4], "VISIT_END//home", "VISIT_END//IMP", "LAB//LOINC//1", "MEDICATION//RXNORM//3"]
            ),
            "visit_id": st.sampled_from([None, "a", "b"]),
            **{name: st.none() for name in ("numeric_value", "text_value", "unit")},
            "static": st.just(False),
        }
    ),
    min_size=1,
    max_size=14,
)
FIXTURES = {"suppress_health_check": [HealthCheck.function_scoped_fixture]}
COMMON = examples(150, **FIXTURES)


def rows_of(drawn: list[dict], subject_id: int) -> list[dict]:
    """Events with times, from drawn gaps in hours."""
    now, rows = START, []
    for event in drawn:
        now += timedelta(hours=event["gap"])
        row = {key: event[key] for key in ("code", "numeric_value", "text_value", "visit_id", "unit")}
        rows.append({"subject_id": subject_id, "time": None if event["static"] else now, **row})
    return rows


def table_of(*patients: list[dict]) -> pl.DataFrame:
    return pl.DataFrame([row for patient in patients for row in patient], schema=SCHEMA, orient="row")


@pytest.fixture(scope="module")
def tokenizer() -> EhrTokenizer:
    rng = np.random.default_rng(0)
    rows = [
        {
            "subject_id": 1,
            "time": START,
            "code": code,
            "numeric_value": float(rng.normal()) if kind == "number" else None,
            "text_value": "positive" if kind == "text" else None,
            "visit_id": None,
            "unit": unit,
        }
        for code in CODES
        if code != "DIAGNOSIS//ICD10CM//Q99.9"  # falls back to nothing it knows
        for kind in ("bare", "number", "text")
        for unit in (None, "mg/dL")
        for _ in range(10)
    ]
    return EhrTokenizer.train(table_of(rows), tasks=["mortality_30d", "readmission_30d"])


@pytest.fixture(scope="module")
def few_visits_tokenizer(tokenizer: EhrTokenizer) -> EhrTokenizer:
    rows = [{"subject_id": 1, "time": START, "code": code, "unit": None} for code in CODES]
    return EhrTokenizer.train(pl.DataFrame(rows), tasks=["mortality_30d", "readmission_30d"], max_num_visits=4)


@pytest.fixture(scope="module")
def paper_tokenizer(tokenizer: EhrTokenizer) -> EhrTokenizer:
    rows = [{"subject_id": 1, "time": START, "code": code, "unit": None} for code in CODES]
    return EhrTokenizer.train(pl.DataFrame(rows), tasks=["mortality_30d"], input_kinds="paper")


def assert_rows_equal(ours: dict, columnar: dict) -> None:
    for name in CHANNELS:
        np.testing.assert_array_equal(ours[name], np.asarray(columnar[name], dtype=ours[name].dtype), err_msg=name)


def known_row(tokenizer: EhrTokenizer, patient: list[dict], *question) -> dict:
    """The naive twin's row (task, prediction time, context), which the tokenizer's own must equal to the last bit."""
    truth = naive_row(tokenizer, patient, *question)
    ours = tokenizer.encode_patient({"events": patient}, *question)
    assert {name: values.dtype for name, values in ours.items()} == {k: v.dtype for k, v in truth.items()}
    assert_rows_equal(truth, ours)
    return truth


@COMMON
@given(first=EVENTS, second=EVENTS)
def test_whole_histories_agree(tokenizer: EhrTokenizer, first: list[dict], second: list[dict]) -> None:
    patients = [rows_of(first, 3), rows_of(second, 8)]
    table = tokenizer.encode_table(table_of(*patients)).to_pylist()
    assert [row["subject_id"] for row in table] == [3, 8]
    for patient, row in zip(patients, table, strict=True):
        assert_rows_equal(known_row(tokenizer, patient), row)


@COMMON
@given(drawn=EVENTS)
def test_input_kinds_agree(paper_tokenizer: EhrTokenizer, drawn: list[dict]) -> None:
    patient = rows_of(drawn, 3)
    (row,) = paper_tokenizer.encode_table(table_of(patient)).to_pylist()
    assert_rows_equal(known_row(paper_tokenizer, patient), row)


@examples(600, **FIXTURES)
@given(
    drawn=st.one_of(EVENTS, OPEN_ENDED),
    statics=st.sampled_from([0, 1, 2, 9]),
    task=st.sampled_from([None, "readmission_30d", "mortality_30d"]),
    cut_hours=st.one_of(st.none(), st.integers(-5, 12_000)),
    max_length=st.sampled_from([None, 8, 9, 11, 14, 20, 40]),
)
def test_one_patient_equals_the_naive_twin(
    few_visits_tokenizer: EhrTokenizer,
    drawn: list[dict],
    statics: int,
    task: str | None,
    cut_hours: int | None,
    max_length: int | None,
) -> None:
    """Every question, with and without a cut, static tokens that crowd the context, visits beyond the last order."""
    patient = [{"time": None, "code": "GENDER//F"}] * statics + rows_of(drawn, 3)
    at = None if cut_hours is None else START + timedelta(hours=cut_hours)
    row = known_row(few_visits_tokenizer, patient, task, at, max_length)
    assert row["visit_orders"].max() < 4


def test_static_tokens_alone_that_exceed_the_context_leave_the_first_token(tokenizer: EhrTokenizer) -> None:
    row = known_row(tokenizer, [{"time": None, "code": "GENDER//F"}] * 30, None, None, 8)
    assert row["input_ids"].tolist() == [tokenizer.cls_token_id]


@COMMON
@given(drawn=EVENTS, cut_hours=st.integers(-5, 12_000), max_length=st.sampled_from([None, 8, 12, 20]))
def test_several_tasks_of_one_patient_are_the_rows_of_each(
    tokenizer: EhrTokenizer, drawn: list[dict], cut_hours: int, max_length: int | None
) -> None:
    patient, at = {"events": rows_of(drawn, 3)}, START + timedelta(hours=cut_hours)
    tasks = ["readmission_30d", None, "mortality_30d", "readmission_30d"]
    for task, row in zip(tasks, tokenizer.encode_prompts(patient, tasks, at, max_length), strict=True):
        assert_rows_equal(tokenizer.encode_patient(patient, task, at, max_length), row)


def test_many_encounters_without_ends_agree(tokenizer: EhrTokenizer) -> None:
    count = 10_000
    starts = [{"gap": 30, "code": "VISIT_START//AMB", "visit_id": f"v{k}", "static": False} for k in range(count)]
    patient = rows_of([{**row, **dict.fromkeys(("numeric_value", "text_value", "unit"))} for row in starts], 3)
    (row,) = tokenizer.encode_table(table_of(patient)).to_pylist()
    ours = known_row(tokenizer, patient)
    assert_rows_equal(ours, row)
    assert sum(ours["token_type_ids"] == 2) == count


@examples(500, **FIXTURES)
@given(first=OPEN_ENDED, second=OPEN_ENDED, place=st.integers(0, 13))
def test_encounters_without_ends_agree(
    tokenizer: EhrTokenizer, first: list[dict], second: list[dict], place: int
) -> None:
    patients = [rows_of(first, 3), rows_of(second, 8)]
    at = patients[0][place % len(first)]["time"]
    labels = pl.DataFrame({"subject_id": [3, 8], "prediction_time": [at, at], "boolean_value": [True, False]})
    whole = tokenizer.encode_table(table_of(*patients)).to_pylist()
    cut = tokenizer.encode_table(table_of(*patients), {"readmission_30d": labels}).to_pylist()
    for patient, row, known in zip(patients, whole, cut, strict=True):
        assert_rows_equal(known_row(tokenizer, patient), row)
        assert_rows_equal(known_row(tokenizer, patient, "readmission_30d", at), known)
        # the known rows, without task and closing marks, are a prefix of the whole
        closing = 2 if known["token_type_ids"][-2] == 3 else 1
        assert known["input_ids"][1:-closing] == row["input_ids"][1 : len(known["input_ids"]) - closing]


@COMMON
@given(drawn=EVENTS, cut_hours=st.integers(-5, 12_000), max_length=st.sampled_from([None, 8, 9, 12, 20]))
def test_prompts_agree_at_any_cut(
    tokenizer: EhrTokenizer, drawn: list[dict], cut_hours: int, max_length: int | None
) -> None:
    patient, other = rows_of(drawn, 3), rows_of(drawn[::-1], 8)
    at = START + timedelta(hours=cut_hours)
    labels = pl.DataFrame({"subject_id": [8, 3], "prediction_time": [at, at], "boolean_value": [True, False]})
    table = tokenizer.encode_table(table_of(patient, other), {"readmission_30d": labels}, max_length).to_pylist()
    for row, events in zip(table, (other, patient), strict=True):
        ours = known_row(tokenizer, events, "readmission_30d", at, max_length)
        assert_rows_equal(ours, row)
        assert ours["input_ids"][-1] == tokenizer.convert_tokens_to_ids("[REA_1M]")
        assert max_length is None or len(ours["input_ids"]) <= max_length


@COMMON
@given(drawn=EVENTS, place=st.integers(0, 24))
def test_the_cut_history_is_a_prefix_of_the_whole(tokenizer: EhrTokenizer, drawn: list[dict], place: int) -> None:
    patient = rows_of(drawn, 3)
    times = [row["time"] for row in patient if row["time"] is not None]
    if not times:
        return
    cut = times[place % len(times)]
    whole = tokenizer.encode_patient({"events": patient})
    known = tokenizer.encode_patient({"events": patient}, prediction_time=cut)
    alone = tokenizer.encode_patient({"events": [r for r in patient if r["time"] is None or r["time"] <= cut]})
    closing = 2 if known["input_ids"][-1] == tokenizer.convert_tokens_to_ids("[REG]") else 0
    length = len(known["input_ids"]) - closing
    for name in CHANNELS:
        np.testing.assert_array_equal(known[name], alone[name], err_msg=name)
        if name != "ages":  # a birth recorded after the cut is not known at the cut
            np.testing.assert_array_equal(known[name][:length], whole[name][:length], err_msg=name)


@COMMON
@given(first=EVENTS, second=EVENTS, max_length=st.sampled_from([8, 10, 16, 40]))
def test_windows_lose_no_event(tokenizer: EhrTokenizer, first: list[dict], second: list[dict], max_length: int) -> None:
    events = table_of(rows_of(first, 3), rows_of(second, 8))
    histories = tokenizer.encode_histories(events)
    windows = histories.windows(max_length)
    is_event = np.asarray(tokenizer.token_types) >= 5
    is_event[tokenizer.convert_tokens_to_ids(["[REG]", "[UNK]"])] = [False, True]
    for subject, whole in zip((3, 8), tokenizer.encode_table(events).to_pylist(), strict=True):
        rows = [windows[i] for i in np.flatnonzero(windows.subject_ids == subject)]
        static = [i for i, kind in zip(whole["input_ids"], whole["token_type_ids"], strict=True) if kind == 12]
        ids = [i for row in rows for i, kind in zip(row["input_ids"], row["token_type_ids"], strict=True) if kind != 12]
        timed = [i for i, kind in zip(whole["input_ids"], whole["token_type_ids"], strict=True) if kind != 12]
        assert [i for i in ids if is_event[i]] == [i for i in timed if is_event[i]]
        for row, length in zip(rows, windows.lengths[windows.subject_ids == subject], strict=True):
            assert len(row["input_ids"]) == length <= max_length or len(static) >= max_length
            assert row["input_ids"][0] == tokenizer.cls_token_id
            body = row["visit_orders"][row["visit_orders"] > 0]
            assert not len(body) or body[0] == 1
            assert np.all(np.diff(body) >= 0)


@COMMON
@given(
    drawn=EVENTS,
    hours=st.lists(st.integers(-5, 12_000), min_size=1, max_size=4),
    max_length=st.sampled_from([None, 8, 9, 12, 20]),
)
def test_lazy_rows_equal_the_table(
    tokenizer: EhrTokenizer,
    drawn: list[dict],
    hours: list[int],
    max_length: int | None,
) -> None:
    events = table_of(rows_of(drawn, 3), rows_of(drawn[::-1], 8))
    labels = {
        task: pl.DataFrame(
            {
                "subject_id": [subject for subject in (8, 3) for _ in hours],
                "prediction_time": [START + timedelta(hours=h) for h in hours] * 2,
                "boolean_value": [h % 2 == 0 for h in hours] * 2,
            }
        )
        for task in ("readmission_30d", "mortality_30d")
    }
    rows = tokenizer.encode_table(events, labels, max_length).to_pylist()
    histories = tokenizer.encode_histories(events)
    index = histories.index_labels(labels)
    assert len(index) == len(rows) == 4 * len(hours)
    for k, row in enumerate(rows):
        lazy = histories.prompted_row(index, k, max_length)
        for name in CHANNELS:
            np.testing.assert_array_equal(lazy[name], np.asarray(row[name], lazy[name].dtype), err_msg=name)
        assert (lazy["labels"], tokenizer.tasks[lazy["task_ids"]]) == (row["label"], row["task"])
        assert histories.subject_ids[index.history[k]] == row["subject_id"]
    part = index.subset([len(rows) - 1, 0])
    first = histories.prompted_row(part, 0, max_length)
    np.testing.assert_array_equal(first["input_ids"], rows[-1]["input_ids"])


@COMMON
@given(drawn=EVENTS, max_length=st.sampled_from([8, 11, 16, 40]))
def test_windows_equal_the_pretraining_table(
    tokenizer: EhrTokenizer,
    drawn: list[dict],
    max_length: int,
) -> None:
    events = table_of(rows_of(drawn, 3), rows_of(drawn[::-1], 8))
    windows = tokenizer.encode_histories(events).windows(max_length)
    rows = tokenizer.encode_table(events, max_length=max_length).to_pylist()
    assert len(windows) == len(rows)
    for k, row in enumerate(rows):
        assert windows.subject_ids[k] == row["subject_id"]
        for name, values in windows[k].items():
            np.testing.assert_array_equal(values, np.asarray(row[name], values.dtype), err_msg=name)


@COMMON
@given(drawn=st.lists(EVENTS, min_size=1, max_size=6))
def test_chunks_make_no_difference(tokenizer: EhrTokenizer, drawn: list[list[dict]]) -> None:
    events = table_of(*(rows_of(patient, 10 - number) for number, patient in enumerate(drawn)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoder, "_CHUNK_ROWS", 7)
        patch.setattr(assembly, "_CHUNK_TOKENS", 11)
        parts = tokenizer.encode_table(events), tokenizer.encode_table(events, max_length=12)
    whole = tokenizer.encode_table(events), tokenizer.encode_table(events, max_length=12)
    assert parts[0].to_pylist() == whole[0].to_pylist()
    assert parts[1].to_pylist() == whole[1].to_pylist()
