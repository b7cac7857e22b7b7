"""The figures that HyMaTE is held against, on the real sets: boosting, logistic regression, carrying the last value."""

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score

from ehrseq.baselines import BoostedSummaries, LogisticSummaries
from ehrseq.batches.triplet_rows import ForecastRows, forecast_baselines
from ehrseq.data import load_physionet2012
from ehrseq.encode.triplets import PHYSIONET2012, build_triplets
from ehrseq.tokenization.feature_extraction_hymate import HyMaTEFeatureExtractor

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def sets(ehr_data):
    loaded = load_physionet2012(ehr_data / "physionet2012")
    built = build_triplets(loaded.events, PHYSIONET2012, loaded.labels)
    assert len(built) == 7991  # nine stays have no series
    splits = loaded.splits_by_set()
    return {name: built.of_subjects(splits.filter(splits["split"] == f"set-{name}")["subject_id"]) for name in "ab"}


@pytest.mark.parametrize(
    ("train", "test", "boosting", "logistic"),
    [("b", "a", (0.862, 0.515), (0.850, 0.510)), ("a", "b", (0.867, 0.542), (0.863, 0.550))],
)
def test_models_on_summaries(sets, train, test, boosting, logistic):
    grid = [{"max_depth": 3, "colsample_bytree": 0.2, "min_child_weight": 5}]
    for model, (auroc, auprc) in (
        (BoostedSummaries(grid=grid, num_folds=3), boosting),
        (LogisticSummaries(grid=[{"C": 3e-3}]), logistic),
    ):
        risks = model.fit(sets[train]).predict_proba(sets[test])[:, 1]
        assert roc_auc_score(sets[test].labels, risks) > auroc
        assert average_precision_score(sets[test].labels, risks) > auprc
        assert abs(risks.mean() - sets[test].labels.mean()) < 0.012


@pytest.mark.parametrize(("train", "test"), [("b", "a"), ("a", "b")])
def test_carrying_the_last_value_forward(sets, train, test):
    extractor = HyMaTEFeatureExtractor.fit(sets[train])
    found = forecast_baselines(ForecastRows(sets[test], extractor, epochs=1))
    assert 0.40 < found["last_value"] < 0.47
    assert 0.84 < found["mean"] < 0.90
    assert np.isfinite(found["targets"])
