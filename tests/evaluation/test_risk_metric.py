"""The Hugging Face `evaluate` module: as a file, offline, and as a class."""

import pytest

from ehrseq.evaluation import assess, ehr_risk_path
from ehrseq.evaluation.risk_metric import EhrRisk
from tests.evaluation.tables import scored_table


@pytest.mark.parametrize("way", ["class", "file"])
def test_it_gives_what_the_package_gives(way, tmp_path, monkeypatch):
    import evaluate

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    options = {"cache_dir": str(tmp_path)}
    metric = EhrRisk(**options) if way == "class" else evaluate.load(ehr_risk_path(), **options)
    table = scored_table(300)
    found = metric.compute(
        predictions=table["score"].to_list(),
        references=table["label"].cast(int).to_list(),
        subject_ids=table["subject_id"].to_list(),
        num_resamples=20,
    )
    expected = assess(table, "t", threshold=0.5, num_resamples=20)
    for name, interval in expected.metrics.items():
        assert (found[name], found[f"{name}_low"], found[f"{name}_high"]) == pytest.approx(
            (interval.value, interval.low, interval.high)
        )
    assert found["not_estimable"] == {}


def test_one_class_is_not_estimable(tmp_path):
    found = EhrRisk(cache_dir=str(tmp_path)).compute(predictions=[0.1, 0.2], references=[0, 0], num_resamples=5)
    assert found["auroc"] is None
    assert found["not_estimable"]["auroc"] == "0 positives (needs 20)"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"references": [0, 2]}, "references must be 0 or 1"),
        ({"predictions": [0.1, 1.2]}, r"in \[0, 1\]"),
        ({"subject_ids": [1]}, "subject_ids has 1 entries, references 2"),
    ],
)
def test_bad_input_is_told(tmp_path, given, message):
    metric = EhrRisk(cache_dir=str(tmp_path))
    with pytest.raises(ValueError, match=message):
        metric.compute(**{"predictions": [0.1, 0.2], "references": [0, 1], **given})
