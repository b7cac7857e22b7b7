"""Gradient boosting and logistic regression on summary statistics, tuned inside the training stays alone.

    model = BoostedSummaries(seed=0).fit(train)                # a TripletTable with labels
    risks = model.predict_proba(test)[:, 1]
    model.tried                                                # every configuration with its cross-validated scores

At most eight configurations are compared, each by its predictions for the left-out folds (folds by subject), and the
one with the largest AUROC + AUPRC is fitted on all training stays: the same budget as the neural models have.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, roc_auc_score
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from ehrseq.baselines.summary_statistics import summarise
from ehrseq.encode.triplets import TripletTable

MAX_CONFIGURATIONS = 8
"""Configurations that a baseline may compare: the tuning budget of every model in a table."""

BOOSTING_GRID: tuple[dict[str, Any], ...] = tuple(
    {"max_depth": depth, "colsample_bytree": columns, "min_child_weight": weight}
    for depth in (2, 3, 4, 5)
    for columns, weight in ((0.2, 5), (0.5, 10))
)
LOGISTIC_GRID: tuple[dict[str, Any], ...] = tuple(
    {"C": strength} for strength in (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
)


class _SummaryModel(ABC):
    """What both have in common: features, tuning by cross-validation, probabilities.

    Attributes:
        columns: Names of the features.
        tried: One entry a configuration: its settings, `auroc` and `auprc` over the left-out folds.
        chosen: Settings of the fitted model.
    """

    grid: tuple[dict[str, Any], ...] = ()

    def __init__(self, *, grid: Any = None, num_folds: int = 5, seed: int = 0) -> None:
        self.grid = type(self).grid if grid is None else tuple(dict(settings) for settings in grid)
        if not 1 <= len(self.grid) <= MAX_CONFIGURATIONS:
            raise ValueError(f"grid got {len(self.grid)} configurations; expected 1 to {MAX_CONFIGURATIONS}.")
        if isinstance(num_folds, bool) or not isinstance(num_folds, int) or num_folds < 2:
            raise ValueError(f"num_folds got {num_folds!r}; expected an integer of at least 2.")
        self.num_folds = num_folds
        self.seed = seed
        self.columns: list[str] = []
        self.tried: list[dict[str, Any]] = []
        self.chosen: dict[str, Any] = {}
        self._model: Any = None

    def fit(self, table: TripletTable) -> Any:
        """Choose a configuration by cross-validation and fit it on all stays of the table.

        Args:
            table: Training stays with labels. Nothing else is looked at.

        Returns:
            The model itself.

        Raises:
            ValueError: No labels, one class only, or fewer stays of a class than folds.
        """
        if table.labels is None:
            raise ValueError("the training stays have no labels; build them with build_triplets(events, spec, labels).")
        labels = table.labels
        counts = np.bincount(labels, minlength=2)
        if counts.min() < self.num_folds:
            raise ValueError(
                f"the training stays hold {counts[1]} positives and {counts[0]} negatives; {self.num_folds} folds need "
                "as many of each."
            )
        features, self.columns = summarise(table)
        folds = StratifiedGroupKFold(self.num_folds, shuffle=True, random_state=self.seed)
        splits = list(folds.split(features, labels, table.subject_ids))
        self.tried = []
        extras: list[dict[str, Any]] = []
        for settings in self.grid:
            scores = np.full(len(labels), np.nan)
            rounds = []
            for inside, outside in splits:
                model = self._fit_one(features[inside], labels[inside], settings, (features[outside], labels[outside]))
                scores[outside] = model.predict_proba(features[outside])[:, 1]
                rounds.append(self._rounds_of(model))
            self.tried.append(
                {
                    **settings,
                    "auroc": float(roc_auc_score(labels, scores)),
                    "auprc": float(average_precision_score(labels, scores)),
                }
            )
            extras.append({"n_estimators": round(np.mean(rounds))} if all(rounds) else {})
        best = int(np.argmax([entry["auroc"] + entry["auprc"] for entry in self.tried]))
        self.chosen = {**self.grid[best], **extras[best]}
        self._model = self._fit_one(features, labels, self.chosen, None)
        return self

    def predict_proba(self, table: TripletTable) -> NDArray[np.float64]:
        """`[s, 2]` probabilities of the negative and the positive outcome.

        Raises:
            ValueError: The model is not fitted, or the table has other features.
        """
        if self._model is None:
            raise ValueError(f"this {type(self).__name__} is not fitted; call fit(training stays) first.")
        features, columns = summarise(table)
        if columns != self.columns:
            raise ValueError(
                f"the table has {len(columns)} features that are not the {len(self.columns)} of the training stays; "
                "build it with the same TripletSpec."
            )
        return np.asarray(self._model.predict_proba(features), np.float64)

    @abstractmethod
    def _fit_one(
        self,
        features: NDArray[np.float32],
        labels: NDArray[np.int64],
        settings: dict[str, Any],
        left_out: tuple[NDArray[np.float32], NDArray[np.int64]] | None,
    ) -> Any:
        """Fit one configuration; what was left out may tell when to stop."""

    def _rounds_of(self, model: Any) -> int:
        return 0


class BoostedSummaries(_SummaryModel):
    """XGBoost on summary statistics. The number of trees is where the log loss of the left-out folds is least.

    Args:
        grid: At most eight settings of `xgboost.XGBClassifier`; default `BOOSTING_GRID`.
        num_folds: Folds of the cross-validation.
        seed: Of the folds and of the trees.
        num_threads: Threads; more of them change nothing but the time.

    Raises:
        ImportError: xgboost is not installed (`pip install "ehrseq[boosting]"`).
    """

    grid = BOOSTING_GRID
    learning_rate = 0.03
    max_trees = 2000
    patience = 50

    def __init__(self, *, grid: Any = None, num_folds: int = 5, seed: int = 0, num_threads: int = 1) -> None:
        super().__init__(grid=grid, num_folds=num_folds, seed=seed)
        self.num_threads = num_threads
        load_xgboost()

    def _fit_one(
        self,
        features: NDArray[np.float32],
        labels: NDArray[np.int64],
        settings: dict[str, Any],
        left_out: tuple[NDArray[np.float32], NDArray[np.int64]] | None,
    ) -> Any:
        model = load_xgboost().XGBClassifier(
            **{
                "n_estimators": self.max_trees,
                "learning_rate": self.learning_rate,
                "subsample": 0.8,
                "reg_lambda": 5.0,
                "tree_method": "hist",
                "n_jobs": self.num_threads,
                "random_state": self.seed,
                "eval_metric": "logloss",
                "early_stopping_rounds": None if left_out is None else self.patience,
                **settings,
            }
        )
        return model.fit(features, labels, eval_set=None if left_out is None else [left_out], verbose=False)

    def _rounds_of(self, model: Any) -> int:
        return int(model.best_iteration) + 1


class LogisticSummaries(_SummaryModel):
    """Logistic regression on summary statistics: clipped to the training percentiles, missing ones at the median.

    Args:
        grid: At most eight settings of `sklearn.linear_model.LogisticRegression`; default `LOGISTIC_GRID`.
        num_folds: Folds of the cross-validation.
        seed: Of the folds.
    """

    grid = LOGISTIC_GRID

    def _fit_one(
        self,
        features: NDArray[np.float32],
        labels: NDArray[np.int64],
        settings: dict[str, Any],
        left_out: tuple[NDArray[np.float32], NDArray[np.int64]] | None,
    ) -> Any:
        model = make_pipeline(
            _Clip(),
            SimpleImputer(strategy="median", keep_empty_features=True),
            StandardScaler(),
            LogisticRegression(**{"max_iter": 2000, **settings}),
        )
        return model.fit(features, labels)


class _Clip(TransformerMixin, BaseEstimator):
    """Values within the training 1 and 99 percentiles of their column; NaN stays."""

    def fit(self, features: NDArray[np.float32], labels: Any = None) -> _Clip:
        empty = np.isnan(features).all(axis=0)
        bounds = np.nanpercentile(np.where(empty, 0.0, features), (1, 99), axis=0)
        self.lower_, self.upper_ = bounds
        return self

    def transform(self, features: NDArray[np.float32]) -> NDArray[np.float64]:
        return np.clip(features, self.lower_, self.upper_)


def load_xgboost() -> Any:
    """The module xgboost.

    Raises:
        ImportError: It is not installed; the message names the extra.
    """
    try:
        import xgboost
    except ImportError as error:
        raise ImportError(
            'gradient boosting needs xgboost, which is not installed: pip install "ehrseq[boosting]".'
        ) from error
    return xgboost
