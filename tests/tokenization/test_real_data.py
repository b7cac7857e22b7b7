"""The MIMIC-IV demo as MEDS: no row is lost on the subjects that were fitted, and both paths agree on the others."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from ehrseq.data import read_meds
from ehrseq.tokenization.ehr_plans import CHANNELS
from ehrseq.tokenization.tokenization_ehr import EhrTokenizer


@pytest.fixture(scope="module")
def demo(ehr_data: Path) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Events of the training subjects, and of the others."""
    folder = ehr_data / "mimic-iv-demo-meds" / "0.0.1"
    events = read_meds(folder)
    splits = pl.read_parquet(folder / "metadata" / "subject_splits.parquet")
    train = splits.filter(pl.col("split") == "train")["subject_id"].implode()
    is_train = pl.col("subject_id").is_in(train)
    return events.filter(is_train), events.filter(~is_train)


@pytest.fixture(scope="module")
def tokenizer(demo: tuple[pl.DataFrame, pl.DataFrame]) -> EhrTokenizer:
    return EhrTokenizer.train(demo[0], tasks=["mortality_30d"])


def test_no_row_is_lost_on_the_fitted_subjects(tokenizer: EhrTokenizer, demo) -> None:
    coverage = tokenizer.coverage(demo[0])
    assert coverage["lost_events"] == 0
    assert coverage["exact"] > 0.95
    histories = tokenizer.encode_histories(demo[0])
    assert not (histories.ids == tokenizer.unk_token_id).any()
    assert not (histories.static_ids == tokenizer.unk_token_id).any()


def test_little_is_lost_on_unseen_subjects(tokenizer: EhrTokenizer, demo) -> None:
    coverage = tokenizer.coverage(demo[1])
    assert coverage["lost"] < 0.01
    assert coverage["exact"] > 0.9


def test_both_paths_agree(tokenizer: EhrTokenizer, demo) -> None:
    events = demo[1]
    rows = {row["subject_id"]: row for row in tokenizer.encode_table(events).to_pylist()}
    subjects = events.group_by("subject_id").len().sort("len", "subject_id")["subject_id"].to_list()[:12]
    for subject in subjects:
        alone = tokenizer.encode_patient(events.filter(pl.col("subject_id") == subject))
        for name in CHANNELS:
            expected = np.asarray(rows[subject][name], alone[name].dtype)
            np.testing.assert_array_equal(alone[name], expected, err_msg=f"{subject} {name}")


def test_every_event_is_in_one_window(tokenizer: EhrTokenizer, demo) -> None:
    histories = tokenizer.encode_histories(demo[1])
    windows = histories.windows(512)
    assert windows.lengths.max() <= 512
    kinds = [windows[k]["token_type_ids"] for k in range(len(windows))]
    events = sum(int(((kind >= 5) & (kind != 8) & (kind != 12)).sum()) for kind in kinds)
    assert events == int(((histories.types >= 5) & (histories.types != 8)).sum())
