"""Which prediction belongs to which label, and the schema of MEDS evaluation."""

import polars as pl
import pytest
from polars.testing import assert_frame_equal

from ehrseq.evaluation import match_predictions, read_predictions, to_meds_predictions, write_meds_predictions
from ehrseq.evaluation.predictions import logger
from tests.evaluation.tables import scored_table


def both(n=60):
    """(predictions as `ehrseq predict` writes them, labels, the rows that belong together)."""
    rows = scored_table(n)
    predictions = rows.select(
        "subject_id", "prediction_time", "score", task=pl.lit("a"), label=pl.lit("the outcome in words")
    )
    labels = rows.select("subject_id", "prediction_time", boolean_value="label")
    return predictions, labels, rows


def test_labels_find_their_scores_whatever_the_order():
    predictions, labels, rows = both()
    shuffled = predictions.sample(fraction=1, shuffle=True, seed=1)
    assert_frame_equal(match_predictions(shuffled, labels.sample(fraction=1, shuffle=True, seed=2)), rows)
    more = pl.concat([predictions, predictions.with_columns(task=pl.lit("b"), score=1 - pl.col("score"))])
    assert_frame_equal(match_predictions(more, labels, task="a"), rows)
    assert_frame_equal(match_predictions(more, labels, task="b"), rows.with_columns(score=1 - pl.col("score")))


def test_scores_that_no_label_asks_for_are_counted(monkeypatch):
    told = []
    monkeypatch.setattr(logger, "warning", lambda text, *values: told.append(text % values))
    predictions, labels, _ = both()
    assert match_predictions(predictions, labels.head(50)).height == 50
    assert told == ["predictions: 10 predictions have no label and are left out."]


def test_rows_without_a_score_matter_only_where_a_label_asks():
    predictions, labels, rows = both()
    declined = predictions.with_columns(score=pl.when(pl.int_range(pl.len()) < 10).then(None).otherwise("score"))
    assert_frame_equal(match_predictions(declined, labels.slice(10)), rows.slice(10))
    with pytest.raises(ValueError, match="10 of 60 labels have no score"):
        match_predictions(declined, labels)


def test_what_is_written_is_read_by_meds_evaluation_and_by_us(tmp_path):
    schema = pytest.importorskip("meds_evaluation.schema", reason="meds-evaluation is not installed")
    import pyarrow.parquet as pq

    rows = scored_table(50)
    file = write_meds_predictions(rows, tmp_path / "new" / "p.parquet", threshold=0.3)
    schema.PredictionSchema.validate(pq.read_table(file))
    again = match_predictions(read_predictions(file))
    assert_frame_equal(again, rows.with_columns(pl.col("score").cast(pl.Float32).cast(pl.Float64)))
    decided = pl.read_parquet(file)
    assert decided["predicted_boolean_value"].to_list() == (rows["score"] >= 0.3).to_list()
    assert to_meds_predictions(rows).columns == decided.columns
    assert not list(tmp_path.rglob("*.writing*"))


BAD = {
    "no score": (lambda p, y: (p.drop("score"), y), "expected .* and a score"),
    "no time": (lambda p, y: (p.drop("prediction_time"), y), "prediction_time"),
    "no labels": (lambda p, y: (p, None), "holds no `boolean_value`"),
    "no label column": (lambda p, y: (p, y.drop("boolean_value")), r"\['boolean_value'\] are missing"),
    "duplicate predictions": (lambda p, y: (pl.concat([p, p.head(1)]), y), "2 rows share subject and time"),
    "duplicate labels": (lambda p, y: (p, pl.concat([y, y.head(2)])), "labels: 4 rows share subject and time"),
    "other rows": (lambda p, y: (p.slice(5), y), "5 of 60 labels have no score"),
    "NaN": (lambda p, y: (p.with_columns(score=pl.lit(float("nan"))), y), "expected probabilities"),
    "above 1": (lambda p, y: (p.with_columns(score=pl.col("score") + 1), y), r"in \[0, 1\]"),
    "several tasks": (
        lambda p, y: (pl.concat([p, p.with_columns(task=pl.lit("b"))]), y),
        r"holds the tasks \['a', 'b'\]; say which",
    ),
    "words for labels": (lambda p, y: (p, y.with_columns(boolean_value=pl.lit("yes"))), "true or false"),
    "other numbers": (lambda p, y: (p, y.with_columns(boolean_value=pl.lit(2))), "true or false"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_match_is_told(name):
    predictions, labels, _ = both()
    change, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        match_predictions(*change(predictions, labels))


def test_an_unknown_task_is_told():
    predictions, labels, _ = both()
    with pytest.raises(ValueError, match=r"no task 'c'; it has \['a'\]"):
        match_predictions(predictions, labels, task="c")


def test_labels_that_are_null_are_told():
    table = scored_table(5).with_columns(label=pl.lit(None, pl.Boolean))
    with pytest.raises(ValueError, match="5 rows have no label"):
        match_predictions(table)


def test_files_that_are_none_are_told(tmp_path):
    with pytest.raises(ValueError, match="holds no predictions"):
        read_predictions(tmp_path)
    (tmp_path / "a.parquet").write_text("no")
    with pytest.raises(ValueError, match="cannot be read as Parquet"):
        read_predictions(tmp_path / "a.parquet")
    pl.DataFrame({"x": [1]}).write_parquet(tmp_path / "a.parquet")
    pl.DataFrame({"y": ["1"]}).write_parquet(tmp_path / "b.parquet")
    with pytest.raises(ValueError, match="different columns"):
        read_predictions(tmp_path)
