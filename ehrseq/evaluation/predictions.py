"""Predictions and labels as tables: the schema of MEDS evaluation, and which prediction belongs to which label.

`ehrseq predict` writes subject_id, prediction_time, task, score and more; other MEDS tools write subject_id,
prediction_time, boolean_value, predicted_boolean_value, predicted_boolean_probability, one file a task. Both are read.
"""

from __future__ import annotations

import logging
from pathlib import Path

import polars as pl

from ehrseq.data.parquet import check_parquet
from ehrseq.data.schema import LABEL_KEYS
from ehrseq.evaluation.calibration import check_probabilities
from ehrseq.work.files import write_whole

logger = logging.getLogger(__name__)

PROBABILITY = "predicted_boolean_probability"
DECISION = "predicted_boolean_value"
MEDS_SCHEMA = pl.Schema(
    {
        "subject_id": pl.Int64(),
        "prediction_time": pl.Datetime("us"),
        "boolean_value": pl.Boolean(),
        DECISION: pl.Boolean(),
        PROBABILITY: pl.Float32(),
    }
)
_EXAMPLES = 3


def match_predictions(
    predictions: pl.DataFrame,
    labels: pl.DataFrame | None = None,
    *,
    task: str | None = None,
    source: str = "predictions",
) -> pl.DataFrame:
    """One row for each label: subject_id, prediction_time, label, score.

    Args:
        predictions: `subject_id`, `prediction_time`, the score as `score` or `predicted_boolean_probability`; a `task`
            column where several tasks are in it. Rows without a score are left out where no label asks for them.
        labels: `subject_id`, `prediction_time`, `boolean_value`; None where the predictions hold `boolean_value`
            themselves (or `label` as 0/1).
        task: Task whose rows are wanted; needed where there are several.
        source: Name of the predictions in errors.

    Returns:
        The rows sorted by subject and time; `label` is Boolean, `score` Float64.

    Raises:
        ValueError: Columns that are missing, several tasks and no `task`, duplicate predictions or labels, labels
            without a prediction, NaN scores, or scores outside [0, 1].
    """
    table = _of_task(predictions, task, source)
    score = next((name for name in ("score", PROBABILITY) if name in table.columns), None)
    missing = [name for name in LABEL_KEYS if name not in table.columns]
    if score is None or missing:
        raise ValueError(
            f"{source} has the columns {predictions.columns}; expected {list(LABEL_KEYS)} and a score, as `score` or "
            f"`{PROBABILITY}`."
        )
    scored = _keys(table).with_columns(score=table[score].cast(pl.Float64))
    if labels is None:
        # `ehrseq predict` names the positive outcome in a column of text that is called label.
        texts = pl.String, pl.Categorical, pl.Enum
        named = [name for name in ("boolean_value", "label") if name in table.columns]
        column = next((name for name in named if not isinstance(table.schema[name], texts)), None)
        if column is None:
            raise ValueError(f"{source} holds no `boolean_value`; give the labels as well.")
        scored = scored.with_columns(label=_booleans(table[column], source))
        unlabelled = scored["label"].null_count()
        if unlabelled:
            raise ValueError(f"{source}: {unlabelled:,} rows have no label; leave them out, or give the labels.")
        joined = scored
        _refuse_duplicates(scored, source)
    else:
        known = _labels(labels)
        _refuse_duplicates(scored, source)
        _refuse_duplicates(known, "labels")
        joined = known.join(scored, on=list(LABEL_KEYS), how="left", maintain_order="left")
        unlabelled = scored["score"].count() - joined["score"].count()
        if unlabelled:
            logger.warning("%s: %s predictions have no label and are left out.", source, f"{unlabelled:,}")
    lost = joined.filter(pl.col("score").is_null())
    if lost.height:
        raise ValueError(
            f"{lost.height:,} of {joined.height:,} labels have no score in {source}, for example "
            f"{lost.select(LABEL_KEYS).head(_EXAMPLES).rows()}. Score every labelled row, or drop these labels and say "
            "so: rows that a model declines are rarely like the others."
        )
    check_probabilities(joined["score"].to_numpy())
    return joined.select(*LABEL_KEYS, "label", "score").sort(LABEL_KEYS)


def to_meds_predictions(table: pl.DataFrame, *, threshold: float = 0.5) -> pl.DataFrame:
    """What `match_predictions` returns, in the schema of MEDS evaluation.

    Args:
        table: subject_id, prediction_time, label, score.
        threshold: Score from which on `predicted_boolean_value` is true.
    """
    return table.select(
        "subject_id",
        "prediction_time",
        pl.col("label").alias("boolean_value"),
        (pl.col("score") >= threshold).alias(DECISION),
        pl.col("score").alias(PROBABILITY),
    ).cast(MEDS_SCHEMA)


def read_predictions(path: str | Path) -> pl.DataFrame:
    """A table of predictions: a Parquet file, or all Parquet files below a folder.

    Raises:
        ValueError: No such file, or one that is no Parquet.
    """
    path = Path(path)
    files = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise ValueError(f"{path} holds no predictions; expected a Parquet file, or a folder of such.")
    frames = []
    for file in files:
        check_parquet(file)
        try:
            frames.append(pl.read_parquet(file))
        except (pl.exceptions.PolarsError, OSError) as error:
            raise ValueError(f"{file} cannot be read as Parquet: {error}") from error
    try:
        return pl.concat(frames)
    except pl.exceptions.PolarsError as error:
        raise ValueError(f"the files below {path} have different columns: {error}") from error


def write_meds_predictions(table: pl.DataFrame, path: str | Path, *, threshold: float = 0.5) -> Path:
    """Write predictions in the schema of MEDS evaluation; the file appears whole or not at all."""
    path = Path(path)
    frame = to_meds_predictions(table, threshold=threshold)
    write_whole(path, lambda file: frame.write_parquet(file))
    return path


def _of_task(table: pl.DataFrame, task: str | None, source: str) -> pl.DataFrame:
    if "task" not in table.columns:
        return table
    tasks = table["task"].unique().sort().to_list()
    if task is None:
        if len(tasks) != 1:
            raise ValueError(f"{source} holds the tasks {tasks}; say which.")
        return table
    if task not in tasks:
        raise ValueError(f"{source} has no task {task!r}; it has {tasks}.")
    return table.filter(pl.col("task") == task)


def _keys(table: pl.DataFrame) -> pl.DataFrame:
    return table.select(pl.col("subject_id").cast(pl.Int64), pl.col("prediction_time").cast(pl.Datetime("us")))


def _labels(labels: pl.DataFrame) -> pl.DataFrame:
    missing = [name for name in (*LABEL_KEYS, "boolean_value") if name not in labels.columns]
    if missing:
        raise ValueError(f"labels have the columns {labels.columns}; {missing} are missing.")
    return _keys(labels).with_columns(label=_booleans(labels["boolean_value"], "labels"))


def _booleans(values: pl.Series, source: str) -> pl.Series:
    if values.dtype == pl.Boolean:
        return values
    if not values.dtype.is_numeric() or not values.drop_nulls().is_in([0, 1]).all():
        raise ValueError(f"{source}: expected labels that are true or false (or 0 and 1), got {values.dtype}.")
    return values.cast(pl.Boolean)


def _refuse_duplicates(table: pl.DataFrame, source: str) -> None:
    repeated = table.filter(table.select(LABEL_KEYS).is_duplicated())
    if repeated.height:
        raise ValueError(
            f"{source}: {repeated.height:,} rows share subject and time with another, for example "
            f"{repeated.select(LABEL_KEYS).unique(maintain_order=True).head(_EXAMPLES).rows()}. Each question has one "
            "answer."
        )
