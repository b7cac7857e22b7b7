"""The feature extractor of HyMaTE: its numbers, its rows, and the Hugging Face contract."""

import json
import logging
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from transformers import AutoFeatureExtractor, DataCollatorWithPadding

from ehrseq.encode.triplets import TripletSpec, build_triplets
from ehrseq.tokenization.ehr_sequence import subjects_digest
from ehrseq.tokenization.feature_extraction_hymate import TRIPLET_CHANNELS, HyMaTEFeatureExtractor
from tests.encode.triplet_samples import SPEC, at, event, random_records, table
from tests.hub.bare_interpreter import link_packages, run_python

RECORDS = random_records(60, seed=3)
STAY = {
    "subject_id": 1,
    "times": [0, 30, 30, 90, 1440],
    "variables": ["hr", "hr", "k", "temp", "hr"],
    "values": [80.0, 90.0, 4.0, 37.0, 85.0],
    "static": {"age": 50, "sex=GENDER//M": 1, "unit=UNIT//A": 1, "unit=UNIT//B": 0},
}


@pytest.fixture(scope="module")
def fitted_on():
    return build_triplets(table(RECORDS), SPEC)


@pytest.fixture(scope="module")
def extractor(fitted_on):
    return HyMaTEFeatureExtractor.fit(fitted_on)


def rows_of(batch, number):
    return {name: np.asarray(batch[name][number]) for name in batch}


def test_numbers_are_those_of_the_training_stays(fitted_on, extractor):
    for number in range(3):
        values = fitted_on.values[fitted_on.variable_ids == number]
        lower, upper = np.percentile(values, [0.1, 99.9])
        clipped = np.clip(values, lower, upper)
        assert extractor.value_means[number] == pytest.approx(clipped.mean())
        assert extractor.value_deviations[number] == pytest.approx(clipped.std())
        assert extractor.value_counts[number] == len(values)
        far = extractor.normalise(np.array([number]), np.array([1e9]))
        np.testing.assert_allclose(far, [(upper - clipped.mean()) / clipped.std()], rtol=1e-5)
    scaled = extractor.normalise(fitted_on.variable_ids, fitted_on.values)
    assert scaled.dtype == np.float32
    for number in range(3):
        assert abs(scaled[fitted_on.variable_ids == number].mean()) < 1e-5
        assert scaled[fitted_on.variable_ids == number].std() == pytest.approx(1, rel=1e-4)
    static = extractor.normalise_static(fitted_on.static)
    known = ~np.isnan(fitted_on.static)
    np.testing.assert_array_equal(static[~known], 0)
    np.testing.assert_allclose([static[known[:, d], d].mean() for d in range(8)], 0, atol=1e-5)
    back = extractor.denormalise(fitted_on.variable_ids, scaled)
    np.testing.assert_allclose(back, np.clip(fitted_on.values, back.min(), back.max()), rtol=1e-4)


def test_the_digest_is_that_of_the_tokenizer(fitted_on, extractor):
    assert extractor.fitted_subjects_digest == subjects_digest(set(fitted_on.subject_ids.tolist()))
    assert extractor.num_fitted_subjects == len(set(fitted_on.subject_ids.tolist()))
    assert extractor.num_fitted_stays == len(fitted_on)


def test_an_outlier_does_not_widen_the_deviation():
    rng = np.random.default_rng(0)
    record = [event(0, "VISIT_START//IMP"), *(event(k / 200, "LAB//K", rng.normal(4, 0.5)) for k in range(4000))]
    clean = HyMaTEFeatureExtractor.fit(build_triplets(table({1: record}), SPEC))
    spoilt = HyMaTEFeatureExtractor.fit(build_triplets(table({1: [*record, event(1, "LAB//K", 1e5)]}), SPEC))
    assert spoilt.value_deviations[1] == pytest.approx(clean.value_deviations[1], rel=0.02)


def test_constants_and_variables_never_seen():
    record = [event(0, "VISIT_START//IMP"), *(event(hour, "LAB//K", 1.0) for hour in range(5))]
    extractor = HyMaTEFeatureExtractor.fit(build_triplets(table({1: record}), SPEC))
    assert extractor.value_deviations == [1.0, 1.0, 1.0]
    row = extractor(STAY)
    assert row["variable_ids"].tolist() == [1]  # hr and temp were never fitted: left out, not read unscaled
    assert row["values"].tolist() == [0.0]
    assert np.isfinite(row["static_values"]).all()


def test_a_row_of_one_stay(extractor):
    row = extractor(STAY)
    assert set(row) == {*TRIPLET_CHANNELS, "static_values"}
    assert {name: row[name].dtype for name in row} == {
        "variable_ids": np.int64,
        "times": np.float32,
        "values": np.float32,
        "attention_mask": np.int64,
        "static_values": np.float32,
    }
    assert row["variable_ids"].tolist() == [0, 0, 1, 2, 0]
    np.testing.assert_allclose(row["times"], np.array([0, 30, 30, 90, 1440]) / 720 - 1, rtol=1e-6)
    np.testing.assert_allclose(extractor.minutes_of(row["times"]), STAY["times"], atol=1e-3)
    np.testing.assert_allclose(
        row["values"][2], (4 - extractor.value_means[1]) / extractor.value_deviations[1], rtol=1e-5
    )
    columns = extractor.static_columns
    height = columns.index("height missing")  # what the mapping lacks is unknown, and flagged
    expected = (1 - extractor.static_means[height]) / extractor.static_deviations[height]
    np.testing.assert_allclose(row["static_values"][height], expected, rtol=1e-5)
    assert row["static_values"][columns.index("height")] == 0


def test_the_forms_of_a_stay_give_the_same_row(fitted_on, extractor):
    for number in range(0, len(fitted_on), 7):
        given = fitted_on.row(number)
        subject = given["subject_id"]
        cut = fitted_on.prediction_times[number]
        patient = {"subject_id": subject, "events": RECORDS[subject]}
        frame = table({subject: RECORDS[subject]})
        rows = [
            extractor(given),
            extractor({**given, "variables": [extractor.variables[v] for v in given["variables"]]}),
            extractor(patient, prediction_time=cut),
            extractor({**patient, "prediction_time": cut}),
            extractor(frame, prediction_time=cut),
            extractor(frame.to_pandas(), prediction_time=cut),
            extractor(frame.to_arrow(), prediction_time=cut),
        ]
        starts = [row["time"] for row in RECORDS[subject] if row["code"] == "VISIT_START//IMP"]
        if (
            max(t for t in starts if np.datetime64(t) <= cut)
            != fitted_on.starts[number].astype("datetime64[us]").item()
        ):
            continue  # another admission began inside of this one's window: a patient's stay is the latest
        for row in rows[1:]:
            for name in row:
                np.testing.assert_array_equal(row[name], rows[0][name], err_msg=name)


def test_columns_of_a_table_that_are_not_read_are_named(extractor, caplog, monkeypatch):
    """As the tokenizer does: a misspelt numeric_value would otherwise be lost without a word."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    rows = table({1: [event(0, "VISIT_START//IMP"), event(1, "VITAL//HR", 80.0)]})
    extractor(rows.with_columns(numeric_valeu=1.0))
    assert "numeric_valeu" in caplog.text


def test_the_order_of_the_rows_does_not_matter(extractor, caplog):
    order = [4, 2, 0, 3, 1]
    mixed = {**STAY, **{name: [STAY[name][k] for k in order] for name in ("times", "variables", "values")}}
    with caplog.at_level(logging.WARNING):
        again, row = extractor(mixed), extractor(STAY)
    for name in row:
        np.testing.assert_array_equal(again[name], row[name])


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_is_zero_and_changes_nothing(fitted_on, side):
    extractor = HyMaTEFeatureExtractor.fit(fitted_on, padding_side=side)
    stays = [fitted_on.row(number) for number in range(6)]
    batch = extractor(stays, padding=True, pad_to_multiple_of=8, return_tensors="pt")
    longest = int(fitted_on.lengths[:6].max())
    assert batch["variable_ids"].shape == (6, -(-longest // 8) * 8)
    assert batch["static_values"].shape == (6, 8)
    assert {name: value.dtype for name, value in batch.items()} == {
        "variable_ids": torch.int64,
        "times": torch.float32,
        "values": torch.float32,
        "attention_mask": torch.int64,
        "static_values": torch.float32,
    }
    for number, stay in enumerate(stays):
        row, mask = extractor(stay), batch["attention_mask"][number].bool()
        assert mask.sum() == len(stay["times"])
        assert bool(mask[0 if side == "right" else -1])
        for name in TRIPLET_CHANNELS:
            np.testing.assert_array_equal(batch[name][number][mask], row[name])
            assert (batch[name][number][~mask] == 0).all()
    fixed = extractor(stays[0], padding="max_length", max_length=50, return_tensors="np")
    assert fixed["values"].shape == (1, 50)
    ragged = extractor(stays)
    assert [len(row) for row in ragged["times"]] == fitted_on.lengths[:6].tolist()


def test_truncation_keeps_the_most_recent_or_random_ones_in_order(fitted_on, extractor):
    number = int(fitted_on.lengths.argmax())
    whole, size = extractor(fitted_on.row(number)), int(fitted_on.lengths[number])
    recent = extractor(fitted_on.row(number), max_length=3)
    np.testing.assert_array_equal(recent["times"], whole["times"][-3:])
    assert len(extractor(fitted_on.row(number), max_length=3, truncation=False)["times"]) == size
    seen = set()
    for seed in range(20):
        row = extractor(fitted_on.row(number), max_length=3, truncation="random", seed=seed)
        again = extractor(fitted_on.row(number), max_length=3, truncation="random", seed=seed)
        np.testing.assert_array_equal(row["values"], again["values"])
        assert len(row["times"]) == 3
        assert (np.diff(row["times"]) >= 0).all()
        seen.add(tuple(row["times"].tolist()))
    assert len(seen) > 5


def test_variable_dropout_removes_all_triplets_of_a_variable(fitted_on, extractor):
    number = int(fitted_on.lengths.argmax())
    whole = extractor(fitted_on.row(number))
    sizes = []
    for seed in range(200):
        row = extractor(fitted_on.row(number), variable_dropout=0.3, seed=seed)
        for variable in np.unique(row["variable_ids"]):  # a variable is there with all of its triplets, or not at all
            assert (row["variable_ids"] == variable).sum() == (whole["variable_ids"] == variable).sum()
        sizes.append(len(np.unique(row["variable_ids"])))
    assert min(sizes) >= 1
    assert np.mean(sizes) == pytest.approx(0.7 * 3, abs=0.2)


def test_saved_and_loaded_it_gives_the_same(extractor, tmp_path: Path):
    extractor.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert not [name for name in saved if name.startswith("_")]
    assert saved["auto_map"] == {"AutoFeatureExtractor": "feature_extraction_hymate.HyMaTEFeatureExtractor"}
    for load in (AutoFeatureExtractor, HyMaTEFeatureExtractor):
        again = load.from_pretrained(tmp_path)
        assert type(again) is HyMaTEFeatureExtractor
        row, expected = again(STAY), extractor(STAY)
        for name in expected:
            np.testing.assert_array_equal(row[name], expected[name])
    left = AutoFeatureExtractor.from_pretrained(tmp_path, padding_side="left")
    assert left(STAY, padding="max_length", max_length=9)["attention_mask"][0].tolist() == [0] * 4 + [1] * 5


def test_without_the_package_the_folder_is_enough(extractor, tmp_path: Path):
    extractor.save_pretrained(tmp_path / "saved")
    script = """
import sys
from transformers import AutoFeatureExtractor
extractor = AutoFeatureExtractor.from_pretrained(given["folder"], trust_remote_code=True)
row = extractor(given["stay"])
patient = extractor(given["patient"])
print(json.dumps({
    "values": row["values"].tolist(), "static": row["static_values"].tolist(), "patient": patient["values"].tolist(),
    "module": type(extractor).__module__,
    "forbidden": [name for name in ("ehrseq", "polars", "pyarrow", "pandas", "sklearn") if name in sys.modules],
}))
"""
    events = [{**row, "time": row["time"] and row["time"].isoformat()} for row in RECORDS[2]]
    given = {"folder": str(tmp_path / "saved"), "stay": STAY, "patient": {"subject_id": 2, "events": events}}
    bare = link_packages(tmp_path / "packages")
    answer = run_python(script, given, {"HF_HOME": str(tmp_path / "home")}, bare)
    assert answer["forbidden"] == []
    assert answer["module"].startswith("transformers_modules.")
    np.testing.assert_array_equal(np.float32(answer["values"]), extractor(STAY)["values"])
    np.testing.assert_array_equal(np.float32(answer["static"]), extractor(STAY)["static_values"])
    np.testing.assert_array_equal(np.float32(answer["patient"]), extractor(given["patient"])["values"])


def test_trainers_own_collator_pads_its_rows(fitted_on, extractor):
    rows = [{**extractor(fitted_on.row(number)), "labels": number % 2} for number in range(4)]
    batch = DataCollatorWithPadding(extractor)(rows)
    assert batch["labels"].tolist() == [0, 1, 0, 1]
    np.testing.assert_array_equal(batch["attention_mask"].sum(1), fitted_on.lengths[:4])
    expected = extractor([fitted_on.row(number) for number in range(4)], padding=True, return_tensors="pt")
    for name in expected:
        assert torch.equal(batch[name], expected[name])
        assert batch[name].dtype == expected[name].dtype


def test_what_is_left_out_is_reported(extractor, caplog, monkeypatch):
    monkeypatch.setattr(extractor, "_reported", set())
    spoilt = {
        "times": [5, 1, 2, -1, 2000, 3, 5],
        "variables": ["hr", "hr", "k", "k", "k", "lactate", "hr"],
        "values": [80, 81, np.nan, 4, 4, 2, 80],
    }
    messages = []
    monkeypatch.setattr(
        "ehrseq.tokenization.feature_extraction_hymate.logger.warning", lambda message: messages.append(message)
    )
    row = extractor(spoilt)
    assert row["variable_ids"].tolist() == [0, 0]
    assert "1 numeric rows are of 1 codes" in messages[0]
    assert "lactate (1)" in messages[0]
    for reason in (
        "'values that are NaN or infinite': 1",
        "'triplets outside of the window': 2",
        "'triplets earlier than the one before them, sorted': 3",
        "'repeated triplets': 1",
    ):
        assert reason in messages[1]
    extractor(spoilt)
    assert len(messages) == 3  # a stranger is named once, what was left out each time


@pytest.mark.parametrize(
    ("stays", "settings", "error"),
    [
        ([], {}, "empty list"),
        ({"times": [1], "variables": ["hr"]}, {}, "expected times, variables, values"),
        ({**STAY, "unit": "x"}, {}, "expected times, variables, values"),
        ({**STAY, "times": [1, 2]}, {}, "of one length; got 2, 5 and 5"),
        ({**STAY, "times": ["a"] * 5}, {}, "times of a stay must be numbers"),
        ({**STAY, "values": [[1.0]] * 5}, {}, "flat list"),
        ({**STAY, "variables": [0, 1, 2, 3, 0]}, {}, r"must lie in 0\.\.2"),
        ({**STAY, "variables": [0.5] * 5}, {}, "ids or names, got float64"),
        ({**STAY, "static": [1, 2]}, {}, "static got 2 values"),
        ({**STAY, "static": {"weight": 3}}, {}, r"unknown columns \['weight'\]"),
        ({"times": [], "variables": [], "values": []}, {}, "holds no triplet"),
        ({**STAY, "values": [np.inf] * 5}, {}, "holds no triplet"),
        ({**STAY, "variables": ["x"] * 5}, {}, "holds no triplet"),
        ({"subject_id": 1, "events": []}, {}, "without timed events"),
        ({"subject_id": 1, "events": [event(0, "VITAL//HR", 80)]}, {}, "no window begins"),
        ({"subject_id": 1, "events": [event(0, "VISIT_START//IMP")]}, {}, "subject 1 holds no triplet"),
        ({"subject_id": 1, "rows": []}, {}, "a patient must be"),
        ("text", {}, "a patient must be"),
        (STAY, {"prediction_time": at(3)}, "no dates"),
        (STAY, {"max_length": 0}, "max_length got 0"),
        (STAY, {"max_length": True}, "max_length got True"),
        (STAY, {"truncation": True}, "needs max_length"),
        (STAY, {"truncation": "oldest", "max_length": 3}, "'recent' or 'random'"),
        (STAY, {"truncation": "random", "max_length": 3}, "need a seed"),
        (STAY, {"variable_dropout": 0.5}, "need a seed"),
        (STAY, {"variable_dropout": 1.5, "seed": 0}, "probability"),
        (STAY, {"sampling_rate": 16000}, "sampling_rate"),
        ([STAY, {**STAY, "times": [0], "variables": ["k"], "values": [4]}], {"return_tensors": "pt"}, "padding=True"),
    ],
)
def test_bad_input(extractor, stays, settings, error):
    with pytest.raises(ValueError, match=error):
        extractor(stays, **settings)


def test_two_subjects_in_one_table_are_an_error(extractor):
    both = table({1: RECORDS[1], 2: RECORDS[2]})
    with pytest.raises(ValueError, match="holds 2"):
        extractor(both)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"triplets": None}, "fit"),
        ({"triplets": {"variables": "x"}}, "name, codes"),
        ({"value_means": [0.0]}, "value_means got 1 numbers; expected 3"),
        ({"value_deviations": [1.0, 0.0, 1.0]}, "value_deviations"),
        ({"static_means": ["a"] * 8}, "static_means"),
        ({"padding_side": "both"}, "padding_side got 'both'"),
    ],
)
def test_damaged_settings(extractor, change, error):
    with pytest.raises(ValueError, match=error):
        HyMaTEFeatureExtractor(**{**extractor.to_dict(), **change})


def test_bad_fits(fitted_on):
    with pytest.raises(ValueError, match="clip_percentiles"):
        HyMaTEFeatureExtractor.fit(fitted_on, clip_percentiles=(99, 1))
    with pytest.raises(ValueError, match="no triplet"):
        HyMaTEFeatureExtractor.fit(fitted_on.subset([]))
    no_static = TripletSpec(SPEC.variables, window_hours=24)
    bare = HyMaTEFeatureExtractor.fit(build_triplets(table(RECORDS), no_static))
    assert bare({**STAY, "static": None})["static_values"].shape == (0,)
    assert pl.DataFrame({"n": [bare.num_static]})["n"][0] == 0
