"""Subgroups against fairlearn, and against counting by hand."""

from datetime import datetime

import numpy as np
import polars as pl
import pytest
from sklearn.metrics import roc_auc_score

from ehrseq.evaluation import assess_subgroups, row_attributes, subgroup_table
from tests.evaluation.tables import scored_table


def sexes(table):
    return pl.DataFrame({"sex": ["F" if subject % 2 else "M" for subject in table["subject_id"]]})


def test_metrics_are_those_of_fairlearn():
    fairlearn = pytest.importorskip("fairlearn.metrics", reason="fairlearn is not installed")
    table = scored_table()
    groups = assess_subgroups(table, sexes(table), threshold=0.4, num_resamples=50)
    y, p = table["label"].to_numpy(), table["score"].to_numpy()
    metrics = {"sensitivity": fairlearn.true_positive_rate, "false_positive_rate": fairlearn.false_positive_rate}
    frame = fairlearn.MetricFrame(
        metrics=metrics, y_true=y, y_pred=p >= 0.4, sensitive_features=sexes(table)["sex"].to_numpy()
    )
    scores = fairlearn.MetricFrame(
        metrics=roc_auc_score, y_true=y, y_pred=p, sensitive_features=sexes(table)["sex"].to_numpy()
    )
    for group in groups:
        for name in metrics:
            assert group.metrics[name].value == pytest.approx(frame.by_group[name][group.value])
        assert group.metrics["auroc"].value == pytest.approx(scores.by_group[group.value])
    # Two groups: each is the other's rest.
    first, second = groups
    for name, interval in first.differences.items():
        assert interval.value == pytest.approx(first.metrics[name].value - second.metrics[name].value)
        assert interval.value == pytest.approx(-second.differences[name].value)
        assert interval.low < interval.value < interval.high
    assert frame.difference()["sensitivity"] == pytest.approx(abs(first.differences["sensitivity"].value))


def test_a_worse_served_group_is_seen():
    table = scored_table(3000, 1000)
    rng = np.random.default_rng(1)
    of_men = pl.col("subject_id") % 2 == 0
    noise = pl.Series(rng.random(table.height))
    table = table.with_columns(score=pl.when(of_men).then(noise).otherwise("score"))
    women, men = assess_subgroups(table, sexes(table), num_resamples=200)
    assert men.differences["auroc"].high < -0.05
    assert women.differences["auroc"].low > 0.05


def test_small_cells_are_not_estimable():
    table = scored_table()
    only = pl.Series([f"{subject}" if subject == 5 else "others" for subject in table["subject_id"]])
    one, rest = assess_subgroups(table, pl.DataFrame({"who": only}), num_resamples=20)
    assert (one.value, one.reason, one.metrics, one.differences) == ("5", "1 patients (needs 20)", {}, {})
    assert rest.reason is None
    assert rest.differences == {}  # the rest of the rest is that one patient
    assert "not estimable: 1 patients" in subgroup_table([one, rest])
    positives = pl.DataFrame({"who": table["label"].cast(pl.String)})
    assert {group.reason for group in assess_subgroups(table, positives, num_resamples=20)} == {
        f"0 {name} (needs 20)" for name in ("positives", "negatives")
    }


def test_the_order_of_rows_changes_nothing():
    table, order = scored_table(), np.random.default_rng(0).permutation(800)
    first = assess_subgroups(table, sexes(table), num_resamples=30)
    second = assess_subgroups(table[order], sexes(table[order]), num_resamples=30)
    for one, two in zip(first, second, strict=True):
        assert (one.patients, one.labels, one.positives) == (two.patients, two.labels, two.positives)
        for name, interval in one.metrics.items():
            assert two.metrics[name].value == pytest.approx(interval.value)


def test_attributes_come_from_the_record():
    born = datetime(1950, 7, 1)
    events = pl.DataFrame(
        {
            "subject_id": [1, 1, 1, 2, 2, 3],
            "time": [born, None, None, None, datetime(2019, 1, 1), datetime(2000, 1, 1)],
            "code": ["MEDS_BIRTH", "GENDER//F", "RACE//BLACK/CAPE VERDEAN", "SEX//M", "LAB//X", "MEDS_BIRTH"],
        }
    )
    rows = pl.DataFrame(
        {
            "subject_id": [3, 1, 2, 1],
            "prediction_time": [
                datetime(2017, 6, 1),
                datetime(2015, 6, 30),
                datetime(2021, 2, 3),
                datetime(2015, 7, 2),
            ],
        }
    )
    found = row_attributes(rows, events, age_bands=(18, 65))
    assert found.to_dict(as_series=False) == {
        "sex": ["unknown", "F", "M", "F"],
        "ethnicity": ["unknown", "BLACK/CAPE VERDEAN", "unknown", "BLACK/CAPE VERDEAN"],
        "age": ["below 18", "18 to 65", "unknown", "65 and over"],
        "year": ["2017", "2015", "2021", "2015"],
    }
    assert row_attributes(rows).columns == ["year"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attributes": pl.DataFrame({"sex": ["F"]})}, "attributes have 1 rows, the table 800"),
        ({"min_patients": 0}, "minima of at least 1"),
        ({"table": scored_table().with_columns(score=pl.lit(2.0))}, r"in \[0, 1\]"),
    ],
)
def test_bad_input_is_told(change, message):
    table = scored_table()
    with pytest.raises(ValueError, match=message):
        assess_subgroups(**{"table": table, "attributes": sexes(table), **change})


def test_bands_must_rise():
    with pytest.raises(ValueError, match="age_bands"):
        row_attributes(scored_table(), scored_table().with_columns(code=pl.lit("A"), time=None), age_bands=(65, 18))
