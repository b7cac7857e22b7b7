"""Planted clusters are found, in their number too; what means nothing looks like chance."""

import numpy as np
import pytest
from sklearn.metrics import normalized_mutual_info_score

from ehrseq.representations.agreement import (
    agreements,
    first_groups,
    group_information,
    multi_purity,
    mutual_information,
    purity,
)
from ehrseq.representations.clustering import ClusterSettings, find_clusters


def planted(number, each=40, size=6, seed=0, spread=0.3):
    rng = np.random.default_rng(seed)
    centres = 4 * np.eye(size)[:number]
    truth = np.repeat(np.arange(number), each)
    order = rng.permutation(len(truth))
    truth = truth[order]
    return centres[truth] + spread * rng.normal(size=(len(truth), size)), truth


@pytest.mark.parametrize("method", ["kmeans", "gaussian_mixture"])
@pytest.mark.parametrize("number", [3, 5])
def test_planted_clusters_are_found_and_stable(method, number):
    vectors, truth = planted(number)
    settings = ClusterSettings(method, most=6, resamples=3, max_components=number - 1)
    found = find_clusters(vectors, np.arange(len(truth)), settings)
    assert found.number == number == found.table.filter("chosen")["clusters"].item()
    assert mutual_information(found.labels, truth) > 0.95  # columns of noise weigh as much as the others
    assert found.stability.mean > 0.9 > 0.75 > found.stability.no_groups


def test_labels_begin_with_the_largest_cluster():
    vectors, truth = planted(3)
    kept = np.flatnonzero((truth > 0) | (np.cumsum(truth == 0) <= 15))
    found = find_clusters(vectors[kept], kept, ClusterSettings(most=4, resamples=1))
    sizes = np.bincount(found.labels)[1:]
    assert sizes.tolist() == sorted(sizes.tolist(), reverse=True)
    again = find_clusters(vectors[kept], kept, ClusterSettings(most=4, resamples=1))
    assert (again.labels == found.labels).all()
    assert again.to_dict() == found.to_dict()


def test_constant_columns_are_left_out_and_told():
    vectors, truth = planted(2)
    found = find_clusters(np.hstack([vectors, np.ones((len(truth), 2))]), truth * 1000 + np.arange(len(truth)))
    assert found.constant == 2


def test_purity_and_information_are_those_of_the_definitions():
    rng = np.random.default_rng(0)
    clusters, groups = rng.integers(1, 5, 200), rng.integers(0, 3, 200)
    leading = sum(np.bincount(groups[clusters == each]).max() for each in range(1, 5))
    assert purity(clusters, groups) == leading / 200
    assert mutual_information(clusters, groups) == pytest.approx(normalized_mutual_info_score(groups, clusters))
    has = rng.random((200, 4)) < 0.3
    known = [normalized_mutual_info_score(column, clusters) for column in has.T]
    np.testing.assert_allclose(group_information(clusters, has), known, atol=1e-12)
    leading = sum(has[clusters == each].sum(0).max() for each in range(1, 5))
    assert multi_purity(clusters, has) == leading / 200


def test_the_first_group_is_the_rarest():
    groups = np.array([[1, 1, 0], [1, 0, 0], [1, 0, 1], [0, 0, 1], [0, 0, 0]], bool)
    assert first_groups(groups).tolist() == [1, 0, 2, 2, -1]


def test_clusters_that_mean_nothing_agree_as_chance_does():
    rng = np.random.default_rng(1)
    subjects = np.repeat(np.arange(150), 2)
    groups = np.repeat(rng.random((150, 3)) < 0.3, 2, axis=0)  # of the patient, not of the vector
    clusters = np.repeat(rng.integers(1, 4, 150), 2)
    for found in agreements(clusters, groups, subjects, permutations=99):
        assert found.p_value > 0.05
        assert found.value <= found.chance_high + 0.02
    known = np.where(groups[:, 0], 1, 2)
    best = {(a.name, a.reading): a for a in agreements(known, groups[:, :1], subjects, permutations=99)}
    assert best["nmi", "every group"].value == pytest.approx(1.0)
    assert best["nmi", "every group"].p_value == 0.01


def test_chance_keeps_the_vectors_of_a_patient_together():
    """Of ten patients with thirty vectors each, chance is wide: permuted rows would call everything significant."""
    rng = np.random.default_rng(2)
    subjects = np.repeat(np.arange(10), 30)
    groups = np.repeat(rng.random((10, 1)) < 0.5, 30, axis=0)
    clusters = np.repeat(rng.integers(1, 3, 10), 30)
    found = {(a.name, a.reading): a for a in agreements(clusters, groups, subjects, permutations=99)}
    assert found["nmi", "every group"].p_value > 0.05


def test_no_group_no_figure():
    assert agreements(np.ones(4, int), np.zeros((4, 2), bool), np.arange(4)) == []


BAD = [
    ({"method": "dbscan"}, "method got 'dbscan'"),
    ({"fewest": 1}, "begins at 2"),
    ({"fewest": 5, "most": 4}, "begins at 2"),
    ({"variance": 0.0}, "variance got"),
    ({"resamples": 0}, "resamples 0"),
]


@pytest.mark.parametrize(("settings", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ClusterSettings(**settings)


def test_what_cannot_be_clustered_is_refused():
    with pytest.raises(ValueError, match="vectors of 20 patients"):
        find_clusters(np.random.default_rng(0).normal(size=(40, 3)), np.repeat(np.arange(20), 2))
    with pytest.raises(ValueError, match="are the same"):
        find_clusters(np.ones((50, 3)), np.arange(50))
    with pytest.raises(ValueError, match="have the shapes"):
        agreements(np.ones(4, int), np.zeros((3, 2), bool), np.arange(4))
