"""How long does it take to evaluate a task's predictions with all their intervals?

`assess` (discrimination, calibration, decisions; every metric with its interval) of 10,000 predictions of 4,000
patients under 1,000 bootstrap resamples, beside what it costs to compute the same seven metrics once with scikit-learn.

    python -m benchmarks.speed.bench_evaluation --output runs/bench/evaluation.json
"""

from datetime import datetime

import numpy as np
import polars as pl
from sklearn.calibration import calibration_curve
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, brier_score_loss, f1_score, roc_auc_score

from benchmarks.harness import benchmark_parser, finish, in_turns
from ehrseq.evaluation import assess

SECONDS_BAR = 10.0


def predictions(rows: int, patients: int) -> pl.DataFrame:
    """Calibrated scores of rows of some patients."""
    rng = np.random.default_rng(0)
    p = 1 / (1 + np.exp(-rng.normal(-2, 1.2, rows)))
    return pl.DataFrame(
        {
            "subject_id": rng.integers(0, patients, rows),
            "prediction_time": [datetime(2024, 1, 1)] * rows,
            "label": rng.random(rows) < p,
            "score": p,
        }
    )


def once(table: pl.DataFrame) -> None:
    """The metrics without an interval, by scikit-learn."""
    y, p = table["label"].to_numpy(), table["score"].to_numpy()
    for metric in (roc_auc_score, average_precision_score, brier_score_loss):
        metric(y, p)
    f1_score(y, p >= 0.5)
    calibration_curve(y, p, n_bins=10, strategy="quantile")
    LogisticRegression(C=np.inf).fit(np.log(p / (1 - p))[:, None], y)


def main() -> None:
    """Measure, print and, if asked, write the result."""
    parser = benchmark_parser(__doc__ or "", repeats=5)
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--patients", type=int, default=4_000)
    parser.add_argument("--resamples", type=int, default=1_000)
    options = parser.parse_args()
    table = predictions(options.rows, options.patients)
    costs = in_turns(
        {
            "all intervals": lambda: assess(table, "task", threshold=0.5, num_resamples=options.resamples),
            "scikit-learn, once": lambda: once(table),
        },
        options.repeats,
        calls={"scikit-learn, once": 5},
    )
    every, single = costs["all intervals"], costs["scikit-learn, once"]
    result = {
        "rows": options.rows,
        "patients": options.patients,
        "resamples": options.resamples,
        "cpu_seconds": {name: cost.cpu for name, cost in costs.items()},
        "wall_seconds": {name: cost.wall for name, cost in costs.items()},
        "times_the_metrics_once": every.cpu / single.cpu,
        "share_of_a_loop_over_scikit_learn": every.cpu / (single.cpu * options.resamples),
        "bar_seconds": SECONDS_BAR,
        "met": every.cpu <= SECONDS_BAR,
    }
    finish(result, options.output)


if __name__ == "__main__":
    main()
