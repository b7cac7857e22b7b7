"""Tables of labels and scores for the tests of evaluation."""

from datetime import datetime, timedelta

import numpy as np
import polars as pl

START = datetime(2020, 1, 1)


def scored_table(n=800, patients=300, seed=0):
    """subject_id, prediction_time, label, score: calibrated scores of rows of some patients, over four years."""
    rng = np.random.default_rng(seed)
    x = rng.normal(-0.5, 1.2, n)
    subjects = np.sort(rng.integers(1, patients + 1, n))
    times = [START + timedelta(hours=int(hour)) for hour in rng.permutation(4 * 8760)[:n]]
    p = 1 / (1 + np.exp(-x))
    return pl.DataFrame(
        {"subject_id": subjects, "prediction_time": times, "label": rng.random(n) < p, "score": p}
    ).sort("subject_id", "prediction_time")
