"""The columnar engine equals its slow twin on random histories of random patients, boundaries hit on purpose."""

from collections import Counter
from datetime import datetime, timedelta

import polars as pl
import pytest
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

from ehrseq.tasks import Task, label_events, list_tasks, load_task
from tests.properties import examples
from tests.tasks.naive import naive_labels
from tests.tasks.timelines import I10

BASE = datetime(2020, 1, 1)


def _short(name: str, **changes) -> Task:
    """Packaged tasks in days instead of months, so that short random histories reach their horizons."""
    fields = {
        "name": name,
        "token": "[T]",
        "definition": "short",
        "positive_label": "yes",
        "prediction": {"anchor": "discharge"},
        "horizon": "5d",
        "exclude": ["dead"],
    }
    return Task.from_dict({**fields, **changes})


CODE = {"event": "code_at_admission", "codes": ["I10$"]}
SHORT_TASKS = [
    _short("death_5d", outcome={"event": "death"}),
    _short("death_5d_offset", prediction={"anchor": "discharge", "offset": "1d"}, outcome={"event": "death"}),
    _short(
        "death_in_5d_of_admission",
        prediction={"anchor": "admission", "offset": "12h"},
        exclude=["dead", "stay_ended"],
        outcome={"event": "death"},
    ),
    _short(
        "stay_3d",
        prediction={"anchor": "admission", "offset": "1d"},
        horizon="3d",
        horizon_from="anchor",
        exclude=["dead", "stay_ended"],
        outcome={"event": "length_of_stay"},
        competing=["death"],
    ),
    _short("readmission_5d", outcome={"event": "admission"}, competing=["death"]),
    _short(
        "code_8d", horizon="8d", exclude=["dead", "earlier_code"], outcome=CODE, competing=["death", "code_elsewhere"]
    ),
]
# The histories know one diagnosis, hypertension; the other two conditions differ from it in their codes only.
TASKS = SHORT_TASKS + [load_task(name) for name in list_tasks(retrospective=None) if "disorder" not in name]

# Half days over three weeks, so that equal instants, equal days and exact horizons are common.
moments = st.integers(0, 42).map(lambda k: BASE + timedelta(hours=12 * k))
lengths = st.integers(0, 12).map(lambda k: timedelta(hours=12 * k))
encounter = st.fixed_dictionaries(
    {
        "encounter_class": st.sampled_from(["IMP", "IMP", "IMP", "ACUTE", "EMER", "ICU", "AMB"]),
        "start": moments,
        "length": st.one_of(lengths, lengths, lengths, lengths, st.none()),
        "expired": st.sampled_from([False] * 9 + [True]),
        "shares_id": st.sampled_from([False, False, True]),
    }
)
patient = st.fixed_dictionaries(
    {
        "encounters": st.lists(encounter, max_size=6),
        "deaths": st.one_of(st.just([]), st.just([]), st.lists(moments, min_size=1, max_size=2)),
        "codes": st.lists(st.tuples(moments, st.one_of(st.none(), st.integers(0, 6))), max_size=3),
    }
)


def _history(drawn: dict, subject: int, end_of_data: datetime) -> tuple[list[dict], dict]:
    """Event rows of a drawn patient, and the same for the twin, cut at the end of the data.

    Ends tell their class, and no two encounters of one class share a visit_id: which end closes which start is beyond
    doubt.
    """
    rows, encounters, expired = [], [], []
    used: set[tuple[str, str]] = set()
    for number, e in enumerate(drawn["encounters"]):
        visit_id = f"v{number}"
        kind = e["encounter_class"]
        if e["shares_id"] and number and ("v0", kind) not in used:
            visit_id = "v0"
        used.add((visit_id, kind))
        end = None if e["length"] is None else e["start"] + e["length"]
        if e["start"] > end_of_data:
            continue
        rows.append({"time": e["start"], "code": f"VISIT_START//{kind}", "visit_id": visit_id})
        if end is not None and end <= end_of_data:
            rows.append({"time": end, "code": f"VISIT_END//{kind}", "visit_id": visit_id})
            if e["expired"]:  # told by an end of another encounter, at the same instant
                rows += [
                    {"time": end, "code": "VISIT_START//AMB", "visit_id": f"x{number}"},
                    {"time": end, "code": "VISIT_END//exp", "visit_id": f"x{number}"},
                ]
                expired.append(end)
                encounters.append({"visit_id": f"x{number}", "encounter_class": "AMB", "start": end, "end": end})
        else:
            end = None
        encounters.append({"visit_id": visit_id, "encounter_class": kind, "start": e["start"], "end": end})
    deaths = [time for time in drawn["deaths"] if time <= end_of_data]
    rows += [{"time": time, "code": "MEDS_DEATH", "visit_id": None} for time in deaths]
    codes = [(time, None if k is None else f"v{k}") for time, k in drawn["codes"] if time <= end_of_data]
    rows += [{"time": time, "code": I10, "visit_id": visit_id} for time, visit_id in codes]
    twin = {"encounters": encounters, "deaths": deaths, "expired": expired, "codes": codes}
    return [{"subject_id": subject, **row} for row in rows], twin


SCHEMA = {"subject_id": pl.Int64, "time": pl.Datetime("us"), "code": pl.String, "visit_id": pl.String}


@examples(100, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(patients=st.lists(patient, min_size=1, max_size=12), end=st.sampled_from([10, 30, 60, 1000]))
def test_the_engine_equals_its_naive_twin(patients, end):
    end_of_data = BASE + timedelta(hours=12 * end)
    histories = [_history(drawn, subject, end_of_data) for subject, drawn in enumerate(patients)]
    table = pl.DataFrame([row for rows, _ in histories for row in rows], schema=SCHEMA)
    if table.is_empty():
        return
    result = label_events(table, TASKS, end_of_data=end_of_data, progress=False)
    for task in TASKS:
        expected, dropped, competing = [], Counter(), Counter()
        for subject, (_, twin) in enumerate(histories):
            labels, why, competes = naive_labels(
                **{**twin, "encounters": [dict(e) for e in twin["encounters"]]}, task=task, end_of_data=end_of_data
            )
            expected += [(subject, time, label) for time, label in labels]
            dropped += why
            competing += competes
        assert result.labels[task.name].rows() == expected, task.name
        assert {k: n for k, n in result.report[task.name].items() if n} == dict(dropped), task.name
        assert {k: n for k, n in result.competing[task.name].items() if n} == dict(competing), task.name
        assert result.candidates[task.name] == len(expected) + sum(dropped.values())


def test_labelling_patients_together_equals_labelling_each_alone():
    """No row of one patient may bear on another's labels."""
    stays = [(0, 4), (6, 8), (20, 31)]
    rows = []
    for subject in range(7):
        for number, (start, end) in enumerate(stays[: 1 + subject % 3]):
            shift = timedelta(hours=7 * subject)
            rows.append(
                {
                    "subject_id": subject,
                    "time": BASE + timedelta(days=start) + shift,
                    "code": "VISIT_START//IMP",
                    "visit_id": f"{number}",
                }
            )
            if (subject + number) % 4:
                rows.append(
                    {
                        "subject_id": subject,
                        "time": BASE + timedelta(days=end) + shift,
                        "code": "VISIT_END//home",
                        "visit_id": f"{number}",
                    }
                )
        if subject % 2:
            rows.append(
                {
                    "subject_id": subject,
                    "time": BASE + timedelta(days=9 * subject),
                    "code": "MEDS_DEATH",
                    "visit_id": None,
                }
            )
    table = pl.DataFrame(rows, schema=SCHEMA)
    names = list_tasks(retrospective=None)
    together = label_events(table, names, end_of_data="2020-12-31", progress=False)
    for name in names:
        alone = pl.concat(
            label_events(table.filter(pl.col("subject_id") == subject), name, end_of_data="2020-12-31").labels[name]
            for subject in range(7)
        )
        assert together.labels[name].equals(alone)


@pytest.mark.parametrize("later", ["MEDS_DEATH", "VISIT_START//IMP", "DIAGNOSIS//ICD10CM//E87.1", "LAB//GLUCOSE"])
def test_what_happens_after_the_end_of_the_data_changes_nothing(later):
    history = pl.DataFrame(
        [
            {"subject_id": 1, "time": BASE, "code": "VISIT_START//IMP", "visit_id": "a"},
            {"subject_id": 1, "time": BASE + timedelta(days=9), "code": "VISIT_END//home", "visit_id": "a"},
        ],
        schema=SCHEMA,
    )
    after = pl.DataFrame(
        [{"subject_id": 1, "time": BASE + timedelta(days=50), "code": later, "visit_id": "b"}], schema=SCHEMA
    )
    names = list_tasks(retrospective=None)
    without = label_events(history, names, end_of_data=BASE + timedelta(days=40))
    with_later = label_events(pl.concat([history, after]), names, end_of_data=BASE + timedelta(days=40))
    assert all(with_later.labels[name].equals(without.labels[name]) for name in names)
    assert with_later.report == without.report
    assert with_later.notes["events_after_end_of_data"] == 1
