"""Copied runs against a search by hand; attacks where everything and where nothing has leaked."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest

from ehrseq.data.simulate.cohort import simulate
from ehrseq.forecasting.copies import (
    EventRuns,
    RunIndex,
    allowed_run,
    attack,
    nearest_distances,
    read_runs,
    run_lengths,
)
from ehrseq.forecasting.patient_counts import PatientCounts


def runs(*sequences: list[int]) -> EventRuns:
    return EventRuns(
        np.concatenate([np.asarray(sequence, np.int64) for sequence in sequences]),
        np.cumsum([0, *map(len, sequences)]),
    )


def naive_longest(query: list[int], sequences: list[list[int]]) -> int:
    def texts(sequence: list[int], length: int) -> set[tuple[int, ...]]:
        return {tuple(sequence[k : k + length]) for k in range(len(sequence) - length + 1)}

    best = 0
    for length in range(1, len(query) + 1):
        known = set().union(*(texts(sequence, length) for sequence in sequences))
        if texts(query, length) & known:
            best = length
    return best


@pytest.mark.parametrize("seed", range(6))
def test_the_longest_run_is_that_of_a_search_by_hand(seed: int) -> None:
    random = np.random.default_rng(seed)
    indexed = [random.integers(0, 3, random.integers(0, 40)).tolist() for _ in range(8)]
    queries = [random.integers(0, 3, random.integers(0, 60)).tolist() for _ in range(10)]
    queries.append(indexed[0] + indexed[1])  # nobody's record is two records
    found = RunIndex(runs(*indexed)).longest(runs(*queries))
    assert found.tolist() == [naive_longest(query, indexed) for query in queries]


def test_a_planted_copy_is_found_with_its_length(tmp_path) -> None:  # type: ignore[no-untyped-def]
    random = np.random.default_rng(0)
    trained = [random.integers(0, 500, 400).tolist() for _ in range(50)]
    clean, planted = random.integers(0, 500, 300).tolist(), random.integers(0, 500, 300).tolist()
    planted[100:137] = trained[7][200:237]
    planted[99], planted[137] = 500, 501  # so that the run is no longer by chance
    runs(*trained).write(tmp_path / "runs.npz")
    found = read_runs(str(tmp_path / "runs.npz")).longest(runs(clean, planted))
    assert found[0] <= 3
    assert found[1] == 37


def test_nothing_is_shared_with_nobody() -> None:
    assert RunIndex(runs([])).longest(runs([1, 2], [])).tolist() == [0, 0]
    assert run_lengths(np.zeros(0, np.int64)) == {}


def test_the_allowed_run_is_what_held_out_patients_share() -> None:
    natural = np.asarray([5] * 98 + [60, 300])
    assert allowed_run(natural) == 60
    assert allowed_run(np.asarray([3, 4])) == 20
    assert allowed_run(natural, 8) == 8
    for wrong in (0, -1, 2.5, True):
        with pytest.raises(ValueError, match="expected a number of events from 1 on"):
            allowed_run(natural, wrong)  # type: ignore[arg-type]


def test_nearest_distances() -> None:
    vectors, others = np.asarray([[0.0, 0.0], [3.0, 4.0]]), np.asarray([[0.0, 1.0], [3.0, 4.0]])
    assert nearest_distances(vectors, others, 2).tolist() == [[1.0, 5.0], [0.0, pytest.approx(18**0.5)]]
    assert nearest_distances(vectors, vectors[:1], 2)[:, 1].tolist() == [np.inf, np.inf]


@pytest.fixture(scope="module")
def cohorts() -> list[PatientCounts]:
    """Three cohorts of equal kind."""
    events = simulate(360, seed=5, progress=False).events()
    parts = [events.filter((pl.col("subject_id") - 1) // 120 == part) for part in range(3)]
    return [PatientCounts.of(part) for part in parts]


def test_attacks_on_copies_succeed(cohorts) -> None:  # type: ignore[no-untyped-def]
    trained, held_out, _ = cohorts
    found = attack(trained, trained, held_out)
    assert found.nearest_training == 0.0
    assert found.closer_to_training == 1.0
    assert found.distance_ratio == 0.0
    assert found.membership == 1.0
    assert found.attribute > found.attribute_held_out + 0.1


def test_attacks_on_other_patients_fail(cohorts) -> None:  # type: ignore[no-untyped-def]
    trained, held_out, others = cohorts
    found = attack(others, trained, held_out)
    assert found.membership == pytest.approx(0.5, abs=0.08)  # two standard errors of 120 against 120: 0.075
    assert found.natural_membership == pytest.approx(0.5, abs=0.1)
    assert found.closer_to_training == pytest.approx(0.5, abs=0.12)
    assert found.distance_ratio > 0.9
    assert abs(found.attribute - found.attribute_held_out) < 0.1


def test_too_few_patients_are_refused(cohorts) -> None:  # type: ignore[no-untyped-def]
    trained, held_out, _ = cohorts
    with pytest.raises(ValueError, match="at least 4 held-out patients, got 2"):
        attack(trained, trained, held_out.subset(np.arange(2)))
