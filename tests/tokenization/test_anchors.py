"""Whether a task can be asked: hand-made timelines, and the labelling engine as the judge of both sides."""

import json
from typing import Any

import polars as pl
import pytest

from ehrseq.data.simulate.cohort import simulate
from ehrseq.tasks import label_events, list_tasks, load_task
from ehrseq.tasks.labelling import judge
from ehrseq.tasks.timeline import read_timeline
from ehrseq.tokenization.ehr_anchors import REASONS_AGAINST, UNANSWERABLE, matters
from ehrseq.tokenization.tokenization_ehr import EhrTokenizer
from tests.tokenization.timelines import at, event, fitted

IMP, EMER, HOME, DEATH = "VISIT_START//IMP", "VISIT_START//EMER", "VISIT_END//home", "MEDS_DEATH"
LAB, I10 = "LAB//LOINC//1", "DIAGNOSIS//ICD10CM//I10"
STAY = [event(0, IMP, "a"), event(5, LAB, "a"), event(100, HOME, "a")]
CONFIGS = {name: load_task(name).to_config() for name in list_tasks(retrospective=None)}

# name -> (events, hours of the prediction, task, reason)
CASES: dict[str, tuple[list[dict[str, Any]], float | None, str, str | None]] = {
    "at the discharge": (STAY, 100, "mortality_30d", None),
    "the evening after the discharge": (STAY, 112, "readmission_30d", None),
    "exactly a day after the discharge": (STAY, 124, "readmission_30d", None),
    "more than a day after the discharge": (STAY, 124.1, "readmission_30d", "off_anchor"),
    "in the stay": (STAY, 50, "mortality_30d", "no_discharge"),
    "never admitted": ([event(0, LAB), event(9, LAB)], 9, "mortality_30d", "no_discharge"),
    "an emergency visit is no stay": (
        [event(0, EMER, "e"), event(5, "VISIT_END//home", "e")], 5, "mortality_30d", "no_discharge"),
    "nothing known": (STAY, -5, "mortality_30d", "no_discharge"),
    "a day into the stay": (STAY, 24, "long_stay_7d", None),
    "two days into the stay": (STAY, 48, "long_stay_7d", None),
    "too early in the stay": (STAY, 23, "long_stay_7d", "off_anchor"),
    "too late in the stay": (STAY, 49, "long_stay_7d", "off_anchor"),
    "after the stay": (STAY, 101, "long_stay_7d", "stay_ended"),
    "no stay at all": ([event(0, LAB)], 1, "long_stay_7d", "stay_ended"),
    "the end of the record": (STAY, None, "mortality_30d", None),
    "a transfer goes on": (
        [*STAY, event(105, IMP, "b"), event(200, HOME, "b")], 110, "mortality_30d", "no_discharge"),
    "the discharge after a transfer": (
        [*STAY, event(105, IMP, "b"), event(200, HOME, "b")], 200, "mortality_30d", None),
    "the second stay is the one": ([*STAY, event(500, IMP, "b")], 524, "long_stay_7d", None),
    "a stay whose end was never recorded": (
        [event(0, IMP, "a"), event(500, IMP, "b"), event(600, HOME, "b")], 600, "mortality_30d", None),
    "dead": ([*STAY, event(300, DEATH)], None, "readmission_30d", "died_before_prediction"),
    "dead at that instant": ([*STAY, event(100, DEATH)], 100, "readmission_30d", "died_before_prediction"),
    "dies later": ([*STAY, event(300, DEATH)], 100, "readmission_30d", None),
    "dead at an unknown time": ([*STAY, event(None, DEATH)], 100, "readmission_30d", "death_time_unknown"),
    "dead by the discharge": (
        [*STAY[:2], event(100, "VISIT_END//exp", "a")], 100, "mortality_30d", "died_before_prediction"),
    "no such diagnosis yet": ([*STAY, event(300, I10)], 100, "hypertension", None),
    "the diagnosis is recorded": ([event(-9, I10), *STAY], 100, "hypertension", "earlier_code"),
    "the diagnosis at the discharge": ([*STAY, event(100, I10, "a")], 100, "hypertension", "earlier_code"),
    "the diagnosis without a time": ([*STAY, event(None, I10)], 100, "hypertension", "earlier_code"),
    "another diagnosis": ([event(-9, "DIAGNOSIS//ICD10CM//J45"), *STAY], 100, "hypertension", None),
    "the diagnosis and another task": ([event(-9, I10), *STAY], 100, "lipid_disorder", None),
    "retrospective tasks take the dead": ([*STAY, event(100, DEATH)], 100, "mortality_30d_paper", None),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_why_a_task_cannot_be_asked(name: str) -> None:
    events, hours, task, reason = CASES[name]
    tokenizer = fitted(events)
    assert tokenizer.reasons_against({"events": events}, [CONFIGS[task]], at(hours)) == [reason]
    assert tokenizer.reasons_against({"events": events[::-1], "prediction_time": at(hours)}, [CONFIGS[task]]) == [
        reason
    ]


def test_without_rules_death_alone_speaks_against_a_task() -> None:
    tokenizer = fitted(STAY)
    bare = {"name": "mortality_30d"}
    assert tokenizer.reasons_against({"events": STAY}, [bare], at(50)) == [None]
    assert tokenizer.reasons_against({"events": [*STAY, event(300, DEATH)]}, [bare]) == ["died_before_prediction"]


def test_a_pattern_that_python_cannot_read_is_an_error() -> None:
    task = {"name": "x", "asked": {"anchor": "discharge", "exclude": ["earlier_code"], "codes": [r"\p{Lu}("]}}
    with pytest.raises(ValueError, match=r"config\.tasks: Python cannot read the code pattern"):
        fitted(STAY).reasons_against({"events": STAY}, [task])


def test_the_labelling_engine_agrees() -> None:
    """What it labels can be asked, what it drops for a reason that is known then cannot."""
    cohort = simulate(150, seed=4, progress=False)
    events = cohort.events()
    names = list_tasks()
    tokenizer = EhrTokenizer.train(events.head(2000))
    tables = {key[0]: rows for key, rows in events.partition_by("subject_id", as_dict=True).items()}
    kind_of = tokenizer.vocabulary.kind
    configs = [CONFIGS[name] for name in names]
    patients = {
        subject: {"events": rows.filter([matters(code, kind_of, configs) for code in rows["code"]]).to_dicts()}
        for subject, rows in tables.items()
    }
    labels = label_events(events, names, end_of_data=cohort.end_of_data, progress=False).labels
    asked = 0
    for name, table in labels.items():
        for subject, time, _ in table.iter_rows():
            assert tokenizer.reasons_against(patients[subject], [CONFIGS[name]], time) == [None], (name, subject, time)
            asked += 1
    assert asked > 1000
    tasks = [load_task(name) for name in names]
    timeline = read_timeline(events, tasks, end_of_data=cohort.end_of_data)
    told = pl.DataFrame({"dropped": ["died_before_prediction", "earlier_code", "stay_ended"]})
    dropped = 0
    for task in tasks:
        rows = judge(timeline, task).join(told, on="dropped").drop_nulls("prediction_time")
        for subject, time, reason in rows.select("subject_id", "prediction_time", "dropped").iter_rows():
            (found,) = tokenizer.reasons_against(patients[subject], [CONFIGS[task.name]], time)
            assert found in UNANSWERABLE, (task.name, subject, time, reason)
            dropped += 1
    assert dropped > 100


def test_every_reason_is_explained_and_survives_json() -> None:
    assert set(UNANSWERABLE) < set(REASONS_AGAINST)
    assert json.loads(json.dumps(CONFIGS)) == CONFIGS
