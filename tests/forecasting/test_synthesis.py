"""Synthetic patients of the checkpoint that comes with the package: whole datasets, the same whoever draws them."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from ehrseq.audit import audit_dataset
from ehrseq.data.dataset import EventDataset, write_dataset
from ehrseq.data.simulate.cohort import simulate
from ehrseq.data.sources import load_events
from ehrseq.forecasting import synthesis
from ehrseq.forecasting.cohort_shape import CohortShape, shape_of
from ehrseq.forecasting.copies import EventRuns
from ehrseq.forecasting.prompts import load_forecaster
from ehrseq.forecasting.synthesis import DrawnPatient, PatientDrawer, synthesize
from ehrseq.forecasting.token_events import DrawnEvent
from ehrseq.hub.families import STARTER, STARTER_FORECAST
from ehrseq.modeling.ehr_trajectories import TrajectoryEnd
from ehrseq.stats import count_dataset
from ehrseq.tasks.shards import label_dataset
from ehrseq.work.engine import get_engine
from tests.in_process import run_module

PATIENTS, YEARS = 6, 1.0


@pytest.fixture(scope="module")
def like(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("like") / "dataset"
    write_dataset(simulate(150, seed=3, progress=False).events(), folder, dataset_name="like")
    return folder


@pytest.fixture(scope="module")
def made(like: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("made") / "synthetic"
    draw(like, out, fhir=True)
    return out


def draw(like: Path, out: Path, **changes: Any) -> synthesis.SynthesisReport:
    engine = get_engine("local", num_workers=changes.pop("workers", 1))
    number = changes.pop("num_patients", PATIENTS)
    model = changes.pop("model", STARTER_FORECAST)
    return synthesize(model, like, number, out, engine=engine, **{"max_years": YEARS, **changes})


def digests(folder: Path) -> dict[str, str]:
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def test_they_are_a_dataset_that_is_labelled_audited_and_counted(made: Path, tmp_path: Path) -> None:
    folder = tmp_path / "dataset"
    shutil.copytree(made, folder)
    engine = get_engine("local", num_workers=1)
    label_dataset(folder, ["readmission_30d", "mortality_30d", "long_stay_7d"], engine=engine)
    report = audit_dataset(folder, folder, engine=engine)
    assert report.open == []
    assert sum(count_dataset(folder, engine=engine).patients.values()) == PATIENTS


def test_every_patient_has_a_birth_statics_and_visits_that_end(made: Path, like: Path) -> None:
    events = EventDataset(made).events()
    assert events["subject_id"].unique().sort().to_list() == list(range(1, PATIENTS + 1))
    births = events.filter(pl.col("code") == "MEDS_BIRTH").group_by("subject_id").len()
    assert births["len"].to_list() == [1] * PATIENTS
    assert (events.filter(pl.col("code").str.starts_with("GENDER")).group_by("subject_id").len()["len"] == 1).all()
    starts = events.filter(pl.col("code").str.starts_with("VISIT_START")).group_by("subject_id", "visit_id").len()
    ends = events.filter(pl.col("code").str.starts_with("VISIT_END")).group_by("subject_id", "visit_id").len()
    without = starts.join(ends, on=["subject_id", "visit_id"], how="anti")
    assert starts["len"].max() == 1
    assert (without.group_by("subject_id").len()["len"] <= 2).all()  # those that go on when the record ends
    assert set(events["code"].unique()) <= set(EventDataset(like).events()["code"].unique()) | {
        f"VISIT_END//{name}" for name in ("IMP", "ACUTE")
    } | set(load_forecaster(STARTER_FORECAST).tokenizer.get_vocab())
    real = EventDataset(like).events()
    assert events["time"].max() <= real["time"].max()
    spans = events.filter(pl.col("time").is_not_null(), pl.col("code") != "MEDS_BIRTH").group_by("subject_id").agg(
        (pl.col("time").max() - pl.col("time").min()).dt.total_days().alias("days")
    )  # fmt: skip
    assert spans["days"].max() <= YEARS * 365.25


def test_tokens_are_read_again_as_they_were_drawn(like: Path) -> None:
    forecaster = load_forecaster(STARTER_FORECAST)
    model, tokenizer = forecaster.model, forecaster.tokenizer
    shape = shape_of(EventDataset(like).events(), least_patients=5)
    drawer = PatientDrawer(model, tokenizer, shape, seed=1, max_years=1.0)
    kept: dict[int, np.ndarray] = {}
    write = synthesis.RecordWriter.write

    def remember(writer: Any, tokens: np.ndarray, days: np.ndarray) -> None:
        kept[writer.subject_id] = tokens
        write(writer, tokens, days)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(synthesis.RecordWriter, "write", remember)
        patients = drawer.draw(list(range(6)))
    for patient in patients:
        history = tokenizer.encode_histories(synthesis._table([patient]))
        same = sorted(history.ids[1:].tolist()) == sorted(_body(tokenizer, kept[patient.number + 1]))
        assert same or set(patient.notes) - {"encounters that go on when the record ends"}, patient.number


def _body(tokenizer: Any, tokens: np.ndarray) -> list[int]:
    """Without what closes a visit behind which nothing comes, which the body of a history does not hold."""
    names = tokenizer.convert_ids_to_tokens(tokens.tolist())
    last = max((k for k, name in enumerate(names) if name == "[VE]"), default=len(names))
    rest = names[last:]
    if all(name in ("[VE]", "[REG]", "[VS]") or name.startswith(("[W_", "[M_", "[LT")) for name in rest):
        return tokens[:last].tolist()
    return tokens.tolist()


def test_fhir_files_say_the_same(made: Path) -> None:
    columns = ["subject_id", "time", "code", "numeric_value", "text_value", "visit_id", "unit"]
    read, report = load_events(made / "fhir")
    stored = EventDataset(made).events()
    assert (
        json.loads((made / "synthesis" / "report.json").read_text())["notes"].get(
            "rows whose code FHIR's files do not carry", 0
        )
        == 0
    )
    assert report.errors == []
    assert read.select(columns).sort(columns).equals(stored.select(columns).sort(columns))


def test_patients_are_the_same_in_other_parts(
    made: Path, like: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(synthesis, "PATIENTS_OF_A_PART", 4)
    draw(like, tmp_path / "again", fhir=True)
    again, before = digests(tmp_path / "again"), digests(made)
    of_files = "metadata/conversion_report.json"  # it says how many files were read
    assert again.pop(of_files) != before.pop(of_files)
    assert again == before


@pytest.mark.slow
def test_equal_seeds_give_equal_bytes_whoever_draws(
    like: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(synthesis, "PATIENTS_OF_A_PART", 4)
    draw(like, tmp_path / "one")
    draw(like, tmp_path / "two", workers=2)
    draw(like, tmp_path / "other", seed=1)
    assert digests(tmp_path / "one") == digests(tmp_path / "two")
    one, other = (EventDataset(tmp_path / name).events() for name in ("one", "other"))
    assert not one.equals(other)


def test_a_stopped_run_goes_on(made: Path, like: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compare = synthesis.compare_cohorts

    def stop(*given: Any, **named: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(synthesis, "compare_cohorts", stop)
    with pytest.raises(KeyboardInterrupt):
        draw(like, tmp_path / "out", fhir=True)
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(synthesis, "compare_cohorts", compare)
    monkeypatch.setattr(PatientDrawer, "draw", stop)  # nobody is drawn again
    draw(like, tmp_path / "out", fhir=True)
    assert digests(tmp_path / "out") == digests(made)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.fixture
def copied(like: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """A model that gives a training patient's own record as its patient 2, whatever the attempt; its events."""
    dataset = EventDataset(like)
    events = dataset.events("train")
    longest = events.group_by("subject_id").len().sort("len", descending=True)["subject_id"][0]
    rows = events.filter(pl.col("subject_id") == longest)
    record = [
        DrawnEvent(3, (row["time"] and int(row["time"].timestamp() * 1e6)) or None, row["code"], row["numeric_value"],
                   row["text_value"], row["visit_id"], row["unit"])
        for row in rows.with_columns(pl.col("time").dt.replace_time_zone("UTC")).iter_rows(named=True)
    ]  # fmt: skip
    honest = PatientDrawer.draw

    def draw_and_copy(drawer: PatientDrawer, numbers: list[int], attempt: int = 0) -> list[DrawnPatient]:
        drawn = honest(drawer, numbers, attempt)
        return [
            DrawnPatient(2, list(record), patient.notes, 1, TrajectoryEnd.HORIZON) if patient.number == 2 else patient
            for patient in drawn
        ]

    monkeypatch.setattr(PatientDrawer, "draw", draw_and_copy)
    tokenizer = load_forecaster(STARTER_FORECAST).tokenizer
    return len(EventRuns.of(tokenizer.encode_histories(rows)).tokens)


def test_a_copy_is_refused_and_counted(like: Path, tmp_path: Path, copied: int) -> None:
    report = draw(like, tmp_path / "out")
    assert (report.refused, report.missing, report.patients) == (synthesis.ATTEMPTS, 1, PATIENTS - 1)
    assert report.refused_runs["longest"] == copied
    assert report.copied["longest"] <= report.allowed_run
    assert 3 not in EventDataset(tmp_path / "out").events()["subject_id"]
    assert f"| draws that were refused | {copied:,} |" in report.to_markdown()


def test_a_copy_is_written_where_copies_are_allowed(like: Path, tmp_path: Path, copied: int) -> None:
    report = draw(like, tmp_path / "out", allow_copies=True)
    assert (report.refused, report.missing, report.patients) == (0, 0, PATIENTS)
    assert report.copied["longest"] == copied
    assert report.allowed_run is None
    assert "Copies were allowed" in report.to_markdown()


def test_where_everybody_is_a_copy_nobody_is_written(like: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="share more than 1 events in a row"):
        draw(like, tmp_path / "out", num_patients=2, max_copied=1, max_years=0.3)
    assert list(tmp_path.iterdir()) == []


def test_the_report_says_what_it_does_not_promise(made: Path) -> None:
    text = (made / "synthesis" / "report.md").read_text()
    assert "no guarantee of privacy" in text
    assert "was not fitted on the training patients" in text  # the starter was trained on others
    page = (made / "synthesis" / "report.html").read_text()
    assert "no guarantee of privacy" in page
    content = json.loads((made / "synthesis" / "report.json").read_text())
    assert content["patients"] == PATIENTS
    assert content["fitted_on_training"] is False


def test_a_shape_is_read_as_it_was_written(like: Path) -> None:
    shape = shape_of(EventDataset(like).events(), least_patients=5)
    assert CohortShape.from_json(shape.to_json()) == shape


def test_nobodys_own_combination_is_drawn() -> None:
    events = simulate(80, seed=3, progress=False).events()
    alone = pl.DataFrame({"subject_id": [1], "code": ["LANGUAGE//RARE"]}, schema_overrides={"subject_id": pl.Int64})
    shape = shape_of(pl.concat([events, alone], how="diagonal"), least_patients=5)
    assert all(profile.patients >= 5 for profile in shape.profiles)
    assert not any("LANGUAGE//RARE" in profile.codes for profile in shape.profiles)
    assert shape.notes["patients whose combination of static facts too few share: not drawn"] >= 1
    assert all(count >= 5 for profile in shape.profiles for _, count in profile.ages)


def test_how_long_patients_are_observed_is_not_how_soon_they_die() -> None:
    """Ten who die after a day and twenty who are seen for 100 days are all observed for 100 days."""
    rows = []
    for subject in range(30):
        days = 1 if subject < 10 else 100
        rows += [(subject, 0, "GENDER//F"), (subject, 1, "DIAGNOSIS//ICD10CM//I10")]
        rows.append((subject, 1 + days, "MEDS_DEATH" if subject < 10 else "DIAGNOSIS//ICD10CM//I10"))
    events = pl.DataFrame(rows, schema=["subject_id", "day", "code"], orient="row").with_columns(
        pl.when(pl.col("day") > 0).then(pl.datetime(2020, 1, 1) + pl.duration(days="day")).alias("time"),
        pl.lit(None, pl.Float32).alias("numeric_value"),
        *(pl.lit(None, pl.String).alias(name) for name in ("text_value", "visit_id", "unit")),
    )
    assert set(shape_of(events).observed) == {100.0}
    assert set(shape_of(events, until_end=True).observed) == {100.0}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_patients": 0}, "num_patients got 0; expected a whole number of at least 1"),
        ({"num_patients": 2.5}, "num_patients got 2.5"),
        ({"seed": -1}, "seed got -1"),
        ({"max_years": 0}, "max_years got 0"),
        ({"max_copied": 0}, "max_copied got 0; expected a number of events from 1 on"),
        ({"max_copied": 3, "allow_copies": True}, "exclude each other"),
        ({"model": STARTER}, "pretrained"),
        ({"model": "nowhere/at/all"}, "nowhere/at/all"),
        ({"tasks": ("no_such_task",)}, "no_such_task"),
    ],
)
def test_bad_requests(like: Path, tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        draw(like, tmp_path / "out", **changes)
    assert list(tmp_path.iterdir()) == []


def test_bad_datasets(like: Path, tmp_path: Path) -> None:
    events = EventDataset(like).events()
    write_dataset(
        events.with_columns(pl.format("LAB//LOCAL//{}", pl.col("code").hash() % 1000).alias("code")),
        tmp_path / "foreign",
        dataset_name="foreign",
    )
    with pytest.raises(ValueError, match="its tokenizer was fitted on other codes"):
        draw(tmp_path / "foreign", tmp_path / "out")
    shutil.copytree(like, tmp_path / "unsplit")
    (tmp_path / "unsplit" / "metadata" / "subject_splits.parquet").unlink()
    with pytest.raises(ValueError, match="expected 'held_out' beside others"):
        draw(tmp_path / "unsplit", tmp_path / "out")
    few = events.filter(pl.col("subject_id") <= 8)
    splits = pl.DataFrame({"subject_id": range(1, 9), "split": ["train"] * 6 + ["held_out"] * 2})
    write_dataset(few, tmp_path / "few", dataset_name="few", splits=splits)
    with pytest.raises(ValueError, match="at least 10 are needed"):
        draw(tmp_path / "few", tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "something").touch()
    with pytest.raises(ValueError, match="is not empty"):
        draw(like, tmp_path / "full")


def test_the_command(like: Path, tmp_path: Path) -> None:
    words = ["synthesize", "--model", STARTER_FORECAST, "--like", like, "-n", 3, "--out", tmp_path / "out"]
    done = run_module("ehrseq.cli.app", *words, "--max-years", 1, "--workers", 1)
    assert done.returncode == 0, done.stderr
    assert "3 synthetic patients" in done.stdout
    assert (tmp_path / "out" / "synthesis" / "report.html").is_file()
    (tmp_path / "file").touch()
    refused = run_module("ehrseq.cli.app", *words[:-1], tmp_path / "file" / "out")
    assert refused.returncode == 1
    assert "cannot be written" in refused.stderr
