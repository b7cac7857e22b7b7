"""Splits by patient."""

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ehrseq.data.splits import DEFAULT_FRACTIONS, assign_splits, patients_needed


def test_shares_are_as_asked():
    ids = np.random.default_rng(0).integers(0, 2**62, 100_000)
    shares = assign_splits(ids)["split"].value_counts()
    got = {row["split"]: row["count"] / 100_000 for row in shares.to_dicts()}
    assert got == pytest.approx(DEFAULT_FRACTIONS, abs=0.006)  # 4 standard errors of a share of one half
    consecutive = assign_splits(range(100_000))["split"].value_counts()
    assert {row["split"]: row["count"] / 100_000 for row in consecutive.to_dicts()} == pytest.approx(
        DEFAULT_FRACTIONS, abs=0.006
    )


@given(st.sets(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=50), st.integers(0, 2**40), st.integers(0, 49))
def test_a_subject_keeps_its_split_when_others_join(ids, seed, cut):
    ids = sorted(ids)
    whole = dict(assign_splits(ids, seed=seed).iter_rows())
    part = dict(assign_splits([*ids[:cut], *ids[:cut]] or ids, seed=seed).iter_rows())
    assert all(whole[subject] == split for subject, split in part.items())
    assert sorted(whole) == ids


def test_seeds_differ_and_are_independent():
    ids = list(range(20_000))
    first, second = assign_splits(ids, seed=0)["split"], assign_splits(ids, seed=1)["split"]
    expected = sum(share**2 for share in DEFAULT_FRACTIONS.values())
    assert (first == second).mean() == pytest.approx(expected, abs=0.02)


def test_a_sources_own_splits_are_kept_and_its_train_is_divided():
    source = pl.DataFrame(
        {"subject_id": range(10_000), "split": ["train"] * 8000 + ["tuning"] * 1000 + ["held_out"] * 1000}
    )
    splits = assign_splits(range(10_000), source_splits=source)
    assert splits.filter(pl.col("subject_id") >= 8000).equals(source.filter(pl.col("subject_id") >= 8000))
    train = splits.filter(pl.col("subject_id") < 8000)["split"].value_counts()
    got = {row["split"]: row["count"] / 8000 for row in train.to_dicts()}
    assert got == pytest.approx({"pretrain": 0.57 / 0.79, "train": 0.22 / 0.79}, abs=0.02)


def test_a_source_with_pretrain_is_left_alone_and_new_subjects_are_drawn():
    source = pl.DataFrame({"subject_id": [1, 2], "split": ["pretrain", "train"]})
    splits = dict(assign_splits([1, 2, 3], source_splits=source).iter_rows())
    assert (splits[1], splits[2]) == ("pretrain", "train")
    assert splits[3] == dict(assign_splits([3]).iter_rows())[3]


@pytest.mark.parametrize(
    ("ids", "options", "message"),
    [
        ([1], {"fractions": {"a": 0.5}}, "sum to 1"),
        ([1], {"fractions": {"a": 1.5, "b": -0.5}}, "non-negative"),
        ([1], {"fractions": {}}, "sum to 1"),
        (["a"], {}, "must be integers"),
        ([1.5], {}, "must be integers"),
        ([1, None], {}, "without nulls"),
        ([1], {"source_splits": pl.DataFrame({"subject_id": [1, 1], "split": ["a", "b"]})}, "two splits"),
    ],
)
def test_bad_input(ids, options, message):
    with pytest.raises(ValueError, match=message):
        assign_splits(ids, **options)


def test_no_subjects():
    assert assign_splits([]).is_empty()


def test_so_many_patients_leave_no_split_empty():
    assert patients_needed() == 75  # 0.94^75 < 0.01 < 0.94^74
    assert patients_needed({"a": 0.5, "b": 0.5, "none": 0.0}, certainty=0.9) == 5  # 2 / 2^5 < 0.1
    assert patients_needed({"all": 1.0}) == 1
    for certainty in (0, 1, -0.5):
        with pytest.raises(ValueError, match="certainty must lie between 0 and 1"):
            patients_needed(certainty=certainty)
    splits = [assign_splits(range(75), seed=seed)["split"].n_unique() for seed in range(200)]
    assert splits.count(4) >= 195


@pytest.mark.parametrize(
    ("subjects", "options", "message"),
    [
        (5, {}, "subject_ids got int; expected integers"),
        ([1], {"fractions": [0.5, 0.5]}, "fractions got list; expected a mapping"),
        ([1], {"fractions": {"a": "x"}}, "must be numbers from 0 to 1, got {'a': 'x'}"),
        ([1], {"fractions": {"a": float("nan")}}, "must be numbers from 0 to 1"),
        ([1], {"seed": "a"}, "seed got 'a'; expected an integer"),
        ([1], {"source_splits": pl.DataFrame({"a": [1]})}, r"source_splits got \['a'\]; expected"),
        ([1], {"source_splits": {1: "train"}}, "source_splits got dict; expected"),
    ],
)
def test_arguments_of_a_wrong_type_are_refused(subjects, options, message):
    with pytest.raises(ValueError, match=message):
        assign_splits(subjects, **options)
