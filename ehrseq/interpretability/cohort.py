"""What codes contribute in a cohort, and what changed of one patient's contributions between two times.

A cohort's table is made of contributions of many patients (`explain_dataset`): of each code the mean over the questions
(patient and time) that have it, with a bootstrap interval over patients, beside the share of patients who have it. It
is told for all questions and apart for positive and negative predictions, as EhrMamba's paper does in its figure 3.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from ehrseq.data.tables import check_columns
from ehrseq.evaluation.bootstrap import patient_weights
from ehrseq.interpretability.explanation import Explanation, parents_of

COHORT_SUMS = ("code", "parent", "kind", "group")
"""What contributions of a cohort can be summed by."""

COHORT_OUTCOMES = ("positive prediction", "negative prediction", "all")
"""Of whom a row of a cohort's table speaks."""

COHORT_SCHEMA: dict[str, Any] = {
    "task": pl.String(),
    "method": pl.String(),
    "group": pl.String(),
    "display": pl.String(),
    "patients": pl.Int64(),
    "frequency": pl.Float64(),
    "mean": pl.Float64(),
    "low": pl.Float64(),
    "high": pl.Float64(),
    "spread": pl.Float64(),
    "outcome": pl.String(),
}
"""Columns of a cohort's table."""

_NEEDED = (
    "subject_id",
    "prediction_time",
    "task",
    "method",
    "score",
    "code",
    "kind",
    "display",
    "group",
    "contribution",
)
_QUESTION = ("subject_id", "prediction_time")
_CELLS = 4_000_000  # weights held at once


def cohort_contributions(
    contributions: str | Path | pl.DataFrame | pl.LazyFrame,
    by: str | None = None,
    *,
    threshold: float = 0.5,
    num_resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> pl.DataFrame:
    """Mean contribution of each code over a cohort, with its interval and its frequency.

    Contributions of a question (patient and time) are first summed by code; the mean is over the questions that have
    it. Tokens that no event made are groups of their own: `[VS]` and other marks of visits, the task's token, "time"
    that passes.

    Args:
        contributions: Parquet file, or table, in the columns of `EXPLAINED_SCHEMA`.
        by: "code", "parent" (the code's next broader one), "kind"; or "group" of contributions that are of groups.
            Default: the groups where there are some, else the codes.
        threshold: Predictions are positive from this risk on.
        num_resamples: Bootstrap resamples of patients.
        confidence: Coverage of the intervals.
        seed: Seed of the draws.

    Returns:
        For each task, method, outcome and group: `group`, `display` (the code's description), `patients` (who have it),
        `frequency` (their share), `mean` (log-odds) with `low` and `high` (null for a single patient), `spread`
        (standard deviation over the questions; null for a single one) and `outcome`: "positive prediction", "negative
        prediction" or "all". The largest means first.

    Raises:
        ValueError: A column is missing, another `by`, a threshold that is no risk, nothing that was explained.
    """
    check_cohort(by, threshold, num_resamples, confidence)
    sums = _summed(contributions, by)
    if sums.is_empty():
        raise ValueError("none of these questions was explained; there is no contribution to sum up.")
    frames = [pl.DataFrame(schema=COHORT_SCHEMA)]
    for (task, method), rows in sums.group_by("task", "method", maintain_order=True):
        is_positive = pl.col("score") >= threshold
        for outcome, which in zip(COHORT_OUTCOMES, (is_positive, ~is_positive, pl.lit(True)), strict=True):
            chosen = rows.filter(which)
            if chosen.is_empty():
                continue
            table = _means(chosen, num_resamples, confidence, seed)
            named = table.with_columns(
                task=pl.lit(task, pl.String), method=pl.lit(method, pl.String), outcome=pl.lit(outcome)
            )
            frames.append(named.select(pl.col(name).cast(kind) for name, kind in COHORT_SCHEMA.items()))
    return pl.concat(frames)


def check_cohort(by: object, threshold: object, num_resamples: int, confidence: float = 0.95) -> None:
    """Refuse arguments of `cohort_contributions` that are of no use, before anything is worked out.

    Raises:
        ValueError: See above.
    """
    if by is not None and by not in COHORT_SUMS:
        raise ValueError(f"by got {by!r}; expected one of {list(COHORT_SUMS)}.")
    if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not 0 <= threshold <= 1:
        raise ValueError(f"threshold got {threshold!r}; expected a risk from 0 to 1.")
    if num_resamples < 1 or not 0 < confidence < 1:
        raise ValueError(f"expected num_resamples >= 1 and 0 < confidence < 1, got {num_resamples} and {confidence}.")


def cohort_words(contributions: str | Path | pl.DataFrame | pl.LazyFrame, threshold: float) -> list[str]:
    """How many questions a cohort's table is made of, and what its outcomes mean: for its page."""
    questions = _lazy(contributions).select(*_QUESTION, "task", "score").unique().collect()
    questions = questions.select(*_QUESTION, "score").unique()
    scored = questions.drop_nulls("score")
    positive = scored.filter(pl.col("score") >= threshold).height
    words = [
        f"{scored.height:,} explained risks of {scored['subject_id'].n_unique():,} patients; a prediction is positive "
        f"from a risk of {threshold:g} on: {positive:,} are."
    ]
    if scored.height < questions.height:
        words.append(f"Left out: {questions.height - scored.height:,} questions that have no answer.")
    return words


def _lazy(contributions: str | Path | pl.DataFrame | pl.LazyFrame) -> pl.LazyFrame:
    if isinstance(contributions, str | Path):
        try:
            lazy = pl.scan_parquet(contributions, hive_partitioning=False, glob=False)
            lazy.collect_schema()
        except (pl.exceptions.PolarsError, OSError) as error:
            raise ValueError(f"{contributions} cannot be read as Parquet: {str(error).splitlines()[0]}") from error
    elif isinstance(contributions, pl.DataFrame | pl.LazyFrame):
        lazy = contributions.lazy()
    else:
        raise ValueError(f"contributions got {type(contributions).__name__}; expected a Parquet file or a table.")
    check_columns(pl.DataFrame(schema=lazy.collect_schema()), _NEEDED, "the table of contributions")
    return lazy


def _summed(contributions: str | Path | pl.DataFrame | pl.LazyFrame, by: str | None) -> pl.DataFrame:
    """Contributions of each question, summed by group: keys, score, group, display, contribution."""
    lazy = _lazy(contributions).filter(pl.col("score").is_not_null())
    has_groups = bool(lazy.select(pl.col("group").is_not_null().any()).collect().item())
    by = by or ("group" if has_groups else "code")
    if has_groups != (by == "group"):
        raise ValueError(
            f"by={by!r} cannot be told: these contributions are "
            f"{'of groups already; take by=group' if has_groups else 'of single events; take code, parent or kind'}."
        )
    group = pl.coalesce(pl.col("code"), pl.col("kind"))
    if by == "parent":
        codes = lazy.select(pl.col("code").unique().drop_nulls()).collect()["code"]
        group = pl.coalesce(
            pl.col("code").replace_strict(parents_of(codes), default=None, return_dtype=pl.String), "kind"
        )
    elif by != "code":
        group = pl.col(by)
    display = pl.col("display") if by == "code" else pl.lit(None, pl.String)
    keys = ["task", "method", *_QUESTION, "score", "group"]
    # A question without a contribution counts among the patients who lack every code.
    return (
        lazy.select(*keys[:-1], group.alias("group"), display.alias("display"), "contribution")
        .group_by(keys, maintain_order=True)
        .agg(
            pl.col("display").drop_nulls().first(),
            pl.col("contribution").sum(),
            pl.col("contribution").count().alias("count"),
        )
        .collect()
        .with_columns(group=pl.when(pl.col("count") > 0).then("group"))
    )


def _means(rows: pl.DataFrame, num_resamples: int, confidence: float, seed: int) -> pl.DataFrame:
    """Mean, interval, spread and frequency of each group over some questions."""
    questions = rows.select(_QUESTION).unique(maintain_order=True).with_row_index("question")
    patients = questions["subject_id"].n_unique()
    entries = rows.filter(pl.col("group").is_not_null()).join(questions, on=list(_QUESTION), nulls_equal=True)
    entries = entries.sort("group", "question")
    if entries.is_empty():
        return pl.DataFrame(schema=COHORT_SCHEMA).drop("task", "method", "outcome")
    groups = entries.group_by("group", maintain_order=True).agg(
        pl.col("display").drop_nulls().first(),
        pl.col("subject_id").n_unique().alias("patients"),
        pl.col("contribution").mean().alias("mean"),
        pl.col("contribution").std().alias("spread"),
        pl.len().alias("entries"),
    )
    starts = np.concatenate([[0], groups["entries"].cum_sum().to_numpy()[:-1]])
    low, high = _intervals(
        questions["subject_id"].to_numpy(), entries["question"].to_numpy(), entries["contribution"].to_numpy(), starts,
        num_resamples, confidence, seed,
    )  # fmt: skip
    single = groups["patients"].to_numpy() < 2
    low[single] = high[single] = np.nan
    return groups.with_columns(
        frequency=pl.col("patients") / patients,
        low=pl.Series(low).fill_nan(None),
        high=pl.Series(high).fill_nan(None),
    ).sort(pl.col("mean").abs(), "group", descending=[True, False])


def _intervals(
    subjects: NDArray[Any],
    question: NDArray[Any],
    values: NDArray[np.float64],
    starts: NDArray[np.int64],
    num_resamples: int,
    confidence: float,
    seed: int,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Ends of the interval of each group's mean under resampling of patients; entries lie group by group."""
    drawn = []
    cells = max(1, _CELLS * len(subjects) // max(len(values), len(subjects)))  # of an entry each, not of a question
    for weights in patient_weights(subjects, num_resamples, seed=seed, chunk_cells=cells):
        of_entries = weights[:, question]
        counts = np.add.reduceat(of_entries, starts, axis=1)
        of_entries *= values
        with np.errstate(invalid="ignore"):
            drawn.append(np.add.reduceat(of_entries, starts, axis=1) / counts)  # NaN where nobody was drawn who has it
    means = np.concatenate(drawn)
    tail = (1 - confidence) / 2
    seen = np.isfinite(means).any(0)
    low, high = np.full(means.shape[1], np.nan), np.full(means.shape[1], np.nan)
    low[seen], high[seen] = np.nanquantile(means[:, seen], [tail, 1 - tail], axis=0)
    return low, high


# -- two times of one patient ----------------------------------------------------------------------------------------

_IDENTITY = ("time", "code", "value", "text", "unit", "kind", "group")

CHANGE_SCHEMA: dict[str, Any] = {
    "status": pl.String(),
    "time": pl.Datetime("us"),
    "code": pl.String(),
    "value": pl.Float64(),
    "text": pl.String(),
    "unit": pl.String(),
    "kind": pl.String(),
    "group": pl.String(),
    "display": pl.String(),
    "then": pl.Float64(),
    "now": pl.Float64(),
    "change": pl.Float64(),
}
"""Columns of `Comparison.changes`."""


@dataclass(frozen=True)
class Comparison:
    """What changed between two explanations of one patient: `change = baseline + changes + remainder`, exactly.

    Attributes:
        changes: One row for each event (or group) that is in either, the largest change first: `status` ("new": in the
            later one alone; "gone": in the earlier one alone; "changed"; "same"), what it is, `then` and `now` (its
            contributions, null where it is not in), `change`. Marks of visits and the question's tokens are summed by
            name, since they belong to other places of the row each time.
        change: Of the log-odds.
        baseline: Change of what the contributions start from.
        remainder: Change of what the method leaves unexplained.
    """

    changes: pl.DataFrame
    change: float
    baseline: float
    remainder: float

    def by_status(self) -> pl.DataFrame:
        """`status`, how many rows and the sum of their changes."""
        order = {"new": 0, "gone": 1, "changed": 2, "same": 3}
        sums = self.changes.group_by("status").agg(pl.len().cast(pl.Int64).alias("rows"), pl.col("change").sum())
        return sums.sort(pl.col("status").replace_strict(order, return_dtype=pl.Int64))


def compare(then: Explanation, now: Explanation) -> Comparison:
    """What changed between two prediction times of one patient.

    An event is the same where time, code, value, text and unit are; of several such the first is compared with the
    first. Events of prefix deltas keep their contributions as long as they are seen; those of other methods may all
    change.

    Args:
        then: The earlier explanation.
        now: The later one, of the same patient, task, method and model.

    Raises:
        ValueError: They are of different patients, tasks, methods or models, or one has nothing to explain.
    """
    for name in ("subject_id", "task", "method", "model"):
        if getattr(then, name) != getattr(now, name):
            raise ValueError(
                f"compare got explanations of the {name} {getattr(then, name)!r} and {getattr(now, name)!r}; expected "
                "two times of one patient, with everything else the same."
            )
    for each in (then, now):
        if each.log_odds != each.log_odds:  # NaN
            raise ValueError(
                f"the explanation at {each.prediction_time} has no answer ({each.reason}); nothing changed."
            )
    keys = [*_IDENTITY, "repeat"]
    both = _identified(then, "then").join(
        _identified(now, "now"), on=keys, how="full", coalesce=True, nulls_equal=True, maintain_order="right_left"
    )
    change = pl.col("now").fill_null(0.0) - pl.col("then").fill_null(0.0)
    status = (
        pl.when(pl.col("then").is_null()).then(pl.lit("new"))
        .when(pl.col("now").is_null()).then(pl.lit("gone"))
        .when(change == 0).then(pl.lit("same"))
        .otherwise(pl.lit("changed"))
    )  # fmt: skip
    changes = both.with_columns(status=status, change=change, display=pl.coalesce("display", "display_right")).sort(
        pl.col("change").abs(), descending=True, maintain_order=True
    )
    return Comparison(
        changes.select(pl.col(name).cast(kind) for name, kind in CHANGE_SCHEMA.items()),
        now.log_odds - then.log_odds,
        now.baseline - then.baseline,
        now.remainder - then.remainder,
    )


def _identified(explanation: Explanation, name: str) -> pl.DataFrame:
    """Contributions with what tells them apart."""
    table = explanation.contributions
    is_token = pl.col("event").is_null() & pl.col("group").is_null()
    tokens = (
        table.filter(is_token)
        .group_by("code", "kind", maintain_order=True)
        .agg(pl.col("display").first(), pl.col("contribution").sum())
    )
    rows = pl.concat([table.filter(~is_token), tokens], how="diagonal")
    repeat = pl.int_range(pl.len()).over(_IDENTITY).alias("repeat")
    return rows.select(*_IDENTITY, repeat, "display", pl.col("contribution").alias(name))
