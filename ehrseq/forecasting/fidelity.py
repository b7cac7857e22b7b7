"""How alike synthetic and real patients are; each number beside that of two halves of the real ones.

Nothing here is a test that is passed: two halves of one cohort say how alike two samples of the same patients are,
which is the best that synthetic ones could be.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import numpy as np
import polars as pl

from ehrseq.evaluation.metrics import auroc
from ehrseq.forecasting.patient_counts import PatientCounts
from ehrseq.tasks.labelling import label_events
from ehrseq.tokenization.ehr_codes import DAY_US, HOUR_US, YEAR_US, kind_reader

FOLDS = 3
_COMMON = 0.01
_PAIRED_CODES = 50
_LEAST_VALUES = 30
_LEAST_OF_A_CLASS = 20
_MOST_COMPARED = 5_000


@dataclass(frozen=True)
class FidelityReport:
    """What was compared, synthetic or another half of the real patients with real ones.

    Attributes:
        patients: Compared patients of both.
        divergence: Jensen-Shannon divergence of the codes of events, in bits: 0 equal, 1 disjoint.
        prevalence_rank: Spearman's correlation of the shares of patients who have a code, over codes that 1 % have.
        prevalence_difference: Mean absolute difference of these shares.
        co_occurrence: Correlation over pairs of frequent codes of the log odds ratio that a patient has both.
        apart: AUROC of boosting on counts that tells one from the other, cross-validated: 0.5 alike, 1 different.
        distances: What -> Kolmogorov-Smirnov distance: 0 alike, 1 disjoint.
        medians: What -> median of these patients, and of the real ones.
        values: Median and largest distance of the values of a laboratory test, and the tests compared.
        codes: The codes whose prevalence differs most: (code, share of these, share of the real ones).
    """

    patients: tuple[int, int]
    divergence: float
    prevalence_rank: float
    prevalence_difference: float
    co_occurrence: float
    apart: float
    distances: Mapping[str, float]
    medians: Mapping[str, tuple[float, float]]
    values: tuple[float, float, int]
    codes: tuple[tuple[str, float, float], ...] = field(default=())


def fidelity(
    events: pl.DataFrame,
    real: pl.DataFrame,
    *,
    code_map: Sequence[Sequence[str]] | None = None,
    seed: int = 0,
) -> FidelityReport:
    """Compare patients with real ones.

    Args:
        events: Event table of the patients that are looked at.
        real: Of the real ones.
        code_map: What codes mean.
        seed: Of folds and trees.
    """
    own, other = PatientCounts.of(events, code_map=code_map), PatientCounts.of(real, code_map=code_map)
    shares = {code: (own.prevalence.get(code, 0.0), other.prevalence.get(code, 0.0)) for code in _all_codes(own, other)}
    common = [code for code, pair in shares.items() if max(pair) >= _COMMON]
    pairs = np.asarray([shares[code] for code in common]).reshape(-1, 2)
    apart = sorted(common, key=lambda code: (-abs(shares[code][0] - shares[code][1]), code))[:10]
    quantities = _quantities(events, code_map), _quantities(real, code_map)
    distances = {name: ks_distance(quantities[0][name], quantities[1][name]) for name in quantities[0]}
    return FidelityReport(
        patients=(len(own), len(other)),
        divergence=_divergence(own, other),
        prevalence_rank=_rank_correlation(pairs[:, 0], pairs[:, 1]),
        prevalence_difference=float(np.abs(pairs[:, 0] - pairs[:, 1]).mean()) if len(pairs) else float("nan"),
        co_occurrence=_co_occurrence(own, other, common),
        apart=told_apart(own, other, seed=seed),
        distances=distances,
        medians={name: (_median(quantities[0][name]), _median(quantities[1][name])) for name in quantities[0]},
        values=_values(events, real),
        codes=tuple((code, *shares[code]) for code in apart),
    )


def told_apart(own: PatientCounts, other: PatientCounts, *, seed: int = 0) -> float:
    """AUROC of gradient boosting on counts that tells the patients of two tables apart, cross-validated.

    As many of each; NaN for fewer than `FOLDS` of either.
    """
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.model_selection import StratifiedKFold

    random = np.random.default_rng(seed)
    number = min(len(own), len(other), _MOST_COMPARED)
    if number < 2 * FOLDS:
        return float("nan")
    columns = own.shared_columns([other])
    parts = [counts.vectors(columns)[np.sort(random.permutation(len(counts))[:number])] for counts in (own, other)]
    features, labels = np.concatenate(parts), np.repeat([1, 0], number)
    scores = np.zeros(len(labels))
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=seed)
    for train, test in folds.split(features, labels):
        model = HistGradientBoostingClassifier(max_iter=60, max_leaf_nodes=8, random_state=seed, early_stopping=False)
        model.fit(features[train], labels[train])
        scores[test] = model.predict_proba(features[test])[:, 1]
    return auroc(labels, scores)


@dataclass(frozen=True)
class TransferredTask:
    """A task learned from these patients and tested on held-out real ones.

    Attributes:
        task: Its name.
        trained: What trained it -> AUROC on the held-out patients, NaN where there are too few labels of a class.
        labels: What trained it -> (labels, positives).
        tested: Labels and positives of the test.
    """

    task: str
    trained: Mapping[str, float]
    labels: Mapping[str, tuple[int, int]]
    tested: tuple[int, int]


def transfer(
    training: Mapping[str, pl.DataFrame],
    test: pl.DataFrame,
    tasks: Sequence[str],
    *,
    end_of_data: datetime,
    code_map: Sequence[Sequence[str]] | None = None,
    seed: int = 0,
) -> list[TransferredTask]:
    """Boosting on counts trained on some patients, tested on others.

    Args:
        training: Name -> event table that trains (synthetic, real).
        test: Event table of other, real patients.
        tasks: Names of packaged tasks.
        end_of_data: Where follow-up ends.
        code_map: What codes mean.
        seed: Of the trees.
    """
    from sklearn.ensemble import HistGradientBoostingClassifier

    done = []
    tables = {**training, "test": test}
    labelled = {
        name: label_events(
            events, list(tasks), end_of_data=end_of_data, code_map=code_map, progress=False, is_part=True
        )
        for name, events in tables.items()
    }
    for task in tasks:
        labels = {name: result.labels[task] for name, result in labelled.items()}
        known = {name: _known_counts(events, labels[name]) for name, events in tables.items()}
        columns = _frequent({name: counts for name, counts in known.items() if name != "test"})
        features = {name: _matrix(counts, labels[name].height, columns) for name, counts in known.items()}
        truth = {name: labels[name]["boolean_value"].to_numpy().astype(int) for name in labels}
        counted = {name: (len(each), int(each.sum())) for name, each in truth.items()}
        areas = {}
        for name in training:
            enough = all(min(n - k, k) >= _LEAST_OF_A_CLASS for n, k in (counted[name], counted["test"]))
            if not enough:
                areas[name] = float("nan")
                continue
            model = HistGradientBoostingClassifier(
                max_iter=60, max_leaf_nodes=8, random_state=seed, early_stopping=False
            )
            model.fit(features[name], truth[name])
            areas[name] = auroc(truth["test"], model.predict_proba(features["test"])[:, 1])
        done.append(TransferredTask(task, areas, {name: counted[name] for name in training}, counted["test"]))
    return done


def ks_distance(values: np.ndarray, others: np.ndarray) -> float:
    """Largest difference of two distribution functions; NaN where either has no value."""
    if not len(values) or not len(others):
        return float("nan")
    places = np.sort(np.concatenate([values, others]))
    below = [np.searchsorted(np.sort(part), places, side="right") / len(part) for part in (values, others)]
    return float(np.abs(below[0] - below[1]).max())


# -- parts -------------------------------------------------------------------------------------------------------------


def _all_codes(own: PatientCounts, other: PatientCounts) -> list[str]:
    return sorted({*own.codes, *other.codes})


def _divergence(own: PatientCounts, other: PatientCounts) -> float:
    codes = _all_codes(own, other)
    shares = [np.asarray([counts.events.get(code, 0.0) for code in codes]) for counts in (own, other)]
    first, second = (part / part.sum() for part in shares)
    middle = (first + second) / 2

    def bits(part: np.ndarray) -> float:
        there = part > 0
        return float((part[there] * np.log2(part[there] / middle[there])).sum())

    return max(0.0, (bits(first) + bits(second)) / 2)


def _rank_correlation(first: np.ndarray, second: np.ndarray) -> float:
    from scipy.stats import spearmanr

    if len(first) < 3 or np.ptp(first) == 0 or np.ptp(second) == 0:
        return float("nan")
    return float(spearmanr(first, second).statistic)


def _co_occurrence(own: PatientCounts, other: PatientCounts, common: Sequence[str]) -> float:
    """Correlation of log odds ratios over the pairs of the most frequent codes that are not everybody's."""
    usual = [code for code in common if 0 < other.prevalence.get(code, 0.0) < 0.95]
    codes = sorted(usual, key=lambda code: (-other.prevalence[code], code))[:_PAIRED_CODES]
    if len(codes) < 3:
        return float("nan")
    odds = []
    for counts in (own, other):
        has = (counts.vectors(codes) > 0).astype(np.float64)
        both = has.T @ has
        only = has.sum(axis=0)[:, None] - both
        neither = len(has) - both - only - only.T
        odds.append(np.log((both + 0.5) * (neither + 0.5) / ((only + 0.5) * (only.T + 0.5))))
    pairs = np.triu_indices(len(codes), 1)
    first, second = odds[0][pairs], odds[1][pairs]
    if np.ptp(first) == 0 or np.ptp(second) == 0:
        return float("nan")
    return float(np.corrcoef(first, second)[0, 1])


def _quantities(events: pl.DataFrame, code_map: Sequence[Sequence[str]] | None) -> dict[str, np.ndarray]:
    """What is measured of patients and visits, each as an array."""
    kind_of = kind_reader(code_map)
    names = events["code"].unique().to_list()
    kinds = pl.DataFrame(
        {"code": names, "kind": [kind_of(code)[0] for code in names], "class": [kind_of(code)[1] for code in names]},
        schema={"code": pl.String, "kind": pl.String, "class": pl.String},
    )
    micros = pl.col("time").cast(pl.Int64)
    rows = events.filter(pl.col("time").is_not_null()).join(kinds, on="code").with_columns(micros.alias("at"))
    births = rows.filter(pl.col("kind") == "birth").group_by("subject_id").agg(pl.col("at").min().alias("birth"))
    timed = rows.filter(pl.col("kind") != "birth")
    patients = timed.group_by("subject_id").agg(
        pl.col("at").min().alias("first"), pl.col("at").max().alias("last"), pl.len().alias("events"),
        pl.col("visit_id").drop_nulls().n_unique().alias("visits"), (pl.col("kind") == "death").any().alias("dead"),
    ).join(births, on="subject_id", how="left").sort("subject_id")  # fmt: skip
    visits = (
        timed.filter(pl.col("visit_id").is_not_null())
        .group_by("subject_id", "visit_id")
        .agg(
            pl.col("at").min().alias("first"),
            pl.col("at").max().alias("last"),
            pl.len().alias("events"),
            pl.col("class").is_in(["IMP", "ACUTE", "NONAC"]).any().alias("inpatient"),
        )
        .sort("subject_id", "first", "visit_id")
        .with_columns((pl.col("first") - pl.col("last").shift(1).over("subject_id")).alias("gap"))
    )
    hours = (pl.col("last") - pl.col("first")) / HOUR_US

    def column(frame: pl.DataFrame, expression: pl.Expr) -> np.ndarray:
        values: np.ndarray = frame.select(expression.cast(pl.Float64).alias("x"))["x"].drop_nulls().to_numpy()
        return values

    return {
        "age at the first event, years": column(patients, (pl.col("first") - pl.col("birth")) / YEAR_US),
        "length of the record, days": column(patients, (pl.col("last") - pl.col("first")) / DAY_US),
        "events of a patient": column(patients, pl.col("events")),
        "encounters of a patient": column(patients, pl.col("visits")),
        "events of an encounter": column(visits, pl.col("events")),
        "length of an admission, hours": column(visits.filter(pl.col("inpatient").fill_null(value=False)), hours),
        "days between encounters": column(visits.filter(pl.col("gap") > 0), pl.col("gap") / DAY_US),
        "died": column(patients, pl.col("dead")),
    }


def _median(values: np.ndarray) -> float:
    if not len(values):
        return float("nan")
    return float(values.mean()) if set(np.unique(values)) <= {0.0, 1.0} else float(np.median(values))


def _values(events: pl.DataFrame, real: pl.DataFrame) -> tuple[float, float, int]:
    keys = ["code", "unit"]
    groups: list[dict[Any, np.ndarray]] = []
    for table in (events, real):
        rows = table.filter(pl.col("numeric_value").is_not_null()).select(*keys, "numeric_value")
        groups.append(
            {key: part["numeric_value"].to_numpy() for key, part in rows.partition_by(keys, as_dict=True).items()}
        )
    distances = [
        ks_distance(groups[0][key], groups[1][key])
        for key in groups[0]
        if key in groups[1] and min(len(groups[0][key]), len(groups[1][key])) >= _LEAST_VALUES
    ]
    if not distances:
        return float("nan"), float("nan"), 0
    return float(np.median(distances)), float(np.max(distances)), len(distances)


def _known_counts(events: pl.DataFrame, labels: pl.DataFrame) -> pl.DataFrame:
    """Rows (row, code, n) of what each label may know."""
    asked = labels.with_row_index("row").select("row", "subject_id", "prediction_time")
    known = asked.join(events.select("subject_id", "time", "code"), on="subject_id").filter(
        pl.col("time").is_null() | (pl.col("time") <= pl.col("prediction_time"))
    )
    return known.group_by("row", "code").len()


def _frequent(counts: Mapping[str, pl.DataFrame]) -> list[str]:
    total = pl.concat(list(counts.values())).group_by("code").agg(pl.len().alias("rows"))
    return total.sort(["rows", "code"], descending=[True, False]).head(200)["code"].sort().to_list()


def _matrix(counts: pl.DataFrame, rows: int, columns: Sequence[str]) -> np.ndarray:
    place = pl.DataFrame({"code": list(columns), "column": np.arange(len(columns))})
    kept = counts.join(place, on="code")
    matrix = np.zeros((rows, len(columns)), np.float32)
    matrix[kept["row"].to_numpy(), kept["column"].to_numpy()] = np.log1p(kept["len"].to_numpy())
    return matrix


__all__ = ["FidelityReport", "TransferredTask", "fidelity", "ks_distance", "told_apart", "transfer"]
