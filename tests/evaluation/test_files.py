"""`ehrseq evaluate` from files to files."""

import json
import re
import shutil

import polars as pl
import pytest
from typer.testing import CliRunner

from ehrseq.cli.app import app
from ehrseq.data.dataset import write_dataset
from ehrseq.data.simulate.cohort import simulate
from ehrseq.evaluation import match_predictions, read_predictions
from tests.evaluation.tables import scored_table
from tests.pages import read_page


@pytest.fixture
def files(tmp_path):
    """(predictions, labels) of two tasks on disk; labels of more patients than are scored."""
    rows = scored_table(300, 100)
    frames = [rows.select("subject_id", "prediction_time", "score", task=pl.lit(task)) for task in ("one", "two")]
    pl.concat(frames).write_parquet(tmp_path / "scores.parquet")
    other = rows.tail(20).with_columns(pl.col("subject_id") + 1000)
    for task in ("one", "two"):
        folder = tmp_path / "labels" / task
        folder.mkdir(parents=True)
        labels = pl.concat([rows, other]).select("subject_id", "prediction_time", boolean_value="label")
        labels.write_parquet(folder / "labels.parquet")
    return tmp_path / "scores.parquet", tmp_path / "labels"


def run(*arguments):
    return CliRunner().invoke(app, ["evaluate", *map(str, arguments)])


def test_a_report_its_numbers_and_meds_predictions(files, tmp_path):
    predictions, labels = files
    out = tmp_path / "out"
    done = run(predictions, "--labels", labels, "--out", out, "--resamples", 20)
    assert done.exit_code == 0, done.output
    text = (out / "evaluation.md").read_text()
    assert text in done.output
    assert "### one" in text
    assert "### two" in text
    assert "year: 2020" in text
    found = json.loads((out / "evaluation.json").read_text())["tasks"]
    assert found["one"]["labels"] == 300
    assert match_predictions(read_predictions(out / "predictions" / "two.parquet")).height == 300
    again = run(out / "predictions" / "two.parquet", "--out", tmp_path / "again", "--resamples", 20)
    assert again.exit_code == 0, again.output
    second = json.loads((tmp_path / "again" / "evaluation.json").read_text())["tasks"]["two"]
    assert second["metrics"]["auroc"]["value"] == pytest.approx(found["two"]["metrics"]["auroc"]["value"], abs=1e-6)


def test_subgroups_come_from_the_dataset(tmp_path):
    events = simulate(60, seed=0, progress=False).events()
    write_dataset(events, tmp_path / "dataset", dataset_name="simulated")
    rows = scored_table(400, 60).with_columns(boolean_value="label")
    rows.select("subject_id", "prediction_time", "score", "boolean_value").write_parquet(tmp_path / "p.parquet")
    out = tmp_path / "out"
    done = run(tmp_path / "p.parquet", "--data", tmp_path / "dataset", "--out", out, "--resamples", 10)
    assert done.exit_code == 0, done.output
    groups = json.loads((out / "evaluation.json").read_text())["tasks"]["p"]["subgroups"]
    assert {"sex", "ethnicity", "age", "year"} <= {group["attribute"] for group in groups}
    by_sex = [group for group in groups if group["attribute"] == "sex"]
    assert sum(group["labels"] for group in by_sex) == 400


def test_the_threshold_may_come_from_tuning_patients(files, tmp_path):
    predictions, labels = files
    options = ("--labels", labels, "--tuning", predictions, "--task", "one", "--out", tmp_path / "out")
    done = run(predictions, *options, "--resamples", 5)
    assert "best F1 of the tuning rows" in done.output
    assert "### two" not in done.output


def change(path, task, **columns):
    """The scores of a file with other columns of one task."""
    table = pl.read_parquet(path)
    is_task = pl.col("task") == task
    changed = table.with_columns(
        **{name: pl.when(is_task).then(value).otherwise(name) for name, value in columns.items()}
    )
    changed.write_parquet(path)


def relabel(labels, task, **columns):
    """The labels of one task with other columns."""
    file = labels / task / "labels.parquet"
    pl.read_parquet(file).with_columns(**columns).write_parquet(file)


@pytest.mark.parametrize(
    ("spoil", "task", "reason"),
    [
        (lambda _, labels: shutil.rmtree(labels / "two"), "two", r"no labels; there are those of ['one']"),
        (lambda _, labels: (labels / "two").rename(labels / "three"), "three", "no predictions; "),
        (lambda scores, _: change(scores, "two", score=None), "two", "300 of 300 labels have no score"),
        (lambda scores, _: change(scores, "two", score=7.0), "two", "expected probabilities in [0, 1]"),
        (lambda scores, _: change(scores, "two", subject_id=1), "two", "labels have no score"),
        (lambda _, labels: relabel(labels, "two", subject_id=pl.lit(-1)), "two", "no labels of a patient that "),
    ],
    ids=["no labels", "no predictions", "no scores", "no probabilities", "other rows", "other patients"],
)
def test_what_cannot_be_evaluated_is_named_and_the_rest_reported(files, tmp_path, spoil, task, reason):
    predictions, labels = files
    spoil(predictions, labels)
    out = tmp_path / "out"
    done = run(predictions, "--labels", labels, "--out", out, "--resamples", 5)
    assert done.exit_code == 0, done.output
    report = json.loads((out / "evaluation.json").read_text())
    assert set(report["tasks"]) == {"one"}
    assert reason in report["not_evaluated"][task]
    assert [path.name for path in (out / "predictions").iterdir()] == ["one.parquet"]
    assert "### Not evaluated" in done.output
    assert report["not_evaluated"][task] in done.output
    assert reason in " ".join(read_page((out / "evaluation.html").read_text()).texts)


def test_nothing_to_evaluate_is_an_error_with_every_reason(files, tmp_path):
    predictions, labels = files
    change(predictions, "one", score=None)
    shutil.rmtree(labels / "two")
    done = run(predictions, "--labels", labels, "--out", tmp_path / "out")
    with pytest.raises(ValueError, match=r"no task of .* can be evaluated\. one: .*no score.*; two: no labels"):
        raise done.exception
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("outcome", "reason"), [(False, "0 positives (needs 20)"), (True, "0 negatives (needs 20)")])
def test_a_task_of_one_class_has_its_counts_and_the_reason_that_it_has_no_metrics(files, tmp_path, outcome, reason):
    predictions, labels = files
    relabel(labels, "two", boolean_value=pl.lit(outcome))
    out = tmp_path / "out"
    done = run(predictions, "--labels", labels, "--out", out, "--resamples", 5)
    assert done.exit_code == 0, done.output
    report = json.loads((out / "evaluation.json").read_text())
    assert report["not_evaluated"] == {}
    one, two = report["tasks"]["one"], report["tasks"]["two"]
    assert "auroc" in one["metrics"]
    assert (two["patients"], two["labels"], two["positives"]) == (one["patients"], 300, 300 * outcome)
    assert two["metrics"] == {}
    assert two["missing"]["auroc"] == reason
    assert f"300 labels of {one['patients']:,} patients, {300 * outcome} positive" in done.output
    assert f"| AUROC | not estimable: {reason} |" in done.output
    assert f"not estimable: {reason}" in " ".join(read_page((out / "evaluation.html").read_text()).texts)
    # With no other task it is all that is told, and no error.
    alone = run(predictions, "--labels", labels, "--task", "two", "--out", tmp_path / "alone", "--resamples", 5)
    assert alone.exit_code == 0, alone.output
    assert reason in alone.output


def test_without_tuning_rows_the_report_says_which_rule_chose_the_threshold(files, tmp_path):
    predictions, labels = files
    options = ("--labels", labels, "--task", "one", "--resamples", 5, "--alert-rate", 0.1)
    done = run(predictions, *options, "--out", tmp_path / "out")
    known = json.loads((tmp_path / "out" / "evaluation.json").read_text())["tasks"]["one"]
    assert (
        known["threshold_from"]
        == "an alert for the 10 % of the rows with the highest scores: no tuning rows were given"
    )
    decided = pl.read_parquet(tmp_path / "out" / "predictions" / "one.parquet")["predicted_boolean_value"]
    assert decided.sum() == 30
    for text in (done.output, " ".join(read_page((tmp_path / "out" / "evaluation.html").read_text()).texts)):
        assert f"{known['threshold']:.3g} ({known['threshold_from']}" in text


def test_tuning_rows_of_one_task_alone_say_so_for_the_other(files, tmp_path):
    predictions, labels = files
    tuning = tmp_path / "tuning.parquet"
    pl.read_parquet(predictions).filter(pl.col("task") == "one").write_parquet(tuning)
    options = ("--labels", labels, "--tuning", tuning, "--resamples", 5, "--out", tmp_path / "out")
    assert run(predictions, *options).exit_code == 0
    tasks = json.loads((tmp_path / "out" / "evaluation.json").read_text())["tasks"]
    assert tasks["one"]["threshold_from"] == "best F1 of the tuning rows"
    assert tasks["two"]["threshold_from"].startswith("an alert for the 5 % of the rows")
    assert "no predictions; " in tasks["two"]["threshold_from"]


def test_the_page_stands_for_itself_and_holds_every_number(files, tmp_path):
    predictions, labels = files
    named = pl.read_parquet(predictions).with_columns(label=pl.lit("death <30 days> of discharge"))
    named.write_parquet(predictions)
    out = tmp_path / "out"
    done = run(predictions, "--labels", labels, "--out", out, "--resamples", 5)
    assert done.exit_code == 0, done.output
    source = (out / "evaluation.html").read_text()
    page = read_page(source)
    words = " ".join(page.texts)
    for number in re.findall(r"\d\.\d{3}", (out / "evaluation.md").read_text()):
        assert number in words
    assert "one: death <30 days> of discharge" in words
    assert {"Precision and recall", "Decision curve", "Calibration", "ROC"} <= {
        text.split(":")[0] for text in page.texts
    }
    assert {"sensitivity", "precision", "observed share", "net benefit per row", "1 - specificity"} <= set(page.texts)
    again = tmp_path / "again"
    assert run(predictions, "--labels", labels, "--out", again, "--resamples", 5).exit_code == 0
    assert (again / "evaluation.html").read_text() == source


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--task", "three"), r"can be evaluated\. three: no predictions; .* has those of \['one', 'two'\]"),
        (("--alert-rate", "0"), "alert_rate got 0.0"),
        (("--alert-rate", "2"), "alert_rate got 2.0"),
        (("--labels", "nowhere"), "nowhere is no folder"),
        (("--data", "nowhere"), "nowhere"),
        (("--tuning", "nowhere.parquet"), "nowhere.parquet holds no predictions"),
    ],
)
def test_bad_input_is_told(files, tmp_path, change, message):
    predictions, labels = files
    done = run(predictions, "--labels", labels, "--out", tmp_path / "out", *change)
    assert done.exit_code != 0
    with pytest.raises(ValueError, match=message):
        raise done.exception
    assert not (tmp_path / "out").exists()


def test_scores_without_labels_are_told(files, tmp_path):
    done = run(files[0], "--out", tmp_path / "out")
    with pytest.raises(ValueError, match="holds no `boolean_value`; give the labels"):
        raise done.exception
