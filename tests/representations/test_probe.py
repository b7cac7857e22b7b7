"""A probe finds what stands in the vectors, draws exactly what it says, and never tests on what it was fitted to."""

from datetime import datetime, timedelta

import numpy as np
import polars as pl
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import StandardScaler
from typer.testing import CliRunner

from ehrseq.cli.app import app
from ehrseq.data.dataset import write_dataset
from ehrseq.data.schema import validate_events
from ehrseq.representations.embedding_files import with_vectors
from ehrseq.representations.probe import PENALTIES, balanced_draw, probe_tasks, write_probe

NOW = datetime(2020, 1, 1)
NUM = 600
SPLITS = pl.DataFrame({"subject_id": np.arange(NUM), "split": ["train"] * 300 + ["tuning"] * 100 + ["held_out"] * 200})


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """Vectors of which one direction tells one label and nothing tells the other."""
    rng = np.random.default_rng(0)
    signal = rng.normal(size=NUM)
    vectors = np.stack([signal + 0.5 * rng.normal(size=NUM), *rng.normal(size=(3, NUM))], axis=1).astype(np.float32)
    keys = pl.DataFrame({"subject_id": np.arange(NUM), "prediction_time": [NOW] * NUM})
    file = tmp_path_factory.mktemp("vectors") / "signal.parquet"
    with_vectors(keys, vectors).write_parquet(file)
    labels = {
        "told": keys.with_columns(boolean_value=pl.Series(signal > 0.5)),
        "random": keys.with_columns(boolean_value=pl.Series(rng.random(NUM) < 0.4)),
    }
    return file, labels, vectors


def test_what_is_in_the_vectors_is_found_and_chance_stays_chance(planted):
    file, labels, vectors = planted
    report = probe_tasks(file, None, labels=labels, splits=SPLITS, sizes=[10, 50, 10_000], draws=4)
    told, random = report.probes
    assert told.counts["train"][0] == 300
    assert told.counts["held_out"] == (200, int(labels["told"]["boolean_value"][400:].sum()))
    assert told.whole.value > 0.9
    assert random.whole.low < 0.5 < random.whole.high
    few = [shot.auroc for shot in told.shots if shot.labels == 10]
    more = [shot.auroc for shot in told.shots if shot.labels == 50]
    assert len(few) == len(more) == 4
    assert np.mean(few) < np.mean(more)
    assert "10,000" in told.notes[0]
    # the fit to all labels, by hand
    scaler = StandardScaler().fit(vectors[:300].astype(np.float64))
    answers = labels["told"]["boolean_value"].to_numpy()
    model = LogisticRegression(C=told.whole_penalty, max_iter=2000).fit(scaler.transform(vectors[:300]), answers[:300])
    scores = model.predict_proba(scaler.transform(vectors[400:]))[:, 1]
    assert told.whole.value == pytest.approx(roc_auc_score(answers[400:], scores))
    np.testing.assert_allclose(told.risks["score"], scores)
    assert told.whole_penalty in PENALTIES


def test_draws_are_exact_and_repeatable(planted):
    file, labels, _ = planted
    answers = labels["told"]["boolean_value"].to_numpy()
    drawn = balanced_draw(answers, 7, np.random.default_rng(3))
    assert len(drawn) == len(set(drawn)) == 14
    assert answers[drawn].sum() == 7
    asked = {"labels": labels, "splits": SPLITS, "tasks": ["told"], "sizes": [10, 20], "draws": 2, "num_resamples": 5}
    first, again = probe_tasks(file, None, **asked), probe_tasks(file, None, **asked)
    assert first.table().equals(again.table())
    shots = first.probes[0].shots
    assert [(shot.labels, shot.draw, shot.tuning_labels) for shot in shots] == [
        (10, 0, 10), (10, 1, 10), (20, 0, 20), (20, 1, 20),
    ]  # fmt: skip


def test_a_size_does_not_change_another(planted):
    file, labels, _ = planted
    asked = {"labels": labels, "splits": SPLITS, "tasks": ["told"], "draws": 2, "num_resamples": 5}
    alone = probe_tasks(file, None, sizes=[20], **asked).probes[0].shots
    both = probe_tasks(file, None, sizes=[10, 20], **asked).probes[0].shots
    assert both[2:] == alone


def test_several_files_share_draws_and_labels(planted, tmp_path):
    file, labels, vectors = planted
    keys = labels["told"].select("subject_id", "prediction_time")[:-20]  # vectors of the last patients are missing
    with_vectors(keys, vectors[:-20] * 3).write_parquet(tmp_path / "scaled.parquet")
    files = {"signal": file, "scaled": tmp_path / "scaled.parquet"}
    report = probe_tasks(files, None, labels=labels, splits=SPLITS, tasks=["told"], sizes=[20], draws=3)
    signal, scaled = report.probes
    np.testing.assert_allclose([s.auroc for s in signal.shots], [s.auroc for s in scaled.shots])
    assert signal.counts["held_out"][0] == 180
    assert "20 labels without a vector" in signal.notes[-1]
    page = write_probe(report, tmp_path / "out")
    assert "signal" in page.read_text()
    assert page.with_name("probe.csv").read_text().startswith("embeddings,task,labels,draw,auroc")
    write_probe(report, tmp_path / "out")


def test_too_few_held_out_labels_are_told(planted):
    file, labels, _ = planted
    rare = {"rare": labels["told"].with_columns(boolean_value=pl.col("subject_id") % 100 == 0)}
    (probe,) = probe_tasks(file, None, labels=rare, splits=SPLITS).probes
    assert "2 of 200 held-out labels" in probe.reason
    assert probe.whole is None


def test_the_command(planted, tmp_path):
    file, labels, _ = planted
    events = validate_events(
        pl.DataFrame({"subject_id": np.arange(NUM), "time": [NOW - timedelta(days=1)] * NUM, "code": "LAB//x"})
    )
    write_dataset(events, tmp_path / "data", dataset_name="test", splits=SPLITS)
    folder = tmp_path / "data" / "labels" / "told"
    folder.mkdir(parents=True)
    labels["told"].with_columns(pl.col("subject_id").cast(pl.Int64)).write_parquet(folder / "labels.parquet")
    command = ["probe", "--embeddings", str(file), "--data", str(tmp_path / "data"), "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, [*command, "--size", "20", "--draws", "2", "--resamples", "9"])
    assert done.exit_code == 0, done.output
    assert "| signal |" in done.output
    assert (tmp_path / "out" / "risks.parquet").is_file()
    done = CliRunner().invoke(app, ["probe", "--embeddings", str(file), *command[1:]])
    assert "both called signal" in str(done.exception)


BAD = [
    ({"sizes": []}, "sizes got"),
    ({"sizes": [5]}, "sizes got"),
    ({"sizes": [20, 10]}, "sizes got"),
    ({"draws": 0}, "draws got 0"),
    ({"tasks": ["flu"]}, "no labels of \\['flu'\\]"),
    ({"splits": pl.DataFrame({"subject_id": [1]})}, "there are no splits"),
    ({"splits": None}, "give both labels and splits"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_requests_are_refused(planted, options, message):
    file, labels, _ = planted
    with pytest.raises(ValueError, match=message):
        probe_tasks(file, None, **{"labels": labels, "splits": SPLITS, **options})


def test_labels_of_other_times_and_double_ones_are_refused(planted):
    file, labels, _ = planted
    later = {"told": labels["told"].with_columns(pl.col("prediction_time") + timedelta(days=1))}
    with pytest.raises(ValueError, match="no label of told has a vector"):
        probe_tasks(file, None, labels=later, splits=SPLITS)
    double = {"told": pl.concat([labels["told"], labels["told"][:1]])}
    with pytest.raises(ValueError, match="two answers"):
        probe_tasks(file, None, labels=double, splits=SPLITS)


def test_a_folder_of_something_else_stays(planted, tmp_path):
    file, labels, _ = planted
    (tmp_path / "mine.txt").write_text("mine")
    report = probe_tasks(file, None, labels=labels, splits=SPLITS, tasks=["told"], sizes=[10], draws=1, num_resamples=3)
    with pytest.raises(ValueError, match="something other than a report"):
        write_probe(report, tmp_path)
