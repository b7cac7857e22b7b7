"""One task's report against scikit-learn and meds-evaluation, and what is not estimable."""

import json

import numpy as np
import polars as pl
import pytest
from sklearn.metrics import average_precision_score, brier_score_loss, f1_score, roc_auc_score

from ehrseq.evaluation import assess, to_meds_predictions
from ehrseq.evaluation.assessment import METRIC_TITLES
from tests.evaluation.tables import scored_table


def test_metrics_are_those_of_scikit_learn():
    table = scored_table()
    y, p = table["label"].to_numpy(), table["score"].to_numpy()
    found = assess(table, "t", threshold=0.4, num_resamples=60)
    expected = {
        "auroc": roc_auc_score(y, p),
        "auprc": average_precision_score(y, p),
        "f1": f1_score(y, p >= 0.4),
        "brier": brier_score_loss(y, p),
    }
    for name, value in expected.items():
        assert found.metrics[name].value == pytest.approx(value)
    assert found.metrics.keys() == METRIC_TITLES.keys()
    for interval in found.metrics.values():
        assert interval.low < interval.value < interval.high or interval.value < interval.low  # ECE is biased upwards
    assert found.metrics["calibration_slope"].low < 1 < found.metrics["calibration_slope"].high
    assert (found.labels, found.positives, found.patients) == (800, y.sum(), table["subject_id"].n_unique())


def test_metrics_are_those_of_meds_evaluation():
    evaluate = pytest.importorskip("meds_evaluation.evaluate", reason="meds-evaluation is not installed")
    table = scored_table().with_columns(pl.col("score").cast(pl.Float32).cast(pl.Float64))  # as its schema keeps it
    theirs = evaluate.evaluate_binary_classification(to_meds_predictions(table, threshold=0.4))
    theirs = theirs["samples_equally_weighted"]
    ours = assess(table, "t", threshold=0.4, num_resamples=5).metrics
    for name, other in {
        "auroc": "roc_auc_score",
        "auprc": "average_precision_score",
        "f1": "f1_score",
        "brier": "brier_score",
    }.items():
        assert ours[name].value == pytest.approx(theirs[other], abs=1e-6), name


def test_the_threshold_comes_from_tuning_rows_and_says_so():
    table, tuning = scored_table(), scored_table(seed=5)
    found = assess(table, "t", tuning=tuning, num_resamples=5)
    assert found.threshold_from == "best F1 of the tuning rows"
    best = max(tuning["score"], key=lambda t: f1_score(tuning["label"], tuning["score"].to_numpy() >= t))
    assert found.threshold == pytest.approx(best)
    assert "no tuning rows" in assess(table, "t", num_resamples=5).threshold_from
    none = tuning.with_columns(label=pl.lit(False))
    assert "no positive" in assess(table, "t", tuning=none, num_resamples=5).threshold_from


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        (pl.col("label") | True, None),
        (~pl.col("label"), "0 positives (needs 20)"),
        (pl.col("label"), "0 negatives (needs 20)"),
        (pl.lit(False), "no labels"),
    ],
    ids=["all", "one class", "the other class", "nothing"],
)
def test_what_is_not_estimable_has_a_reason_and_no_number(rows, reason):
    found = assess(scored_table().filter(rows), "t", num_resamples=5)
    if reason is None:
        assert not found.missing
        return
    assert set(found.missing.values()) == {reason}
    assert (dict(found.metrics), found.calibration, found.decisions, found.alerts) == ({}, None, None, [])
    assert f"not estimable: {reason}" in found.to_markdown()


def test_a_slope_that_does_not_exist_is_missing_alone():
    table = scored_table().with_columns(score=pl.lit(0.3))
    found = assess(table, "t", num_resamples=5)
    assert found.missing == {"calibration_slope": "it has no finite value"}
    assert found.metrics["auroc"].value == 0.5


def test_without_tuning_rows_the_threshold_is_that_of_an_alert_rate():
    rng = np.random.default_rng(2)
    rare = pl.DataFrame({"subject_id": range(2000), "label": rng.random(2000) < 0.03, "score": rng.random(2000) * 0.1})
    found = assess(rare, "t", alert_rate=0.1, num_resamples=5)
    assert (rare["score"] >= found.threshold).sum() == 200
    assert (found.alerts[0].threshold, found.alerts[0].wanted) == (found.threshold, None)
    assert found.alerts[0].alerts_per_1000 == 100
    assert found.metrics["f1"].value == pytest.approx(f1_score(rare["label"], rare["score"] >= found.threshold))
    assert found.metrics["f1"].value > 0  # no score reaches 0.5
    assert "10 % of the rows" in found.threshold_from


def test_the_bins_of_the_calibration_curve_have_intervals_over_patients():
    table = scored_table()
    curve = assess(table, "t", num_resamples=200).calibration
    assert (curve.low <= curve.observed).all()
    assert (curve.observed <= curve.high).all()
    # Two copies of every patient tell nothing new, those of other patients half the variance.
    copies = pl.concat([table, table])
    same = assess(copies, "t", num_resamples=200).calibration
    np.testing.assert_allclose(same.high - same.low, curve.high - curve.low, atol=1e-9)


def test_the_report_is_json_and_a_table():
    found = assess(scored_table(), "t", num_resamples=5)
    told = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert told["metrics"]["auroc"]["value"] == found.metrics["auroc"].value
    assert len(told["calibration"]["predicted"]) == 10
    assert len(told["decisions"]["thresholds"]) == 99
    text = found.to_markdown()
    assert str(found.metrics["auroc"]) in text
    assert f"threshold {found.threshold:.3g} (an alert for the 5 % of the rows with the highest scores" in text


def test_a_second_copy_of_every_patient_changes_no_value():
    table = scored_table(300)
    copies = pl.concat([table, table.with_columns(pl.col("subject_id") + 10_000)])
    one, two = (assess(each, "t", num_resamples=5) for each in (table, copies))
    for name in METRIC_TITLES.keys() - {"ece"}:
        assert two.metrics[name].value == pytest.approx(one.metrics[name].value, rel=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"table": scored_table().with_columns(score=pl.lit(float("nan")))}, "must be finite"),
        ({"table": scored_table().with_columns(score=pl.lit(1.5))}, r"in \[0, 1\]"),
        ({"threshold": 2.0}, "threshold got 2.0"),
        ({"alert_rate": 0.0}, "alert_rate got 0.0"),
        ({"alert_rate": 1.5}, "alert_rate got 1.5"),
        ({"threshold": 0.2, "tuning": scored_table()}, "not both"),
        ({"num_bins": 0}, "num_bins"),
        ({"num_resamples": 0}, "num_resamples >= 1"),
    ],
)
def test_bad_input_is_told(change, message):
    with pytest.raises(ValueError, match=message):
        assess(**{"table": scored_table(), "task": "t", **change})


def test_the_interval_of_a_calibrated_slope_covers_1_as_often_as_it_says():
    covered = 0
    for seed in range(40):
        interval = assess(scored_table(400, 400, seed), "t", num_resamples=200).metrics["calibration_slope"]
        covered += interval.low <= 1 <= interval.high
    assert covered >= 34  # 38 of 40 expected; fewer than 34 has a probability of about 1 %
    assert np.isfinite(covered)
