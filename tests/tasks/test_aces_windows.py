"""Our tasks and ACES, the cohort tool of the MEDS family, on the same windows: the same rows with the same labels, but
of who died within a horizon that passes the end of the data: fully observed for us, not followed to its end for ACES.

ACES knows no admissions and no end of the data. So it is given both as rows: `ADMISSION` and `DISCHARGE` of every stay,
transfers of one day joined here in plain Python, and `END_OF_DATA` of every patient, for which a window behind the
target asks. It runs where it is installed; elsewhere `test_with_the_library` (test_aces.py) runs this file where it is.
"""

import importlib.util
from datetime import timedelta

import polars as pl
import pytest

from ehrseq.data import load_events
from ehrseq.data.simulate.cohort import simulate
from ehrseq.tasks import Task, label_events, load_task

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("aces") is None, reason="ACES is not installed: run by test_with_the_library of test_aces"
)

HYPERTENSION = [r"^DIAGNOSIS//ICD10CM//I10", r"^DIAGNOSIS//ICD//(9//401|10//I10)"]
NEW_HYPERTENSION = Task.from_dict(
    {
        "name": "new_hypertension",
        "token": "[T]",
        "definition": "As heart_failure_365d, with the codes of hypertension.",
        "positive_label": "yes",
        "prediction": {"anchor": "discharge"},
        "horizon": "365d",
        "exclude": ["dead", "earlier_code"],
        "outcome": {"event": "first_code", "codes": HYPERTENSION},
        "competing": ["death"],
    }
)
# our task, ACES's label, days, what the history must not hold beside a death
QUESTIONS = {
    "readmission_30d": (load_task("readmission_30d"), "admission", 30, []),
    "mortality_30d": (load_task("mortality_30d"), "death", 30, []),
    "new_hypertension": (NEW_HYPERTENSION, "hypertension", 365, ["hypertension"]),
}
FILE = """
predicates:
  discharge: {{code: DISCHARGE}}
  admission: {{code: ADMISSION}}
  death: {{code: MEDS_DEATH}}
  hypertension: {{code: {{regex: '{codes}'}}}}
  end_of_data: {{code: END_OF_DATA}}
trigger: discharge
windows:
  input:
    start: null
    end: trigger
    start_inclusive: true
    end_inclusive: true
    index_timestamp: end
    has: {{{without}}}
  target: {{start: trigger, end: start + {days}d, start_inclusive: false, end_inclusive: true, label: {label}}}
  followed:
    start: target.end
    end: null
    start_inclusive: true
    end_inclusive: true
    has: {{{behind}: "(1, None)"}}
"""


@pytest.fixture(scope="module", params=["simulated", "MIMIC-IV demo"])
def cohort(request):
    """Events, and an end of the data in the midst of them."""
    if request.param == "simulated":
        events = simulate(300, seed=5, progress=False).events()
    else:
        path = request.getfixturevalue("ehr_data") / "mimic-iv-demo-meds" / "0.0.1"
        if not path.is_dir():
            pytest.skip(f"{path} is absent: the MIMIC-IV demo as MEDS is needed")
        events, _ = load_events(path, progress=False)
    return events, events["time"].drop_nulls().quantile(0.6)


def stays(events):
    """(subject, start, end or None, whether it ended in death) of every stay in hospital; starts on a day on which
    the one before ends are its transfers."""
    kind = {
        "start": pl.col("code").str.contains("^(VISIT_START//(IMP|ACUTE|NONAC)$|HOSPITAL_ADMISSION//)"),
        "end": pl.col("code").str.contains("^(VISIT_END//|HOSPITAL_DISCHARGE//)"),
    }
    starts = events.filter(kind["start"]).group_by("subject_id", "visit_id").agg(pl.col("time").min().alias("start"))
    ends = (
        events.filter(kind["end"])
        .sort("time")
        .group_by("subject_id", "visit_id")
        .agg(pl.col("time").last().alias("end"), pl.col("code").last())
    )
    visits = starts.join(ends, on=["subject_id", "visit_id"], how="left").sort("subject_id", "start")
    joined = []
    for subject, start, end, code in visits.select("subject_id", "start", "end", "code").iter_rows():
        last = joined[-1] if joined else None
        died = code in ("VISIT_END//exp", "HOSPITAL_DISCHARGE//DIED")
        if last and last[0] == subject and (last[2] is None or start.date() <= last[2].date()):
            last[2] = None if None in (last[2], end) else max(last[2], end)
            last[3] |= died
        else:
            joined.append([subject, start, end, died])
    return joined


def for_aces(events, end):
    """The rows up to the end of the data, with what ACES does not know."""
    rows = events.filter(pl.col("time") <= end).select("subject_id", "time", "code")
    marks = [(subject, end, "END_OF_DATA") for subject in rows["subject_id"].unique()]
    for subject, start, stop, died in stays(events.filter(pl.col("time") <= end)):
        marks.append((subject, start, "ADMISSION"))
        if stop is not None and not died:
            marks.append((subject, stop, "DISCHARGE"))
    return pl.concat([rows, pl.DataFrame(marks, rows.schema, orient="row")]).sort("subject_id", "time")


def ask_aces(table, question, behind, folder):
    """subject_id, prediction_time, boolean_value."""
    from aces import config, predicates, query
    from omegaconf import DictConfig

    _, label, days, without = QUESTIONS[question]
    text = ", ".join(f'{name}: "(None, 0)"' for name in ["death", *without])
    task = folder / "task.yaml"
    task.write_text(FILE.format(codes="|".join(HYPERTENSION), without=text, days=days, label=label, behind=behind))
    table.write_parquet(folder / "events.parquet")
    source = DictConfig({"path": str(folder / "events.parquet"), "standard": "meds", "ts_format": None})
    cfg = config.TaskExtractorConfig.load(task)
    found = query.query(cfg, predicates.get_predicates_df(cfg, source))
    return found.select(
        "subject_id", pl.col("index_timestamp").alias("prediction_time"), (pl.col("label") > 0).alias("boolean_value")
    ).sort("subject_id", "prediction_time")


def ask_ours(events, question, end):
    task = QUESTIONS[question][0]
    return label_events(events, task, end_of_data=end, progress=False).labels[task.name]


def followed(events, question, end, labels):
    """The labels whose horizon the data cover; the others are of patients who died within it."""
    is_covered = pl.col("prediction_time") + timedelta(days=QUESTIONS[question][2]) <= end
    deaths = events.filter(pl.col("code") == "MEDS_DEATH").select("subject_id", death="time")
    others = labels.filter(~is_covered).join(deaths, on="subject_id", how="left")
    assert others.select(((pl.col("death") > pl.col("prediction_time")) & (pl.col("death") <= end)).all()).item()
    return labels.filter(is_covered)


@pytest.mark.parametrize("question", QUESTIONS)
def test_aces_gives_the_same_rows_and_labels_where_it_is_told_the_end_of_the_data(cohort, question, tmp_path):
    events, end = cohort
    ours = ask_ours(events, question, end)
    theirs = ask_aces(for_aces(events, end), question, "end_of_data", tmp_path)
    covered = followed(events, question, end, ours)
    assert covered.height > 30
    assert 0 < covered["boolean_value"].sum() < covered.height
    assert covered.rows() == theirs.rows()


@pytest.mark.parametrize("question", QUESTIONS)
def test_aces_without_it_leaves_out_who_has_no_row_behind_the_horizon(cohort, question, tmp_path):
    """By its usual rule: those who died within it, and those who did not come back. The other labels are equal."""
    events, end = cohort
    ours = followed(events, question, end, ask_ours(events, question, end))
    table = for_aces(events, end).filter(pl.col("code") != "END_OF_DATA")
    theirs = ask_aces(table, question, "_ANY_EVENT", tmp_path)
    last = table.group_by("subject_id").agg(pl.col("time").max().alias("last"))
    horizon = timedelta(days=QUESTIONS[question][2])
    seen = ours.join(last, on="subject_id").filter(pl.col("last") >= pl.col("prediction_time") + horizon)
    assert seen.drop("last").sort("subject_id", "prediction_time").rows() == theirs.rows()
    assert 0 < theirs.height < ours.height
