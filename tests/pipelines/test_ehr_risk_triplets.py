"""`pipeline("ehr-risk")` on a checkpoint that reads triplets: patients in, one probability each."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, pipeline

from ehrseq.data import load_physionet2012
from ehrseq.data.physionet2012.codes import TASK
from ehrseq.data.simulate.stays import simulate_stays
from ehrseq.encode.triplets import PHYSIONET2012, build_triplets
from ehrseq.modeling.configuration_hymate import HyMaTEConfig
from ehrseq.modeling.modeling_hymate import HyMaTEForSequenceClassification
from ehrseq.tokenization.feature_extraction_hymate import HyMaTEFeatureExtractor


@pytest.fixture(scope="module")
def challenge(tmp_path_factory):
    loaded = load_physionet2012(simulate_stays(12, seed=4).write(tmp_path_factory.mktemp("stays")))
    return loaded, build_triplets(loaded.events, PHYSIONET2012, loaded.labels)


@pytest.fixture(scope="module")
def checkpoint(challenge, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    config = HyMaTEConfig(hidden_size=16, num_mamba_layers=1, num_labels=2, tasks=[{"name": TASK}])
    HyMaTEForSequenceClassification(config).save_pretrained(folder)
    HyMaTEFeatureExtractor.fit(challenge[1]).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("batch_size", [1, 5])
def test_patients_get_the_scores_of_their_triplets(challenge, checkpoint, batch_size):
    loaded, built = challenge
    patients = []
    for subject in built.subject_ids.tolist():
        rows = loaded.events.filter(loaded.events["subject_id"] == subject).drop("subject_id").to_dicts()
        patients.append({"subject_id": subject, "events": rows})
    risk = pipeline("ehr-risk", model=str(checkpoint), device="cpu")
    answers = risk(patients, batch_size=batch_size)
    extractor, model = risk.feature_extractor, AutoModelForSequenceClassification.from_pretrained(checkpoint)
    with torch.no_grad():
        inputs = extractor([built.row(k) for k in range(len(built))], padding=True, return_tensors="pt")
        expected = model.eval()(**inputs).logits.softmax(-1)[:, 1]
    assert [answer[0]["task"] for answer in answers] == [TASK] * len(built)
    np.testing.assert_allclose([answer[0]["score"] for answer in answers], expected, atol=1e-5)
    one = risk(patients[0])
    assert one[0]["score"] == pytest.approx(answers[0][0]["score"], abs=1e-5)


def test_a_patient_without_triplets_is_an_error(challenge, checkpoint):
    admission = {"time": "2012-01-01T00:00", "code": "VISIT_START//ICU"}
    with pytest.raises(ValueError, match="subject 5 holds no triplet"):
        pipeline("ehr-risk", model=str(checkpoint), device="cpu")({"subject_id": 5, "events": [admission]})
