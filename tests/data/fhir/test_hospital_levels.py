"""The levels of one stay (hospital, department, ward) as encounters inside one another are one admission."""

from itertools import permutations

import pytest

from ehrseq.data.fhir.encounters import WITHIN_ANOTHER
from ehrseq.tasks import label_events
from tests.data.fhir.samples import V3, coded, encounter, patient, read, rows, write_ndjson

START, MOVE, BACK, END = (f"2031-05-{day}T10:00:00+02:00" for day in ("02", "06", "07", "14"))
ROOT = encounter("a", START, END)


def level(name: str, start: str, end: str | None, within: str = "a", **more):
    return encounter(name, start, end, partOf={"reference": f"Encounter/{within}"}, **more)


def labels(events, task: str) -> list[bool]:
    result = label_events(events, task, end_of_data="2034-01-01", progress=False)
    return result.labels[task]["boolean_value"].to_list()


ACUTE = {"class": {"system": V3, "code": "ACUTE"}}
EMERGENCY = {"class": {"system": V3, "code": "EMER"}}
HOME, ELSEWHERE = (
    {"hospitalization": {"dischargeDisposition": coded(("http://x", code))}} for code in ("home", "other-hcf")
)


@pytest.mark.parametrize(
    "levels",
    [
        [ROOT, level("b", START, MOVE), level("c", BACK, END)],
        [level("c", BACK, END), level("b", START, MOVE), ROOT],
        [ROOT, level("b", START, MOVE, **ACUTE), level("c", BACK, END, **ACUTE)],
        [ROOT, level("b", START, END), level("c", START, MOVE, "b"), level("d", BACK, END, "b")],
        [encounter("a", START, END, **HOME), level("b", START, MOVE, **ELSEWHERE), level("c", BACK, END, **HOME)],
        [ROOT, level("b", START, MOVE, **EMERGENCY)],
        [encounter("a", "2031-05-02", "2031-05-14"), level("b", START, MOVE), level("c", BACK, END)],
        [ROOT, level("b", START, MOVE), level("c", START, BACK), level("d", MOVE, END)],
        [ROOT, encounter("b", START, END)],  # one stay under two ids
    ],
)
def test_levels_that_begin_or_end_together_are_one_admission(levels):
    events, _ = read(patient(), *levels)
    assert labels(events, "long_stay_7d") == [True]
    assert labels(events, "readmission_30d") == [False]


def test_the_order_of_the_resources_changes_nothing():
    levels = [ROOT, level("b", START, MOVE), level("c", BACK, END)]
    made = [read(patient(), *order)[0].rows() for order in permutations(levels)]
    assert all(table == made[0] for table in made)


def test_what_an_inner_level_does_not_add_is_counted():
    events, report = read(patient(), ROOT, level("b", START, MOVE), level("c", BACK, END))
    assert [len(rows(events, kind)) for kind in ("VISIT_START", "VISIT_END")] == [1, 1]
    assert report.notes[WITHIN_ANOTHER] == 2


def test_an_inner_level_that_ends_does_not_discharge_a_stay_that_goes_on():
    root = encounter("a", START, None, status="in-progress")
    events, _ = read(patient(), root, level("b", START, MOVE))
    assert labels(events, "long_stay_7d") == [True]
    assert labels(events, "readmission_30d") == []


def test_stays_of_an_episode_that_is_no_admission_stay_apart():
    episode = encounter("a", START, "2031-09-01T10:00:00+02:00", **{"class": {"system": V3, "code": "AMB"}})
    later = level("c", "2031-05-20T10:00:00+02:00", "2031-05-24T10:00:00+02:00")
    events, _ = read(patient(), episode, level("b", START, MOVE), later)
    assert labels(events, "readmission_30d") == [True, False]


def test_levels_are_one_stay_for_every_reader(tmp_path):
    from ehrseq.data import EventDataset
    from ehrseq.prepare import prepare_dataset
    from ehrseq.work.engine import get_engine

    (tmp_path / "export").mkdir()
    write_ndjson(tmp_path / "export" / "Patient.ndjson", patient())
    write_ndjson(tmp_path / "export" / "Encounter.ndjson", level("b", START, MOVE), level("c", BACK, END), ROOT)
    prepare_dataset(tmp_path / "export", tmp_path / "dataset", engine=get_engine(num_workers=1))
    assert labels(EventDataset(tmp_path / "dataset").events(), "readmission_30d") == [False]
