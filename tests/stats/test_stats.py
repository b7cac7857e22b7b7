"""`ehrseq stats`: counts of a naive pass over the whole table, a page that needs nothing else, few patients hidden."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from html.parser import HTMLParser
from pathlib import Path

import polars as pl
import pytest
from polars.testing import assert_frame_equal
from typer.testing import CliRunner

from ehrseq.cli.app import app
from ehrseq.data import EventDataset, write_dataset
from ehrseq.data.shards import BLOCK_ROWS, dataset_shards, read_blocks
from ehrseq.data.simulate.cohort import simulate
from ehrseq.prepare import prepare_dataset
from ehrseq.stats import DatasetStatistics, count_dataset, counting, hide_few, write_statistics
from ehrseq.tasks import label_events, write_labels
from ehrseq.tasks.shards import label_dataset
from ehrseq.tokenization.ehr_codes import code_kinds
from ehrseq.work.engine import get_engine

ONE = get_engine(num_workers=1)
TASKS = ["mortality_30d", "long_stay_7d"]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    cohort = simulate(150, seed=4, progress=False)
    events, folder = cohort.events(), tmp_path_factory.mktemp("stats") / "dataset"
    write_dataset(events, folder, dataset_name="simulated", shard_size=9_000)
    write_labels(label_events(events, TASKS, end_of_data=cohort.end_of_data, progress=False), folder)
    assert len(dataset_shards(folder)) > 5
    return folder


@pytest.fixture(scope="module")
def statistics(dataset: Path) -> DatasetStatistics:
    return count_dataset(dataset, engine=ONE)


def naive(events: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame]:
    """What is counted of each code and of each kind, row by row in Python."""
    of_code: dict[str, list[tuple]] = {}
    names = ["subject_id", "time", "numeric_value", "text_value", "visit_id"]
    for code, *row in events.select("code", *names).iter_rows():
        of_code.setdefault(code, []).append(row)
    kinds = dict(zip(of_code, (kind.split(":")[0] for kind in code_kinds(list(of_code))), strict=True))
    of_kind: dict[str, list[tuple]] = {}
    for code, rows in of_code.items():
        of_kind.setdefault(kinds[code], []).extend(rows)
    return (
        counted(({"code": code, "kind": kinds[code]}, rows) for code, rows in of_code.items()),
        counted(({"kind": kind}, rows) for kind, rows in of_kind.items()),
    )


def counted(groups: Iterable[tuple[dict[str, str], list[tuple]]]) -> pl.DataFrame:
    """One line a group, which is (its names, its rows)."""
    lines = []
    for group, rows in groups:
        subjects, all_times, all_values, texts, visits = zip(*rows, strict=True)
        times = [time for time in all_times if time is not None]
        values = [value for value in all_values if value is not None]
        lines.append(
            group
            | {
                "rows": len(rows),
                "patients": len(set(subjects)),
                "patients_with_value": len(
                    {who for who, value in zip(subjects, all_values, strict=True) if value is not None}
                ),
                "without_time": len(rows) - len(times),
                "at_midnight": sum(time.hour == time.minute == time.second == time.microsecond == 0 for time in times),
                "with_value": len(values),
                "with_text": len(rows) - texts.count(None),
                "without_visit": visits.count(None),
                "first": min(times, default=None),
                "last": max(times, default=None),
                "lowest": min(values, default=None),
                "mean": math.fsum(values) / len(values) if values else None,
                "highest": max(values, default=None),
            }
        )
    return pl.DataFrame(lines, infer_schema_length=None)


def assert_counts(statistics: DatasetStatistics, events: pl.DataFrame) -> None:
    """Every count of events is the naive one."""
    same = {"check_row_order": False, "check_column_order": False, "check_dtypes": False}
    codes, kinds = naive(events)
    assert_frame_equal(statistics.codes, codes, **same, rel_tol=1e-9)
    assert_frame_equal(statistics.kinds, kinds.drop("lowest", "mean", "highest"), **same)
    assert statistics.events == events.height
    assert statistics.codes["rows"].is_sorted(descending=True)
    own: dict[int, int] = {}
    for who in events["subject_id"]:
        own[who] = own.get(who, 0) + 1
    sizes = sorted(own.values())
    assert [(rows, rows) for rows in sorted(set(sizes))] == list(
        statistics.events_per_patient.select("rows", "to").iter_rows()
    )
    assert statistics.events_per_patient["patients"].to_list() == [sizes.count(n) for n in sorted(set(sizes))]
    assert sum(statistics.patients.values()) == len(own)
    # the calendar, from the codes' kinds that were checked above
    kind_of = dict(statistics.codes.select("code", "kind").iter_rows())
    months: dict[tuple, list[int]] = {}
    for who, time, code in events.select("subject_id", "time", "code").iter_rows():
        if time is not None and kind_of[code] != "birth":
            months.setdefault((time.date().replace(day=1), kind_of[code]), []).append(who)
    calendar = {(month, kind): (rows, patients) for month, kind, rows, patients in statistics.calendar.iter_rows()}
    assert calendar == {key: (len(rows), len(set(rows))) for key, rows in months.items()}


def external(page: str) -> list[str]:
    """Whatever a browser would fetch, run, or show as an address."""
    found: list[str] = re.findall(r"https?:|//[a-z]+\.|@import|url\((?!#)", page)

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list) -> None:
            if tag in ("script", "link", "img", "iframe", "object", "base", "image"):
                found.append(tag)
            found.extend(
                f"{name}={value}" for name, value in attrs if name.endswith(("href", "src")) and value[0] != "#"
            )

    Reader().feed(page)
    return found


# -- counts ----------------------------------------------------------------------------------------------------------


def test_counts_are_those_of_a_naive_pass_over_the_table(dataset, statistics):
    events = EventDataset(dataset).events()
    assert_counts(statistics, events)
    splits = pl.read_parquet(dataset / "metadata" / "subject_splits.parquet")
    here = splits.filter(pl.col("subject_id").is_in(events["subject_id"].unique().to_list()))
    assert statistics.patients == dict(sorted(here.group_by("split").len().iter_rows()))


def test_prevalence_by_period_is_the_share_of_positive_labels(dataset, statistics):
    assert statistics.prevalence["task"].unique().sort().to_list() == sorted(TASKS)
    for task in TASKS:
        labels = pl.read_parquet(dataset / "labels" / task / "labels.parquet")
        own = statistics.prevalence.filter(task=task)
        starts = own["from"].to_list()
        assert starts == sorted(starts)
        periods: dict = {}
        for who, time, label in labels.select("subject_id", "prediction_time", "boolean_value").iter_rows():
            periods.setdefault(max(start for start in starts if start <= time.date()), []).append((who, label))
        assert sorted(periods) == starts
        for row in own.iter_rows(named=True):
            found = periods[row["from"]]
            n, k = len(found), sum(label for _, label in found)
            assert (row["labels"], row["positives"]) == (n, k)
            assert row["patients"] == len({who for who, _ in found})
            assert row["positive_patients"] == len({who for who, label in found if label})
            assert row["negative_patients"] == len({who for who, label in found if not label})
            assert row["prevalence"] == pytest.approx(k / n)
            # Wilson: the interval's ends are the shares p that lie z standard errors of p from k / n.
            for end in (row["low"], row["high"]):
                assert (k / n - end) ** 2 == pytest.approx(1.959964**2 * end * (1 - end) / n, abs=1e-9)
            assert 0 <= row["low"] <= row["prevalence"] <= row["high"] <= 1


def test_workers_and_blocks_change_nothing(dataset, statistics, tmp_path, monkeypatch):
    two = count_dataset(dataset, engine=get_engine(num_workers=2), work=tmp_path / "new" / "work")
    assert list((tmp_path / "new" / "work").iterdir()) == []
    for name, table in statistics.tables().items():
        assert_frame_equal(two.tables()[name], table, check_exact=True)
    first = write_statistics(statistics, tmp_path / "one").parent
    second = write_statistics(two, tmp_path / "two").parent
    names = {"index.html", *(f"{name}.csv" for name in statistics.tables())}
    assert {file.name for file in first.iterdir()} == names
    for file in first.iterdir():
        assert file.read_bytes() == (second / file.name).read_bytes(), file.name

    monkeypatch.setattr(counting, "read_blocks", lambda shard: read_blocks(shard, rows=BLOCK_ROWS // 500))
    for name, table in count_dataset(dataset, engine=ONE).tables().items():
        assert_frame_equal(table, statistics.tables()[name], rel_tol=1e-12)


def test_a_stopped_run_goes_on_where_it_was(dataset, statistics, tmp_path, monkeypatch):
    counted = []

    def interrupted(shard):
        counted.append(shard.name)
        if len(counted) == 4:
            raise KeyboardInterrupt
        return read_blocks(shard)

    monkeypatch.setattr(counting, "read_blocks", interrupted)
    with pytest.raises(KeyboardInterrupt):
        count_dataset(dataset, engine=ONE, work=tmp_path)
    again = count_dataset(dataset, engine=ONE, work=tmp_path)
    assert len(counted) == len(dataset_shards(dataset)) + 1
    for name, table in statistics.tables().items():
        assert_frame_equal(again.tables()[name], table, check_exact=True)
    assert not list(tmp_path.iterdir())


def test_files_without_rows_or_labels_or_times(tmp_path):
    events = pl.DataFrame({"subject_id": [1, 2], "time": [None, None], "code": ["GENDER//F", "GENDER//M"]})
    write_dataset(events.cast({"time": pl.Datetime("us")}), tmp_path / "d", dataset_name="static")
    file = Path(dataset_shards(tmp_path / "d")[0].path)
    pl.read_parquet(file).head(0).write_parquet(file.with_name("77.parquet"))
    found = count_dataset(tmp_path / "d", engine=ONE)
    assert (found.events, found.kinds["without_time"].sum(), found.calendar.height, found.prevalence.height) == (
        2,
        2,
        0,
        0,
    )
    page = write_statistics(found, tmp_path / "page").read_text()
    assert "No month to show" in page
    assert "No period to show" in page


# -- the page --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("least", [1, 5])
def test_the_page_is_one_file_that_names_nothing_outside(dataset, tmp_path, least):
    done = CliRunner().invoke(
        app,
        ["stats", str(dataset), "--out", str(tmp_path / "page"), "--workers", "1", "--least-patients", str(least)],
    )
    assert done.exit_code == 0, done.output
    assert "150 patients" in done.output
    page = (tmp_path / "page" / "index.html").read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>")
    assert external(page) == []
    assert page.count("<svg") == 4
    for task in TASKS:
        assert task in page
    again = CliRunner().invoke(app, ["stats", str(dataset), "--out", str(tmp_path / "page"), "--workers", "1"])
    assert again.exit_code == 0, again.output  # a page is replaced


def test_names_are_escaped(tmp_path):
    events = pl.DataFrame({"subject_id": [1], "time": [None], "code": ["<script>alert(1)</script>"]})
    write_dataset(events.cast({"time": pl.Datetime("us")}), tmp_path / "a<b>", dataset_name="x")
    page = write_statistics(count_dataset(tmp_path / "a<b>", engine=ONE), tmp_path / "page").read_text()
    assert "<script" not in page
    assert "a&lt;b&gt;" in page
    assert "&lt;script&gt;" in page


# -- few patients ----------------------------------------------------------------------------------------------------


def test_what_few_patients_stand_behind_is_hidden_and_counted(statistics, tmp_path):
    least = 25
    shown, notes = hide_few(statistics, least)
    rare = statistics.codes.filter(pl.col("patients") < least)
    assert 0 < rare.height < statistics.codes.height
    assert not set(shown.codes["code"]) & set(rare["code"])
    assert shown.codes.height + rare.height == statistics.codes.height
    for table in (shown.codes, shown.kinds, shown.calendar, shown.prevalence, shown.events_per_patient):
        assert table["patients"].min() is None or table["patients"].min() >= least
    for name in ("positive_patients", "negative_patients"):
        assert shown.prevalence.filter(pl.col(name).is_between(1, least - 1)).is_empty()
    assert shown.codes["lowest"].null_count() == shown.codes["highest"].null_count() == shown.codes.height
    assert shown.codes.filter((pl.col("patients_with_value") < least) & pl.col("mean").is_not_null()).is_empty()
    assert set(shown.codes["first"].drop_nulls().dt.ordinal_day()) == {1}
    classes = shown.events_per_patient
    assert classes["patients"].sum() == 150
    assert classes["to"].to_list() == [*(start - 1 for start in classes["rows"][1:]), None]
    assert f"{rare.height:,} of {statistics.codes.height:,} codes ({rare['rows'].sum():,} rows)" in " ".join(notes)

    page = write_statistics(statistics, tmp_path / "page", least_patients=least)
    files = "".join(file.read_text() for file in page.parent.iterdir())
    assert [code for code in rare["code"] if code in files.replace("\n", " ") and code + "//" not in files] == []
    assert notes[0] in page.read_text()


def test_one_patient_is_enough_by_default_and_too_many_hide_everything(statistics, tmp_path):
    assert hide_few(statistics, 1) == (statistics, [])
    shown, notes = hide_few(statistics, 1_000)
    assert all(table.is_empty() for table in shown.tables().values())
    assert len(notes) == 6
    page = write_statistics(statistics, tmp_path / "page", least_patients=1_000).read_text()
    assert "Too few patients" in page
    assert external(page) == []


# -- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["absent"], "data/<split>/<n>.parquet"),
        (["empty"], "holds no events"),
        (["DATASET", "--labels", "absent.parquet"], "does not exist"),
        (["DATASET", "--labels", "bare"], "holds no labels"),
        (["DATASET", "--out", "taken"], "holds something other than a page"),
        (["DATASET", "--out", "taken/index.html"], "name a new folder"),
        (["broken"], "cannot be read as Parquet"),
        (["DATASET", "--least-patients", "0"], "least-patients"),
    ],
)
def test_bad_input_is_named_before_anything_is_written(dataset, tmp_path, monkeypatch, options, error):
    monkeypatch.chdir(tmp_path)
    for folder in ("bare", "taken", "broken/data/train", "empty/data/train"):
        Path(folder).mkdir(parents=True)
    Path("taken/index.html").write_text("mine")
    Path("taken/notes.txt").write_text("mine")
    Path("broken/data/train/0.parquet").write_bytes(b"PAR1 no")
    pl.read_parquet(dataset_shards(dataset)[0].path).head(0).write_parquet("empty/data/train/0.parquet")
    words = [str(dataset) if word == "DATASET" else word for word in options]
    before = sorted(str(path) for path in Path().rglob("*"))
    done = CliRunner().invoke(
        app, ["stats", *words, "--workers", "1", *([] if "--out" in words else ["--out", "page"])]
    )
    assert done.exit_code != 0
    assert error in f"{done.output} {done.exception}"
    assert sorted(str(path) for path in Path().rglob("*")) == before
    assert Path("taken/notes.txt").read_text() == "mine"


@pytest.mark.parametrize("least", [0, -1, True, 1.5, "3"])
def test_least_patients_must_be_a_count(statistics, tmp_path, least):
    with pytest.raises(ValueError, match="whole number from 1 on"):
        write_statistics(statistics, tmp_path / "page", least_patients=least)
    assert not (tmp_path / "page").exists()


# -- real data -------------------------------------------------------------------------------------------------------


def test_the_mimic_iv_demo(ehr_data, tmp_path):
    source = ehr_data / "mimic-iv-demo-meds" / "0.0.1"
    if not source.is_dir():
        pytest.skip(f"{source} is absent: the MIMIC-IV demo as MEDS is needed")
    prepare_dataset(source, tmp_path / "d", engine=ONE, shard_rows=200_000)
    label_dataset(tmp_path / "d", ["mortality_30d", "long_stay_7d"], engine=ONE)
    found = count_dataset(tmp_path / "d", engine=ONE)
    assert (found.events, sum(found.patients.values()), found.codes.height) == (913_521, 100, 7_035)
    assert_counts(found, EventDataset(tmp_path / "d").events())
    page = write_statistics(found, tmp_path / "d" / "stats", least_patients=11).read_text()
    assert external(page) == []
