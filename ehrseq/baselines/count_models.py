"""Gradient boosting and logistic regression on token counts, one model a task, tuned on the tuning patients.

    model = BoostedCounts(seed=0).fit(train, tuning)           # PromptedDatasets of one task
    risks = model.predict_proba(test)[:, 1]
    model.tried                                                # every configuration with its score on the tuning rows

Training weighs the classes equally, as the paper does; the shift of the log-odds that this makes is taken back, so that
the scores are probabilities.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, logit
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss, roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MaxAbsScaler

from ehrseq.baselines.summary_models import MAX_CONFIGURATIONS, load_xgboost
from ehrseq.baselines.token_counts import count_tokens
from ehrseq.encode.rows import PromptedDataset

BOOSTED_COUNTS_GRID: tuple[dict[str, Any], ...] = tuple(
    {"max_depth": depth, "colsample_bytree": columns} for depth in (5, 3, 8, 2) for columns in (0.5, 0.2)
)
LOGISTIC_COUNTS_GRID: tuple[dict[str, Any], ...] = tuple(
    {"C": strength} for strength in (0.1, 1.0, 0.01, 10.0, 0.03, 0.3, 3.0, 0.003)
)


class _CountModel(ABC):
    """What both have in common: features, tuning, probabilities.

    Attributes:
        columns: Names of the features.
        tried: One entry a configuration: its settings, `auroc` and `log_loss` on the tuning rows.
        chosen: Settings of the fitted model.
    """

    grid: tuple[dict[str, Any], ...] = ()

    def __init__(self, *, num_configurations: int = 4, seed: int = 0, num_threads: int = 1) -> None:
        if isinstance(num_configurations, bool) or not 1 <= num_configurations <= MAX_CONFIGURATIONS:
            raise ValueError(f"num_configurations got {num_configurations!r}; expected 1 to {MAX_CONFIGURATIONS}.")
        self.num_configurations = num_configurations
        self.seed = seed
        self.num_threads = num_threads
        self.columns: list[str] = []
        self.tried: list[dict[str, Any]] = []
        self.chosen: dict[str, Any] = {}
        self._model: Any = None
        self._shift = 0.0

    def fit(self, train: PromptedDataset, tuning: PromptedDataset) -> Any:
        """Fit the first `num_configurations` of the grid on the training rows, keep the one of the largest
        AUROC on the tuning rows (of equal ones, of the least log loss).

        Args:
            train: Rows of one task.
            tuning: Rows of other patients.

        Returns:
            The model itself.

        Raises:
            ValueError: Rows of several tasks, one class only, or patients in both.
        """
        _check(train, tuning)
        features, self.columns = count_tokens(train)
        others, _ = count_tokens(tuning)
        labels, truth = train.labels, tuning.labels
        positives = labels.mean()
        weights = np.where(labels == 1, 0.5 / positives, 0.5 / (1 - positives))
        tuning_weights = np.where(truth == 1, 0.5 / positives, 0.5 / (1 - positives))
        self._shift = -float(logit(positives))
        self.tried, models = [], []
        for settings in self.grid[: self.num_configurations]:
            model = self._fit_one(features, labels, weights, settings, (others, truth, tuning_weights))
            scores = self._probabilities(model, others)
            reached = {"auroc": float(roc_auc_score(truth, scores)), "log_loss": float(log_loss(truth, scores))}
            self.tried.append({**settings, **self._extras(model), **reached})
            models.append(model)
        best = max(range(len(models)), key=lambda i: (self.tried[i]["auroc"], -self.tried[i]["log_loss"]))
        self.chosen = {name: value for name, value in self.tried[best].items() if name not in ("auroc", "log_loss")}
        self._model = models[best]
        return self

    def predict_proba(self, rows: PromptedDataset) -> NDArray[np.float64]:
        """`[n, 2]` probabilities of the negative and the positive outcome.

        Raises:
            ValueError: The model is not fitted, or the rows are of another tokenizer.
        """
        if self._model is None:
            raise ValueError(f"this {type(self).__name__} is not fitted; call fit(train, tuning) first.")
        features, columns = count_tokens(rows)
        if columns != self.columns:
            raise ValueError(
                f"the rows have {len(columns)} features that are not the {len(self.columns)} of the training rows; "
                "encode them with the same tokenizer."
            )
        scores = self._probabilities(self._model, features)
        return np.stack([1 - scores, scores], axis=1)

    def _probabilities(self, model: Any, features: Any) -> NDArray[np.float64]:
        """P(positive), the shift of the class weights taken back."""
        weighted = np.clip(np.asarray(model.predict_proba(features)[:, 1], np.float64), 1e-9, 1 - 1e-9)
        array: np.ndarray = expit(logit(weighted) - self._shift)
        return array

    def _extras(self, model: Any) -> dict[str, Any]:
        return {}

    @abstractmethod
    def _fit_one(
        self, features: Any, labels: NDArray[Any], weights: NDArray[Any], settings: dict[str, Any], tuning: Any
    ) -> Any:
        """Fit one configuration; the tuning rows may tell when to stop."""


class BoostedCounts(_CountModel):
    """XGBoost on token counts; the number of trees is where the weighted log loss of the tuning rows is least.

    Args:
        num_configurations: Configurations of `BOOSTED_COUNTS_GRID` to try, 1 to 8.
        seed: Of the trees.
        num_threads: Threads; more of them change nothing but the time.

    Raises:
        ImportError: xgboost is not installed (`pip install "ehrseq[boosting]"`).
    """

    grid = BOOSTED_COUNTS_GRID
    learning_rate = 0.05
    max_trees = 2000
    patience = 40

    def __init__(self, *, num_configurations: int = 4, seed: int = 0, num_threads: int = 1) -> None:
        super().__init__(num_configurations=num_configurations, seed=seed, num_threads=num_threads)
        load_xgboost()

    def _fit_one(
        self, features: Any, labels: NDArray[Any], weights: NDArray[Any], settings: dict[str, Any], tuning: Any
    ) -> Any:
        others, truth, tuning_weights = tuning
        model = load_xgboost().XGBClassifier(
            **{
                "n_estimators": self.max_trees,
                "learning_rate": self.learning_rate,
                "subsample": 0.8,
                "min_child_weight": 5,
                "tree_method": "hist",
                "n_jobs": self.num_threads,
                "random_state": self.seed,
                "eval_metric": "logloss",
                "early_stopping_rounds": self.patience,
                **settings,
            }
        )
        return model.fit(
            features,
            labels,
            sample_weight=weights,
            eval_set=[(others, truth)],
            sample_weight_eval_set=[tuning_weights],
            verbose=False,
        )

    def _extras(self, model: Any) -> dict[str, Any]:
        return {"n_estimators": int(model.best_iteration) + 1}


class LogisticCounts(_CountModel):
    """Logistic regression on token counts, each the logarithm of one plus it, scaled to its largest training value.

    Args:
        num_configurations: Configurations of `LOGISTIC_COUNTS_GRID` to try, 1 to 8.
        seed: Unused, the fit has no chance in it; every model of a table takes one.
        num_threads: Unused, as above.
    """

    grid = LOGISTIC_COUNTS_GRID

    def _fit_one(
        self, features: Any, labels: NDArray[Any], weights: NDArray[Any], settings: dict[str, Any], tuning: Any
    ) -> Any:
        model = make_pipeline(MaxAbsScaler(), LogisticRegression(**{"max_iter": 1000, **settings}))
        return model.fit(features.log1p(), labels, logisticregression__sample_weight=weights)

    def _probabilities(self, model: Any, features: Any) -> NDArray[np.float64]:
        return super()._probabilities(model, features.log1p())


def _check(train: PromptedDataset, tuning: PromptedDataset) -> None:
    for name, rows in (("training", train), ("tuning", tuning)):
        tasks = np.unique(rows.task_ids)
        if len(tasks) > 1:
            raise ValueError(f"the {name} rows are of {len(tasks)} tasks; fit one model a task (see subset).")
        counts = np.bincount(rows.labels, minlength=2)
        if counts.min() == 0:
            raise ValueError(
                f"the {name} rows hold {counts[1]} positives and {counts[0]} negatives; both classes are needed."
            )
    shared = np.intersect1d(train.subject_ids, tuning.subject_ids)
    if len(shared):
        raise ValueError(f"{len(shared)} patients are in the training and in the tuning rows; split by patient.")


__all__ = ["BOOSTED_COUNTS_GRID", "LOGISTIC_COUNTS_GRID", "BoostedCounts", "LogisticCounts"]
