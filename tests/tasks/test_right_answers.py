"""Records as hospitals send them, each with the right labels and why: deaths, ends of stays, days, end of the data."""

from datetime import datetime, timedelta

import polars as pl
import pytest

from ehrseq.data.dataset import write_dataset
from ehrseq.data.instants import check_zone
from ehrseq.data.simulate.cohort import simulate
from ehrseq.stats.counting import count_dataset
from ehrseq.tasks import label_events, list_tasks, load_task
from ehrseq.tasks.shards import label_dataset
from ehrseq.work.engine import get_engine
from tests.tasks.timelines import DEATH, DIED_OUT, GOES_ON, I10, IMP_OUT, INDEX, OUT, at, stay

DAY_24H = "2020-01-02 12:00"  # 24 hours after the admission of INDEX
OPEN = stay("2020-01-01 12:00", None, "a")


def table(rows: list[tuple]) -> pl.DataFrame:
    """Rows of (time, code[, visit_id[, text]])."""
    return pl.DataFrame(
        [(1, None if time is None else at(time), code, *more, *[None] * (2 - len(more))) for time, code, *more in rows],
        schema={
            "subject_id": pl.Int64,
            "time": pl.Datetime("us"),
            "code": pl.String,
            "visit_id": pl.String,
            "text_value": pl.String,
        },
        orient="row",
    )


def answer(rows: list[tuple], task: str, end: str = "2030-01-01", **options) -> tuple[dict, dict]:
    result = label_events(table(rows), task, end_of_data=end, progress=False, **options)
    labels = {str(time)[:16]: label for _, time, label in result.labels[task].iter_rows()}
    return labels, {reason: count for reason, count in result.report[task].items() if count}


# why, rows, task, labels, dropped
DEATHS = [
    ("dead, nobody knows when", [*INDEX, (None, DEATH)], "mortality_30d", {}, {"death_time_unknown": 1}),
    ("dead, and perhaps in this stay", [*INDEX, (None, DEATH)], "hospital_mortality_24h", {},
     {"death_time_unknown": 1}),
    ("a readmission is one whenever the death was", [*INDEX, *stay("2020-01-20", "2020-01-22", "b"), (None, DEATH)],
     "readmission_30d", {OUT: True, "2020-01-22 00:00": False}, {}),
    ("a death that has a time wins over one without", [*INDEX, (None, DEATH), ("2020-01-15", DEATH)], "mortality_30d",
     {OUT: True}, {}),
    ("a disposition that says so tells the time",
     [*stay("2020-01-01", "2020-01-05", "a", end_code=DIED_OUT), (None, DEATH)],
     "hospital_mortality_24h", {"2020-01-02 00:00": True}, {}),
    ("a month later than the horizon: every day of it says no", [*INDEX, (None, DEATH, None, "2020-03")],
     "mortality_30d", {OUT: False}, {}),
    ("the month of the discharge: some days before it, some after", [*INDEX, (None, DEATH, None, "2020-01")],
     "mortality_30d", {}, {"death_time_unknown": 1}),
    ("a month that lies within the horizon as a whole", [*stay("2020-01-25", "2020-01-31 18:00", "a"),
     (None, DEATH, None, "2020-02")], "mortality_30d", {"2020-01-31 18:00": True}, {}),
    ("a month of which the horizon cuts the last days", [*stay("2020-01-25", "2020-01-29 18:00", "a"),
     (None, DEATH, None, "2020-02")], "mortality_30d", {}, {"death_time_unknown": 1}),
    ("a year after the stay's", [*INDEX, (None, DEATH, None, "2021")], "mortality_30d", {OUT: False}, {}),
    ("the year of the stay", [*INDEX, (None, DEATH, None, "2020")], "hospital_mortality_24h", {},
     {"death_time_unknown": 1}),
    ("a year before the stay: it is somebody else's, or a slip", [*INDEX, (None, DEATH, None, "2019")],
     "mortality_30d", {}, {"admitted_after_death": 1}),
    ("words that are no date say nothing of the time", [*INDEX, (None, DEATH, None, "spring")], "mortality_30d", {},
     {"death_time_unknown": 1}),
    ("two rows that put it into a year and a month of it", [*INDEX, (None, DEATH, None, "2020"),
     (None, DEATH, None, "2020-06")], "mortality_30d", {OUT: False}, {}),
]  # fmt: skip

ENDS = [
    ("finished, no end: not long", [*OPEN, (None, IMP_OUT, "a")], "long_stay_7d", {}, {"no_discharge": 1}),
    ("finished, no end: nobody knows whether the death was in it", [*OPEN, (None, IMP_OUT, "a"), ("2020-03-01", DEATH)],
     "hospital_mortality_24h", {}, {"no_discharge": 1}),
    ("an end before the start", [*OPEN, ("2020-01-01 09:00", IMP_OUT, "a")], "long_stay_7d", {}, {"no_discharge": 1}),
    ("no end, no word, years ago", OPEN, "long_stay_7d", {}, {"no_discharge": 1}),
    ("no end, years ago, and the source says that it goes on", [*OPEN, (None, GOES_ON, "a")], "long_stay_7d",
     {DAY_24H: True}, {}),
    ("the source says that it goes on, and another stay came after it", [*OPEN, (None, GOES_ON, "a"),
     *stay("2021-01-01", "2021-01-03", "b")], "long_stay_7d", {"2021-01-02 00:00": False}, {"no_discharge": 1}),
    ("the end of a child is not that of its stay", [*OPEN, ("2020-01-02", "VISIT_START//ICU", "a"),
     (None, "VISIT_END//ICU", "a"), (None, GOES_ON, "a")], "long_stay_7d", {DAY_24H: True}, {}),
    ("an end without a time of another visit says nothing", [*OPEN, (None, IMP_OUT, "b"), (None, GOES_ON, "a")],
     "long_stay_7d", {DAY_24H: True}, {}),
]  # fmt: skip


@pytest.mark.parametrize(("rows", "task", "labels", "dropped"), [c[1:] for c in DEATHS], ids=[c[0] for c in DEATHS])
def test_death_is_a_fact_with_or_without_a_time(rows, task, labels, dropped):
    assert answer(rows, task) == (labels, dropped)


@pytest.mark.parametrize(("rows", "task", "labels", "dropped"), [c[1:] for c in ENDS], ids=[c[0] for c in ENDS])
def test_an_unknown_end_is_not_a_stay_in_progress(rows, task, labels, dropped):
    assert answer(rows, task) == (labels, dropped)


def test_the_last_stay_is_in_progress_up_to_thirty_days_before_the_end_of_the_data():
    assert answer(OPEN, "long_stay_7d", end="2020-01-31T12:00:00") == ({DAY_24H: True}, {})
    assert answer(OPEN, "long_stay_7d", end="2020-01-31T12:00:01") == ({}, {"no_discharge": 1})


def test_an_end_behind_the_end_of_the_data_says_that_the_stay_goes_on_then():
    rows = stay("2020-01-01 12:00", "2020-06-01", "a")
    assert answer(rows, "long_stay_7d", end="2020-05-01") == ({DAY_24H: True}, {})


@pytest.mark.parametrize(
    ("zone", "labels"),
    [
        (None, {"2020-01-10 22:00": True, "2020-01-14 10:00": False}),
        ("-07:00", {"2020-01-14 10:00": False}),  # 15:00 and 18:30 of one day
        ("America/Denver", {"2020-01-14 10:00": False}),
        ("Europe/Berlin", {"2020-01-10 22:00": True, "2020-01-14 10:00": False}),  # 23:00, and 02:30 of the next
    ],
)
def test_a_transfer_is_one_of_a_day_at_the_hospital(zone, labels):
    rows = [
        *stay("2020-01-02 16:00", "2020-01-10 22:00", "a"),
        *stay("2020-01-11 01:30", "2020-01-14 10:00", "b"),
    ]
    by_rows = [] if zone is None else [(None, f"TIMEZONE//{zone}")]
    assert answer([*rows, *by_rows], "readmission_30d")[0] == labels
    assert answer(rows, "readmission_30d", timezone=zone)[0] == labels


def test_two_days_at_the_hospital_are_two_stays_where_utc_has_one():
    rows = [*stay("2020-01-02 16:00", "2020-01-10 11:00", "a"), *stay("2020-01-10 23:00", "2020-01-14 10:00", "b")]
    assert answer(rows, "readmission_30d")[0] == {"2020-01-14 10:00": False}
    tokyo = [*rows, (None, "TIMEZONE//+09:00")]  # 20:00, and 08:00 of the next morning
    assert answer(tokyo, "readmission_30d")[0] == {"2020-01-10 11:00": True, "2020-01-14 10:00": False}
    # the zone of a visit wins over the patient's
    assert answer([*tokyo, (None, "TIMEZONE//+00:00", "a"), (None, "TIMEZONE//+00:00", "b")], "readmission_30d")[0] == {
        "2020-01-14 10:00": False
    }


@pytest.mark.parametrize("zone", ["Mars/Olympus", "7", "", 5, "+7:00"])
def test_a_zone_that_is_none_is_refused(zone):
    with pytest.raises(ValueError, match="is not known; expected a name of the IANA database"):
        check_zone(zone)


def test_files_give_what_the_whole_table_gives_of_deaths_ends_and_days(tmp_path):
    rows = [case[1] for case in (*DEATHS, *ENDS)]
    events = pl.concat(table(one).with_columns(subject_id=pl.lit(number, pl.Int64)) for number, one in enumerate(rows))
    events = pl.concat([events, table([(None, "TIMEZONE//-07:00")]).with_columns(subject_id=pl.lit(3, pl.Int64))])
    write_dataset(events, tmp_path / "d", dataset_name="test", shard_size=20)
    names = list_tasks(paper=None)
    names = [name for name in names if not load_task(name).measures]
    whole = label_events(events, names, end_of_data="2030-01-01", progress=False)
    files = label_dataset(tmp_path / "d", names, end_of_data="2030-01-01", engine=get_engine(num_workers=1))
    for name in names:
        assert files.labels[name].equals(whole.labels[name])
    assert files.report == whole.report


# -- the end of the data -----------------------------------------------------------------------------------------------


LATER = {
    "nothing more": [],
    "a visit": stay("2020-01-20", "2020-01-22", "b"),
    "a visit with a diagnosis": [*stay("2020-01-20", "2020-01-22", "b"), ("2020-01-22", I10, "b")],
    "a death": [("2020-01-20", DEATH)],
    "a visit, then a death": [*stay("2020-01-20", "2020-01-22", "b"), ("2020-01-25", DEATH)],
}
"""What may follow one discharge: whichever outcome it makes."""


@pytest.mark.parametrize("task", ["mortality_30d", "readmission_30d", "hypertension", "heart_failure_365d"])
@pytest.mark.parametrize("days", [20, 29, 30, 364, 365])
def test_censoring_does_not_look_at_the_label(task, days):
    """Patients who differ in what follows alone are kept, or dropped, together: those whose horizon the data cover. A
    death within the horizon leaves nothing to be seen."""
    end = at(OUT) + timedelta(days=days)
    kept = {why: OUT in answer([*INDEX, *rows], task, end=end)[0] for why, rows in LATER.items()}
    covered = at(OUT) + load_task(task).horizon <= end
    assert kept == {why: covered or "death" in why for why in LATER}


def horizon(name: str) -> timedelta:
    """Time between the prediction and the end of the horizon."""
    task = load_task(name)
    return task.horizon - (task.offset if task.horizon_from == "anchor" else timedelta(0))


def test_the_end_of_the_data_hides_rows_and_changes_none():
    """Cut in the midst of a cohort, its labels are those that the whole cohort gives, as far as their horizon goes, and
    those of who died within it."""
    events = simulate(400, seed=5, progress=False).events()
    deaths = events.filter(pl.col("code") == "MEDS_DEATH").select("subject_id", death="time")
    cut = datetime(2015, 1, 1)
    names = [name for name in list_tasks() if not load_task(name).to_stay_end]
    known, now = (label_events(events, names, end_of_data=end, progress=False) for end in (events["time"].max(), cut))
    for name in names:
        ends = pl.col("prediction_time") + horizon(name)
        labels = known.labels[name].join(deaths, on="subject_id", how="left")
        covered = labels.filter((ends <= cut) | (pl.col("death") <= cut) & (pl.col("death") <= ends)).drop("death")
        pending = now.report[name].get("outcome_pending", 0)
        assert covered.height > 200
        assert now.labels[name].join(covered, on=covered.columns, how="anti").is_empty()
        assert covered.height - pending <= now.labels[name].height <= covered.height


def test_no_prevalence_jumps_at_the_end_of_the_data(tmp_path):
    """The labels of the last periods of a cohort whose risks do not change are as often positive as those before."""
    cohort = simulate(400, seed=5, progress=False)
    write_dataset(cohort.events(), tmp_path / "d", dataset_name="test")
    label_dataset(tmp_path / "d", list_tasks(), end_of_data=cohort.end_of_data, engine=get_engine(num_workers=1))
    prevalence = count_dataset(tmp_path / "d", engine=get_engine(num_workers=1)).prevalence
    for name in list_tasks():
        periods = prevalence.filter(pl.col("task") == name).sort("from")
        last, before = periods.tail(1), periods.head(-1)
        whole = before["positives"].sum() / before["labels"].sum()
        assert last["low"].item() <= whole <= last["high"].item(), name
        horizon = load_task(name).horizon
        assert periods["from"].max() <= (cohort.end_of_data - horizon).date() + timedelta(days=1), name


def test_who_died_within_a_horizon_that_passes_the_end_has_a_label_and_is_in_no_prevalence(tmp_path):
    rows = table([*INDEX, ("2020-01-15", DEATH)])
    write_dataset(rows, tmp_path / "d", dataset_name="test")
    result = label_dataset(
        tmp_path / "d", ["readmission_30d"], end_of_data="2020-01-20", engine=get_engine(num_workers=1)
    )
    assert result.labels["readmission_30d"].rows() == [(1, datetime(2020, 1, 11, 12), False)]
    assert count_dataset(tmp_path / "d", engine=get_engine(num_workers=1)).prevalence.is_empty()
