"""Groups of patients: what they have in common is counted by hand, what few stand behind is not shown."""

import json
import math
from datetime import datetime, timedelta

import numpy as np
import polars as pl
import pytest
from scipy.stats import fisher_exact
from typer.testing import CliRunner

from ehrseq.cli.app import app
from ehrseq.data.schema import validate_events
from ehrseq.data.shards import Shard
from ehrseq.representations.cluster_codes import (
    CodeCounts,
    codes_of_vectors,
    false_discovery_rates,
    group_of,
    over_represented,
)
from ehrseq.representations.clustering import ClusterSettings
from ehrseq.representations.embedding_files import with_vectors
from ehrseq.representations.phenotypes import find_phenotypes

NOW = datetime(2020, 6, 1)
DISEASES = ["DIAGNOSIS//ICD10CM//I50.9", "DIAGNOSIS//ICD10CM//E11.9", "DIAGNOSIS//ICD10CM//J44.9"]
SETTINGS = ClusterSettings(most=5, resamples=2)


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """Three groups of 40 patients, each with its own disease before the time, and a code that all get after it."""
    rng = np.random.default_rng(0)
    group = np.repeat(np.arange(3), 40)
    rows = []
    for subject, own in enumerate(group):
        codes = {DISEASES[own]}
        if rng.random() < 0.3:
            codes.add("DIAGNOSIS//ICD10CM//F32.9")
        rows += [{"subject_id": subject, "time": NOW - timedelta(days=9), "code": code} for code in sorted(codes)]
        rows += [{"subject_id": subject, "time": NOW + timedelta(days=1), "code": DISEASES[(own + 1) % 3]}]
        rows += [{"subject_id": subject, "time": None, "code": "GENDER//F"}]
    vectors = (5 * np.eye(4)[group] + 0.3 * rng.normal(size=(120, 4))).astype(np.float32)
    folder = tmp_path_factory.mktemp("planted")
    table = pl.DataFrame({"subject_id": np.arange(120), "prediction_time": [NOW] * 120})
    with_vectors(table, vectors).write_parquet(folder / "vectors.parquet")
    return folder / "vectors.parquet", validate_events(pl.DataFrame(rows))


def test_planted_groups_are_found_and_described(planted, tmp_path):
    file, events = planted
    report = find_phenotypes(file, events, tmp_path / "out", settings=SETTINGS, permutations=99)
    assert report.clusters["clusters"] == 3
    figures = {(each.name, each.reading): each for each in report.agreement}
    assert figures["purity", "every group"].value == 1.0
    assert all(each.p_value == 0.01 for each in report.agreement if each.reading == "every group")
    codes = report.tables["codes"]
    for disease in DISEASES:  # a cluster has its own disease alone, since what comes later is not read
        of_code = codes.filter(pl.col("code") == disease).sort("share", descending=True)
        assert of_code.select("share", "share_outside").row(0) == (1.0, 0.0)
        assert of_code["low"][0] > 1
    assignments = pl.read_parquet(tmp_path / "out" / "assignments.parquet")
    assert assignments.group_by("cluster").len()["len"].to_list() == [40, 40, 40]
    page = (tmp_path / "out" / "index.html").read_text()
    assert "3 clusters by the mean silhouette of 2 to 5" in page
    assert DISEASES[0] in page
    assert json.loads((tmp_path / "out" / "report.json").read_text())["found"]["clusters"] == 3


def test_what_few_patients_stand_behind_is_not_shown(planted, tmp_path):
    file, events = planted
    whole = find_phenotypes(file, events, tmp_path / "whole", settings=SETTINGS, permutations=1, least_patients=1)
    few = find_phenotypes(file, events, tmp_path / "few", settings=SETTINGS, permutations=1, least_patients=35)
    assert not whole.hidden
    assert any("of a code and a cluster" in line for line in few.hidden)
    assert few.tables["codes"].height < whole.tables["codes"].height
    shown = few.tables["codes"]
    assert (shown["inside"] >= 35).all()
    assert "F32" not in (tmp_path / "few" / "index.html").read_text()
    assert "F32" not in (tmp_path / "few" / "codes.csv").read_text()
    # written twice, the same bytes
    find_phenotypes(file, events, tmp_path / "few", settings=SETTINGS, permutations=1, least_patients=35)
    again = find_phenotypes(file, events, tmp_path / "again", settings=SETTINGS, permutations=1, least_patients=35)
    assert again.to_dict() == few.to_dict()
    for name in ("index.html", "codes.csv", "report.json"):
        assert (tmp_path / "few" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_known_groups_and_patterns(planted, tmp_path):
    file, events = planted
    truth = pl.DataFrame({"subject_id": np.arange(120), "group": np.repeat(["a", "b", "c"], 40)})
    report = find_phenotypes(file, events, tmp_path / "out", settings=SETTINGS, truth=truth, permutations=9)
    assert {each.value for each in report.agreement} == {1.0} | {
        each.value for each in report.agreement if (each.name, each.reading) == ("nmi", "every group")
    }
    report = find_phenotypes(file, events, tmp_path / "sex", settings=SETTINGS, against="GENDER//*", permutations=9)
    assert report.tables["groups"]["group"].to_list() == ["GENDER//F"]


@pytest.mark.parametrize(
    ("code", "kind", "against", "detail", "group"),
    [
        ("DIAGNOSIS//ICD10CM//I50.9", "diagnosis", "diagnosis", "category", "DIAGNOSIS//ICD10CM//I50"),
        ("DIAGNOSIS//ICD10CM//I50.9", "diagnosis", "diagnosis", "chapter", "DIAGNOSIS//ICD10CM//I00-I99"),
        ("DIAGNOSIS//ICD10CM//I50.9", "diagnosis", "diagnosis", "code", "DIAGNOSIS//ICD10CM//I50.9"),
        ("DIAGNOSIS//SNOMED//1", "diagnosis", "diagnosis", "category", "DIAGNOSIS//SNOMED//1"),
        ("LAB//LOINC//1", "lab", "diagnosis", "category", None),
        ("DIAGNOSIS//ICD10CM//I10", "diagnosis", "diagnosis", "category", "DIAGNOSIS//ICD10CM//I10"),
        ("ICU_TYPE//2", "static", "ICU_TYPE//*", "category", "ICU_TYPE//2"),
        ("GENDER//F", "static", "ICU_TYPE//*", "category", None),
    ],
)
def test_the_group_of_a_code(code, kind, against, detail, group):
    assert group_of(code, kind, against, detail) == group


def test_codes_of_a_visit_are_those_within_it(tmp_path):
    day = [datetime(2020, 1, day) for day in range(1, 10)]
    events = pl.DataFrame(
        {
            "subject_id": [1] * 4,
            "time": [day[0], day[2], day[4], None],
            "code": ["LAB//a", "LAB//b", "LAB//c", "GENDER//F"],
        }
    )
    validate_events(events).write_parquet(tmp_path / "events.parquet")
    shard = Shard(str(tmp_path / "events.parquet"), "all", "0")
    visits = pl.DataFrame(
        {
            "subject_id": [1, 1],
            "prediction_time": [day[3]] * 2,
            "visit": [1, 2],
            "start": [day[0], day[2]],
            "end": [day[1], None],
        }
    )
    (pairs,) = codes_of_vectors(visits, [shard])
    assert sorted(pairs.iter_rows()) == [(0, "LAB//a"), (1, "LAB//b")]
    times = pl.DataFrame({"subject_id": [1, 1], "prediction_time": [day[0], day[3]]})
    (pairs,) = codes_of_vectors(times, [shard])
    assert sorted(pairs.iter_rows()) == [
        (0, "GENDER//F"),
        (0, "LAB//a"),
        (1, "GENDER//F"),
        (1, "LAB//a"),
        (1, "LAB//b"),
    ]


def test_patients_are_counted_once_in_and_out_of_a_cluster():
    # patients 1 (clusters 1, 1), 2 (1, 2), 3 (2); the code x is in vectors 0, 1, 3, 4
    counts = CodeCounts(pl.DataFrame({"subject_id": [1, 1, 2, 2, 3]}), np.array([1, 1, 1, 2, 2]))
    counts.add(pl.DataFrame({"row": [0, 1, 3, 4], "code": ["x"] * 4}))
    table = counts.table().select("cluster", "inside", "outside", "patients", "others")
    assert table.rows() == [(1, 1, 2, 2, 2), (2, 2, 1, 2, 2)]


def test_odds_ratios_are_those_of_the_textbook():
    counts = pl.DataFrame(
        {
            "cluster": [1, 1],
            "code": ["x", "y"],
            "inside": [8, 1],
            "outside": [2, 5],
            "patients": [10] * 2,
            "others": [20] * 2,
        }
    )
    table = over_represented(counts)
    a, b, c, d = 8.5, 2.5, 2.5, 18.5
    assert table["odds_ratio"][0] == pytest.approx(a * d / (b * c))
    z = 2.2414027276  # 0.975 + 0.0125 quantile: two intervals together
    error = math.sqrt(1 / a + 1 / b + 1 / c + 1 / d)
    assert table["low"][0] == pytest.approx(math.exp(math.log(a * d / (b * c)) - z * error))
    known = [fisher_exact([[8, 2], [2, 18]], "greater").pvalue, fisher_exact([[1, 9], [5, 15]], "greater").pvalue]
    np.testing.assert_allclose(table["p_value"], known)
    np.testing.assert_allclose(
        false_discovery_rates(np.array([0.01, 0.04, 0.03, 0.2])), [0.04, 0.16 / 3, 0.16 / 3, 0.2]
    )


def test_the_command(planted, tmp_path):
    file, events = planted
    events.write_parquet(tmp_path / "events.parquet")
    command = ["phenotypes", "--embeddings", str(file), "--data", str(tmp_path / "events.parquet"), "--most", "4"]
    command += ["--resamples", "2", "--permutations", "9", "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert "3 clusters of 120 vectors (120 patients)" in done.output


BAD = [
    ({"against": "flu"}, "against got 'flu'"),
    ({"detail": "word"}, "detail got 'word'"),
    ({"least_patients": 0}, "least_patients must"),
    ({"permutations": 0}, "permutations got 0"),
    ({"truth": "nothing.csv"}, "no file nothing.csv"),
    ({"truth": pl.DataFrame({"subject_id": [1]})}, "known groups lack"),
    ({"truth": pl.DataFrame({"subject_id": [777], "group": ["a"]})}, "of none of the patients"),
    ({"settings": ClusterSettings(most=31)}, "try fewer clusters"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_requests_are_refused(planted, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        find_phenotypes(*planted, tmp_path / "out", **{"settings": SETTINGS, **options})
    assert not (tmp_path / "out").exists()


def test_what_would_be_overwritten_and_other_data_are_refused(planted, tmp_path):
    file, events = planted
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="something other than a page"):
        find_phenotypes(file, events, tmp_path, settings=SETTINGS)
    others = events.with_columns(pl.col("subject_id") + 5000)
    with pytest.raises(ValueError, match="120 of the 120 vectors are of patients who are not in these data"):
        find_phenotypes(file, others, tmp_path / "out", settings=SETTINGS)
