"""Every leak that the audit knows is planted and must be caught; clean data must have none."""

from __future__ import annotations

import json
import shutil
from datetime import timedelta
from pathlib import Path

import polars as pl
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from ehrseq.audit import audit_dataset
from ehrseq.audit.findings import KINDS
from ehrseq.audit.rows import encoding_findings
from ehrseq.cli.app import app
from ehrseq.data import read_meds
from ehrseq.data.dataset import write_dataset
from ehrseq.data.shards import dataset_shards, read_blocks
from ehrseq.data.simulate.cohort import simulate
from ehrseq.encode import tokenize_dataset
from ehrseq.tasks import label_events, list_tasks, load_task, write_labels
from ehrseq.tokenization.tokenization_ehr import EhrTokenizer
from ehrseq.work.engine import get_engine

TASKS = ["mortality_30d", "readmission_30d", "hypertension"]  # all of them: the first test
NEW = "of_my_own"  # a task that the package does not know
DAY = timedelta(days=1)


@pytest.fixture(scope="module")
def events() -> pl.DataFrame:
    return simulate(160, seed=3, progress=False).events()


@pytest.fixture(scope="module")
def labels(events):
    return label_events(events, TASKS, end_of_data="2022-01-01", progress=False)


@pytest.fixture(scope="module")
def clean(events, labels, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("clean") / "dataset"
    write_dataset(events, folder, dataset_name="simulated", shard_size=10_000)
    write_labels(labels, folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(clean, events):
    return fitted_on_training_patients(events, clean, TASKS)


@pytest.fixture(scope="module")
def model(tokenizer, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tokenizer.save_pretrained(folder)
    return folder


def fitted_on_training_patients(events: pl.DataFrame, dataset: Path, tasks: list[str]) -> EhrTokenizer:
    of = splits(dataset).filter(pl.col("split").is_in(["pretrain", "train"]))
    return EhrTokenizer.train(events.join(of, on="subject_id", how="semi"), tasks=tasks, min_count=2)


def splits(folder: Path) -> pl.DataFrame:
    return pl.read_parquet(folder / "metadata" / "subject_splits.parquet")


def audit(dataset, labels, **options):
    return audit_dataset(dataset, labels, engine=get_engine("local", num_workers=1), **options)


def keys(report) -> set[str]:
    return {finding.key for finding in report.findings}


def kinds(report) -> set[str]:
    return {finding.kind for finding in report.findings}


def write(folder: Path, name: str, table: pl.DataFrame) -> Path:
    (folder / name).mkdir(parents=True, exist_ok=True)
    table.select("subject_id", "prediction_time", "boolean_value").write_parquet(folder / name / "labels.parquet")
    return folder


def planted(events: pl.DataFrame, rows: pl.DataFrame, folder: Path) -> Path:
    """A dataset with more events; rows: subject_id, time, code[, numeric_value, text_value]."""
    write_dataset(pl.concat([events, rows], how="diagonal_relaxed"), folder, dataset_name="planted")
    return folder


def drop_every(table: pl.DataFrame, n: int) -> pl.DataFrame:
    """All rows but each n-th."""
    return table.with_row_index("k").filter(pl.col("k") % n != 0).drop("k")


# -- clean data ------------------------------------------------------------------------------------------------------


def test_simulated_patients_all_tasks_rows_and_tokenizer_have_no_leak(clean, events, tmp_path):
    labels = label_events(events, list_tasks(), end_of_data="2022-01-01", progress=False)
    write_labels(labels, tmp_path)
    tokenizer = fitted_on_training_patients(events, clean, list_tasks())
    tokenizer.save_pretrained(tmp_path / "model")
    pq.write_table(tokenizer.encode_table(events, labels=labels.labels, max_length=128), tmp_path / "rows.parquet")
    for rows in (None, tmp_path / "rows.parquet"):
        report = audit(clean, tmp_path / "labels", model=tmp_path / "model", rows=rows)
        assert str(report).endswith("No finding.")
        assert report.checks["tokenizer"].startswith("fitted on")
        assert "240, from events cut" in report.checks["rows encoded again"]
    assert f"{sum(table.height for table in labels.labels.values()):,}" in report.checks["encoded rows"]


def test_the_mimic_iv_demo_has_no_leak(ehr_data, tmp_path):
    folder = ehr_data / "mimic-iv-demo-meds" / "0.0.1"
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent: the MIMIC-IV demo as MEDS is needed")
    table = read_meds(folder)
    write_dataset(table, tmp_path / "d", dataset_name="mimic")
    write_labels(label_events(table, list_tasks(paper=None), end_of_data="2202-12-31"), tmp_path / "d")
    assert audit(tmp_path / "d", tmp_path / "d").findings == []


def test_blocks_processes_and_other_places_of_labels_change_nothing(clean, labels, monkeypatch, tmp_path):
    bad = labels.labels["readmission_30d"].with_columns(~pl.col("boolean_value"))
    write(tmp_path, "readmission_30d", bad)
    shutil.copy(clean / "labels" / "readmission_30d" / "report.json", tmp_path / "readmission_30d")
    whole = audit(clean, tmp_path)
    assert whole.findings
    assert audit_dataset(clean, tmp_path, engine=get_engine("local", num_workers=2)).to_dict() == whole.to_dict()
    monkeypatch.setattr("ehrseq.audit.shard.BLOCK_ROWS", 4_000)
    for place in (tmp_path / "readmission_30d", tmp_path / "readmission_30d" / "labels.parquet"):
        assert audit(clean, place).to_dict() == whole.to_dict()


def test_a_stopped_run_goes_on_where_it_was_unless_the_labels_are_others(clean, labels, monkeypatch, tmp_path):
    write(tmp_path / "labels", "readmission_30d", labels.labels["readmission_30d"])
    write(tmp_path / "fewer", "readmission_30d", labels.labels["readmission_30d"][5:])
    audited = []

    def interrupted(shard, **options):
        audited.append(shard.name)
        if len(audited) == 2:
            raise KeyboardInterrupt
        return read_blocks(shard, **options)

    with monkeypatch.context() as patch:
        patch.setattr("ehrseq.audit.shard.read_blocks", interrupted)
        with pytest.raises(KeyboardInterrupt):
            audit(clean, tmp_path / "labels", work=tmp_path / "work")
        fewer = audit(clean, tmp_path / "fewer", work=tmp_path / "work")
        files = len(dataset_shards(clean))
        assert len(audited) == files + 2
        again = audit(clean, tmp_path / "labels", work=tmp_path / "work")
        assert len(audited) == 2 * files + 1
    assert again.to_dict() == audit(clean, tmp_path / "labels").to_dict()
    assert fewer.to_dict() == audit(clean, tmp_path / "fewer").to_dict()
    assert not list((tmp_path / "work").iterdir())


# -- planted leaks ---------------------------------------------------------------------------------------------------


def test_future_events_in_encoded_rows(clean, events, labels, tokenizer, model, tmp_path):
    """Rows that were cut a month too late, and say that they were not."""
    late = labels.labels["mortality_30d"].with_columns(pl.col("prediction_time") + 30 * DAY)
    table = tokenizer.encode_table(events, labels={"mortality_30d": late}, max_length=256)
    right = pl.from_arrow(table).with_columns(pl.col("prediction_time") - 30 * DAY)
    right.write_parquet(tmp_path / "rows.parquet")
    report = audit(clean, clean / "labels" / "mortality_30d", model=model, rows=tmp_path / "rows.parquet")
    assert kinds(report) == {"future_event_in_row"}
    by_time, by_token = sorted(report.findings, key=lambda finding: finding.item == "tokens")
    assert by_time.count > 100
    assert "days after it" in by_time.example
    assert "also holds" in by_token.example


def test_encoded_patients_of_ehrseq_tokenize(clean, events, labels, tmp_path):
    """Its folder brings its own tokenizer; one made of records that are three days early is caught."""
    engine = get_engine("local", num_workers=1)
    tokenize_dataset(clean, tmp_path / "right", tasks=[load_task(name).to_config() for name in TASKS], engine=engine)
    report = audit(clean, clean, rows=tmp_path / "right")
    assert report.findings == []
    assert f"{sum(table.height for table in labels.labels.values()):,}" in report.checks["encoded rows"]
    assert report.checks["tokenizer"].startswith("fitted on")
    early = events.with_columns(
        pl.when(pl.col("code") == "MEDS_BIRTH").then("time").otherwise(pl.col("time") - 3 * DAY)
    )
    write_dataset(early, tmp_path / "early", dataset_name="early", splits=splits(clean))
    tokenize_dataset(
        tmp_path / "early", tmp_path / "wrong", tokenizer=tmp_path / "right" / "tokenizer", tasks=None, engine=engine
    )
    assert kinds(audit(clean, clean, rows=tmp_path / "wrong")) == {"future_event_in_row"}


def test_a_tokenizer_that_looks_ahead(clean, labels, tokenizer):
    class Leaky:
        tasks = tokenizer.tasks
        encode_patient = staticmethod(tokenizer.encode_patient)

        def encode_histories(self, table):
            return tokenizer.encode_histories(table.with_columns(pl.col("time") - 3 * DAY))

    rows = (
        labels.labels["mortality_30d"]
        .head(9)
        .select(
            pl.lit(0, pl.Int32).alias("task"), "subject_id", "prediction_time", pl.col("boolean_value").alias("label")
        )
    )
    found = list(encoding_findings(Leaky(), dataset_shards(clean), rows, ["mortality_30d"]))
    assert [finding.kind for finding in found] == ["future_event_in_row"]
    assert not list(encoding_findings(tokenizer, dataset_shards(clean), rows, ["mortality_30d"]))


def test_a_diagnosis_billed_at_the_discharge_that_is_the_prediction(events, labels, tmp_path):
    """The outcome's code stands at the prediction itself, and the label says yes."""
    given = labels.labels["hypertension"]
    positives = given.filter("boolean_value")
    code = pl.lit("DIAGNOSIS//ICD10CM//I10").alias("code")
    dataset = planted(
        events, positives.select("subject_id", pl.col("prediction_time").alias("time"), code), tmp_path / "d"
    )
    write(tmp_path / "known", "hypertension", given)
    report = audit(dataset, tmp_path / "known", end_of_data="2022-01-01")
    assert "outcome_at_prediction:hypertension:earlier_code" in keys(report)
    # Without the task's definition: the code's timing gives it away.
    write(tmp_path / "unknown", NEW, given)
    report = audit(dataset, tmp_path / "unknown")
    assert f"outcome_at_prediction:{NEW}:DIAGNOSIS//ICD10CM//I10" in keys(report)
    finding = next(f for f in report.findings if f.kind == "outcome_at_prediction")
    assert "at the prediction itself" in finding.text
    assert finding.example.startswith("patient ")


def test_predictions_for_the_dead(events, labels, tmp_path):
    """Orders written after death: the rows stand at the death, and after it."""
    deaths = events.filter(pl.col("code") == "MEDS_DEATH").select(
        "subject_id", pl.col("time").alias("prediction_time"), pl.lit(True).alias("boolean_value")
    )
    assert deaths.height >= 10
    negatives = labels.labels["mortality_30d"].filter(~pl.col("boolean_value"))
    table = pl.concat([deaths, negatives])
    write(tmp_path, NEW, table)
    write(tmp_path, "mortality_30d", table)
    write_dataset(events, tmp_path / "d", dataset_name="simulated")
    report = audit(tmp_path / "d", tmp_path / NEW)
    assert f"prediction_after_death:{NEW}:died" in keys(report)
    report = audit(tmp_path / "d", tmp_path / "mortality_30d")
    assert "label_dependent_window:mortality_30d:moment" in keys(report)


def test_windows_counted_back_from_the_outcome(events, clean, labels, tmp_path):
    """Cases a day before they die, controls at a discharge."""
    deaths = events.filter(pl.col("code") == "MEDS_DEATH").select(
        "subject_id", (pl.col("time") - DAY).alias("prediction_time")
    )
    negatives = labels.labels["mortality_30d"].filter(~pl.col("boolean_value"))
    table = pl.concat([deaths.with_columns(pl.lit(True).alias("boolean_value")), negatives])
    write(tmp_path, NEW, table)
    report = audit(clean, tmp_path)
    assert f"label_dependent_window:{NEW}:86400 s before MEDS_DEATH" in keys(report)
    finding = next(f for f in report.findings if "86400" in f.item)
    assert "MEDS_DEATH at" in finding.example
    shutil.copytree(tmp_path / NEW, tmp_path / "k" / "mortality_30d")
    assert "label_dependent_window:mortality_30d:moment" in keys(audit(clean, tmp_path / "k"))


def test_moments_that_depend_on_the_label(events, clean, labels, tmp_path):
    """Cases in the first hours of a stay, controls at its end: the clock is the label."""
    given = labels.labels["readmission_30d"]
    starts = events.filter(pl.col("code") == "VISIT_START//IMP").select("subject_id", pl.col("time").alias("start"))
    early = given.sort("prediction_time").join_asof(
        starts.sort("start"), left_on="prediction_time", right_on="start", by="subject_id", check_sortedness=False
    )
    table = early.with_columns(
        pl.when("boolean_value")
        .then(pl.col("start") + timedelta(hours=1))
        .otherwise("prediction_time")
        .alias("prediction_time")
    )
    write(tmp_path, NEW, table)
    found = keys(audit(clean, tmp_path))
    assert f"label_dependent_window:{NEW}:hours since the last visit began" in found


def test_labels_that_are_not_those_of_their_task(clean, labels, tmp_path):
    wrong = (
        labels.labels["mortality_30d"]
        .with_row_index("k")
        .with_columns(
            pl.when(pl.col("k") == 7).then(~pl.col("boolean_value")).otherwise("boolean_value").alias("boolean_value")
        )
    )
    write(tmp_path, "mortality_30d", wrong)
    report = audit(clean, tmp_path, end_of_data="2022-01-01")
    assert len(report.findings) == 1
    assert report.findings[0].kind == "label_differs"
    assert report.findings[0].count == 1
    assert f"patient {wrong['subject_id'][7]} at {wrong['prediction_time'][7]}" in report.findings[0].example


def test_a_code_that_nearly_is_the_label(events, labels, tmp_path):
    """Known hours before, in 14 of 15 positives: as its presence, as a text result, as a value."""
    given = labels.labels["readmission_30d"]
    before = (pl.col("prediction_time") - timedelta(hours=3)).alias("time")
    code = lambda name: pl.lit(name).alias("code")  # noqa: E731
    positives = drop_every(given.filter("boolean_value"), 15)
    # `given` has patients with several rows: only those before which nothing positive stands are free of the code.
    first = positives.sort("prediction_time").unique("subject_id", keep="first")
    keep = given.join(
        first.select("subject_id", pl.col("prediction_time").alias("from")), on="subject_id", how="left"
    ).filter(pl.col("from").is_null() | (pl.col("prediction_time") < pl.col("from")) | pl.col("boolean_value"))
    rows = pl.concat(
        [
            positives.select("subject_id", before, code("ORDER//HOSPICE")),
            keep.select(
                "subject_id", before, code("FLAG"), pl.col("boolean_value").cast(pl.Float32).alias("numeric_value")
            ),
            positives.select("subject_id", before, code("NOTE"), pl.lit("bad").alias("text_value")),
            given.select("subject_id", before, code("NOTE"), pl.lit("good").alias("text_value")),
        ],
        how="diagonal",
    )
    write(tmp_path, NEW, keep)
    report = audit(planted(events, rows, tmp_path / "d"), tmp_path / NEW)
    found = {finding.item: finding for finding in report.findings}
    assert {f.kind for f in report.findings} == {"near_label_code"}
    assert set(found) == {"ORDER//HOSPICE", "FLAG", "NOTE//bad"}
    assert "within the day before" in found["ORDER//HOSPICE"].text
    assert "ORDER//HOSPICE at" in found["ORDER//HOSPICE"].example
    # A stricter bound, a blind model and an acceptance each silence it.
    assert keys(audit(tmp_path / "d", tmp_path / NEW, bound=0.995)) == {f"near_label_code:{NEW}:FLAG"}
    blind = EhrTokenizer.train(events, input_kinds="paper")
    blind.save_pretrained(tmp_path / "blind")
    assert kinds(audit(tmp_path / "d", tmp_path / NEW, model=tmp_path / "blind")) == {"fitted_on_held_out"}


def test_patients_shared_by_splits(clean, labels, tmp_path):
    dataset = tmp_path / "d"
    shutil.copytree(clean, dataset)
    shard = next(s for s in dataset_shards(dataset) if s.split == "train")
    table = pq.read_table(shard.path)
    subject = table["subject_id"][0].as_py()
    own = pl.from_arrow(table).filter(pl.col("subject_id") == subject)
    pq.write_table(own.to_arrow().cast(table.schema), dataset / "data" / "held_out" / "99.parquet")
    report = audit(dataset, dataset)
    assert keys(report) == {"shared_patients:*:data"}
    assert report.findings[0].example == f"patient {subject} is in held_out, train"
    # Under another number, and a year later: no longer shared, but the same history.
    copy = own.with_columns(pl.lit(987_654_321, pl.Int64).alias("subject_id"), pl.col("time") + 365 * DAY)
    pq.write_table(copy.to_arrow().cast(table.schema), dataset / "data" / "held_out" / "99.parquet")
    report = audit(dataset, dataset)
    assert keys(report) == {"copied_patients"}
    assert "987654321 (held_out)" in report.findings[0].example
    # The files say one thing, the metadata another.
    shutil.rmtree(dataset)
    shutil.copytree(clean, dataset)
    file = dataset / "metadata" / "subject_splits.parquet"
    moved = splits(clean).with_columns(
        pl.when(pl.col("subject_id") == subject).then(pl.lit("held_out")).otherwise("split").alias("split")
    )
    moved.write_parquet(file)
    assert keys(audit(dataset, dataset)) == {"shared_patients:*:data and metadata"}


def test_a_tokenizer_fitted_on_held_out_patients(clean, events, tmp_path):
    of, place = splits(clean), clean / "labels" / "readmission_30d"  # one task's labels: the tokenizer is looked at
    for names, expected in (
        (["pretrain"], set()),
        (["pretrain", "train", "held_out"], {"fitted_on_held_out:*:held_out"}),
        (["pretrain", "train", "tuning", "held_out"], {"fitted_on_held_out:*:tuning+held_out"}),
    ):
        seen = events.join(of.filter(pl.col("split").is_in(names)), on="subject_id", how="semi")
        folder = tmp_path / "-".join(names)
        EhrTokenizer.train(seen, tasks=TASKS).save_pretrained(folder)
        assert {
            k.replace("held_out+tuning", "tuning+held_out") for k in keys(audit(clean, place, model=folder))
        } == expected
    few = events.filter(pl.col("subject_id").is_in(of["subject_id"].head(5).implode()))
    EhrTokenizer.train(few, tasks=TASKS).save_pretrained(tmp_path / "few")
    assert keys(audit(clean, place, model=tmp_path / "few")) == {"fitted_on_unknown"}


def test_a_task_of_ones_own_is_recomputed_from_its_file(clean, events, labels, tmp_path):
    text = Path(load_task("readmission_30d").source).read_text().replace("readmission_30d", NEW)
    file = tmp_path / f"{NEW}.yaml"
    file.write_text(text.replace("[REA_1M]", "[MINE]").replace("horizon: 30d", "horizon: 90d"))
    own = label_events(events, file, end_of_data="2022-01-01")
    write_labels(own, clean_copy := shutil.copytree(clean, tmp_path / "d"))
    assert audit(clean_copy, clean_copy, tasks=[file]).findings == []
    write(clean_copy / "labels", NEW, labels.labels["readmission_30d"])
    expected = {f"label_differs:{NEW}:{why}" for why in ("false", "follow_up_ends")}
    assert keys(audit(clean_copy, clean_copy, tasks=[file])) == expected
    assert "definition unknown" in audit(clean_copy, clean_copy).checks[NEW]


# -- what is accepted ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def flipped(clean, labels, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("flipped")
    return write(folder, "readmission_30d", labels.labels["readmission_30d"].with_columns(~pl.col("boolean_value")))


def run(*arguments):
    return CliRunner().invoke(app, ["audit", *(str(argument) for argument in arguments)], catch_exceptions=False)


def test_the_command_ends_with_1_on_a_finding_that_nobody_accepts(clean, flipped, tmp_path):
    done = run(clean, clean, "--workers", 1)
    assert done.exit_code == 0
    assert "No finding." in done.output
    done = run(clean, flipped, "--workers", 1, "--end-of-data", "2022-01-01", "--out", tmp_path / "r.json")
    assert done.exit_code == 1
    assert "FINDING label_differs:readmission_30d:false" in done.output
    content = json.loads((tmp_path / "r.json").read_text())
    assert content["open"] == 2
    assert all(finding["example"] for finding in content["findings"])
    accept = tmp_path / "accepted.yaml"
    accept.write_text(
        "- finding: label_differs:readmission_30d:false\n  reason: we count transfers\n- near_label_code:*:X\n"
    )
    end = ("--end-of-data", "2022-01-01")
    done = run(clean, flipped, "--workers", 1, *end, "--accept", accept)
    assert done.exit_code == 1
    assert "accepted: we count transfers" in done.output
    assert "accepted but not found: near_label_code:*:X" in done.output
    done = run(
        clean, flipped, "--workers", 1, *end, "--accept", accept, "--accept", "label_differs:readmission_30d:true"
    )
    assert done.exit_code == 0
    for whole in ("label_differs", "label_differs:readmission_30d"):
        assert run(clean, flipped, "--workers", 1, *end, "--accept", whole).exit_code == 0
    assert run(clean, flipped, "--workers", 1, *end, "--accept", "label_differs:mortality_30d").exit_code == 1


BAD = [
    ({"accept": ["leak"]}, "names no kind of finding"),
    ({"accept": ["nowhere.yaml"]}, "nowhere.yaml cannot be read as YAML"),
    ({"bound": 0.5}, "bound must lie above 0.5"),
    ({"per_class": 2}, "per_class must be a whole number"),
    ({"model": "nowhere/at-all"}, "nowhere/at-all"),
    ({"rows": "nowhere"}, "holds no encoded rows"),
    ({"tasks": ["readmission_30d.yaml"]}, "No task file"),
    ({"labels": "nowhere"}, "is no folder"),
    ({"labels": "nowhere.parquet"}, "does not exist"),
    ({"dataset": "nowhere"}, "holds no data/"),
]


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_bad_input_is_refused_before_the_work(clean, changes, message):
    arguments = {"dataset": clean, "labels": clean, **changes}
    with pytest.raises(ValueError, match=message):
        audit(**arguments)


@pytest.mark.parametrize(
    "content", ["finding: label_differs", "- {finding: 3}", "- {finding: label_differs, why: x}", "["]
)
def test_a_wrong_list_of_what_is_accepted_is_refused(clean, tmp_path, content):
    (tmp_path / "a.yaml").write_text(content)
    with pytest.raises(ValueError, match=r"a\.yaml"):
        audit(clean, clean, accept=[tmp_path / "a.yaml"])


def test_every_kind_of_finding_is_planted_here():
    text = Path(__file__).read_text()
    assert [kind for kind in KINDS if kind not in text] == []
