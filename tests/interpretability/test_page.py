"""The page and the picture of a patient, the page of a cohort: what they hold, without a browser."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import time
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from ehrseq.hub.checkpoints import load_checkpoint
from ehrseq.interpretability import explain, methods_of
from ehrseq.interpretability.cohort_page import COHORT_COLUMNS, write_cohort_page
from ehrseq.interpretability.explanation import CONTRIBUTION_SCHEMA as SCHEMA
from ehrseq.interpretability.page import write_page
from ehrseq.interpretability.page_data import MOST_ATTENTION
from ehrseq.interpretability.picture import save_picture
from tests.checkpoints.patients import make_patient
from tests.checkpoints.stays import make_stay
from tests.interpretability.page_samples import TASKS, explained, record_of, rows_of, several, unanswered, weights_of
from tests.pages import Page, read_page

CHECKPOINTS = Path(__file__).resolve().parents[1] / "checkpoints"
HOSTILE = (
    "</script><img src=x onerror=\"document.title='hit'\">",
    "<!--<script>",
    "]]> & ' \" \u2028 \u2029 \\u003c",
    "{{7*7}} ${document.title}",
)


def data_of(source):
    """The page's data, as its script reads them."""
    written = re.search(r'<script type="application/json" id="data">(.*?)</script>', source, re.DOTALL)[1]
    return json.loads(written)


def rows_shown(data, answer):
    """Places of the items of an answer."""
    runs = answer["runs"]
    both = zip(runs[::2], runs[1::2], strict=True)
    return [place for start, length in both for place in range(start, start + length)]


def page_of(tmp_path, explanations, **options):
    return write_page(explanations, tmp_path / "patient.html", **options).read_text(encoding="utf-8")


def test_the_page_is_well_formed_and_needs_nothing_from_elsewhere(tmp_path):
    source = page_of(tmp_path, several(), tasks=TASKS)
    page = Page()
    page.feed(source)
    page.close()
    assert not page.open
    assert page.wants == []
    assert not re.search(r"url\((?!#)|@import|https?:(?!//www\.w3\.org/2000/svg)", source)
    assert "@media print" in source
    assert "prefers-color-scheme: dark" in source


def test_the_policy_allows_this_script_and_style_and_nothing_else(tmp_path):
    source = page_of(tmp_path, several())
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', source)[1]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))

    def digest(pattern):
        text = re.search(pattern, source, re.DOTALL)[1]
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    assert rules == {
        "default-src": "'none'",
        "style-src": digest(r"<style>(.*?)</style>"),
        "script-src": digest(r"<script>(.*?)</script>"),
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    assert source.index("Content-Security-Policy") < source.index("<style>")
    assert not re.search(r"<[^>]*\s(on\w+|style)=", source.split("<script")[0])
    for way in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "fetch(", "XMLHttp"):
        assert way not in source


def test_untrusted_text_cannot_leave_its_place(tmp_path):
    rows = rows_of(30, 3)
    for place, text in enumerate(HOSTILE * 3):
        rows[2 + place] |= {("code", "display", "unit", "text", "kind")[place % 5]: text}
        rows[2 + place]["value"] = None if place % 5 == 3 else 1.0
    hostile = {"baseline_name": HOSTILE[0], "settings": {HOSTILE[0]: HOSTILE[1]}, "notes": {HOSTILE[0]: 1}}
    each = explained(rows, subject=HOSTILE[0], label=f"{HOSTILE[0]}\ud800", **hostile)
    plain = explained(rows_of(30, 3))
    source = page_of(tmp_path, each, tasks=[TASKS[0] | {"definition": HOSTILE[0]}])
    assert len(re.findall(r"<(?![/!])", source)) == len(re.findall(r"<(?![/!])", page_of(tmp_path, plain)))
    data = data_of(source)
    assert data["patient"] == HOSTILE[0]
    assert set(HOSTILE) <= {*data["strings"], data["patient"]}


def test_the_data_are_those_of_the_explanations(tmp_path):
    explanations = several(events=120, visits=4)
    data = data_of(page_of(tmp_path, explanations, tasks=TASKS))
    items, strings = data["items"], data["strings"]
    since, at = [], 0
    for step in items["time"]:
        at += step or 0
        since.append(None if step is None else at)
    for answer, given in zip(data["answers"], explanations, strict=True):
        table = given.contributions
        places = rows_shown(data, answer)
        assert len(places) == table.height
        np.testing.assert_allclose(answer["contribution"], table["contribution"], rtol=1e-5)
        assert [strings[items["code"][place]] for place in places] == table["code"].to_list()
        assert [items["value"][place] for place in places] == pytest.approx(table["value"].to_list())
        assert [items["visit"][place] or None for place in places] == table["visit"].to_list()
        expected = [None if each is None else each // 1000 for each in table["time"].to_physical()]
        assert [since[place] for place in places] == expected
        whole = answer["baseline"] + sum(answer["contribution"]) + answer["remainder"]
        assert whole == pytest.approx(answer["logOdds"], abs=1e-4)
        assert answer["definition"] == next(task["definition"] for task in TASKS if task["name"] == given.task)
    assert [answer["after"] is not None for answer in data["answers"]] == [True, False, True, False]


def test_events_stand_once_whatever_the_number_of_explanations(tmp_path):
    one = len(page_of(tmp_path, several(2000, 20)[:1]))
    four = len(page_of(tmp_path, several(2000, 20)))
    assert four < one + 3 * 2000 * 30
    data = data_of(page_of(tmp_path, several(2000, 20)))
    assert len(data["items"]["time"]) == len(rows_of(2000, 20)) + 1  # the token of the other task


def test_equal_data_give_equal_bytes(tmp_path):
    assert page_of(tmp_path, several()) == page_of(tmp_path, several())
    assert page_of(tmp_path, several()) != page_of(tmp_path, several(seed=1))


def test_ten_thousand_events_are_a_page_of_less_than_five_megabytes(tmp_path):
    rows = rows_of(10_000, 60)
    methods = ("prefix_deltas", "integrated_gradients", "relevance")
    six = [explained(rows, task, method) for task in TASKS for method in methods]
    since = time.perf_counter()
    source = page_of(tmp_path, six)
    assert len(source.encode()) < 3_000_000
    assert time.perf_counter() - since < 10


def test_long_texts_are_cut_and_numbers_that_are_none_left_out(tmp_path):
    rows = rows_of(10, 1)
    rows[3] |= {"text": "x" * 100_000, "value": float("nan")}
    rows[4] |= {"value": float("inf")}
    data = data_of(page_of(tmp_path, explained(rows)))
    assert max(map(len, data["strings"])) <= 160
    assert data["items"]["value"][3:5] == [None, None]


def test_a_record_tells_its_visits_and_what_was_not_seen(tmp_path):
    rows = rows_of(60, 3)
    record = record_of(rows)
    explanation = explained(rows[10:])  # the context began later
    later = record.tail(1).with_columns(time=pl.lit(datetime(2099, 1, 1), pl.Datetime("us")))
    data = data_of(page_of(tmp_path, explanation, record=pl.concat([record, later])))
    hidden = [row for row in rows[:10] if row["event"] is not None and row["time"] is not None]
    assert data["record"]["seenIsKnown"]
    assert len(data["record"]["otherTime"]) == len(hidden)
    assert [name for *_, name in data["record"]["visits"]] == ["other visit", "emergency", "admission"]
    last = explanation.prediction_time
    assert max(end for _, end, _ in data["record"]["visits"]) <= (last - datetime(1970, 1, 1)).total_seconds() * 1000


def test_groups_have_their_names(tmp_path):
    rows = [
        dict.fromkeys(SCHEMA) | {"group": name, "kind": "group", "contribution": value}
        for name, value in (("labs", 0.4), ("x_y", -0.1))
    ]
    table = pl.DataFrame(rows, schema=SCHEMA)
    data = data_of(page_of(tmp_path, explained([], method="occlusion", contributions=table)))
    assert [data["strings"][place] for place in data["items"]["group"]] == ["labs", "x_y"]


def test_a_task_that_does_not_apply_has_its_reason(tmp_path):
    data = data_of(page_of(tmp_path, unanswered()))
    assert data["answers"][0]["reason"] == "died_before_prediction"
    assert data["answers"][0]["score"] is None
    assert data["answers"][0]["contribution"] == []


def test_attention_that_is_too_much_is_averaged_and_cut_and_it_is_told(tmp_path):
    def weights(layers, heads, size):
        tokens = pl.DataFrame(rows_of(size, 1)[:size], schema=SCHEMA)
        return weights_of([np.full((heads, size, size), 1 / size) for _ in range(layers)], "attention", tokens)

    def shown(*shape):
        return data_of(page_of(tmp_path, several(), attention=weights(*shape)))["attention"][0]

    small = shown(2, 3, 40)
    assert small["remarks"] == []
    assert [len(layer) for layer in small["bytes"]] == [3, 3]
    assert base64.b64decode(small["bytes"][1][2]) == b"\xff" * 1600
    averaged = shown(2, 12, 400)
    assert averaged["remarks"] == ["The mean of each layer's heads."]
    cut = shown(8, 2, 700)
    assert cut["remarks"][1].startswith("The last 433 of 700")
    assert sum(len(base64.b64decode(head)) for layer in cut["bytes"] for head in layer) <= MOST_ATTENTION


def test_shares_of_attention_are_told_from_other_weights(tmp_path):
    tokens = pl.DataFrame(rows_of(8, 1)[:8], schema=SCHEMA)
    shares, weights = np.full((8, 8), 1 / 8), np.linspace(0, 3, 8)
    given = {"attention": weights_of([shares], "attention", tokens), "fusion": weights_of([weights], "scan", tokens)}
    data = data_of(page_of(tmp_path, several(), **given))
    assert data["attention"][0]["shares"]
    assert data["attention"][0]["matrix"]
    assert not data["fusion"][0]["shares"]
    assert not data["fusion"][0]["matrix"]
    assert data["fusion"][0]["scale"] == [[3]]


@pytest.mark.parametrize("write", [write_page, save_picture])
@pytest.mark.parametrize(
    ("explanations", "message"),
    [
        (lambda: [], "there is no explanation"),
        (lambda: [several()[0], replace(several()[1], subject_id=18)], "one patient at one time were expected, got 2"),
        (lambda: [several()[0], replace(several()[1], prediction_time=None)], "write a file for each"),
        (lambda: [several()[0], several()[0]], "several explanations of mortality_30d by prefix_deltas"),
    ],
)
def test_bad_input_is_told(tmp_path, write, explanations, message):
    with pytest.raises(ValueError, match=message):
        write(explanations(), tmp_path / "file")
    assert not list(tmp_path.iterdir())


def test_a_record_without_codes_is_told(tmp_path):
    with pytest.raises(ValueError, match="lacks the columns"):
        write_page(several(), tmp_path / "page.html", record=pl.DataFrame({"time": [datetime(2020, 1, 1)]}))


FAMILIES = ("ehrmamba", "ehr_lstm", "cehrbert", "ehr_bigbird", "hymate")


@pytest.mark.parametrize("family", FAMILIES)
def test_what_every_family_has_is_on_its_page(tmp_path, family):
    checkpoint = load_checkpoint(CHECKPOINTS / family)
    patient = make_stay(7) if family == "hymate" else make_patient(7)
    task = checkpoint.model.config.tasks[0]
    explanation = explain(checkpoint, patient, task["name"], "prefix_deltas")
    weights = [name for name, method in methods_of(checkpoint.model).items() if not method.explains]
    shown = [explain(checkpoint, patient, task["name"], name) for name in weights]
    data = data_of(page_of(tmp_path, explanation, tasks=[task], attention=shown))
    assert [each["what"] for each in data["attention"]] == [each.what for each in shown]
    assert data["answers"][0]["definition"] == task["definition"]
    assert data["answers"][0]["methodWords"]
    assert save_picture(explanation, tmp_path / "patient.png").is_file()


def test_a_question_outside_of_what_was_learnt_keeps_its_explanation(tmp_path):
    given = several()[0]
    data = data_of(page_of(tmp_path, replace(given, reason="no_admission")))
    assert data["answers"][0]["reason"] == "no_admission"
    assert len(rows_shown(data, data["answers"][0])) == given.contributions.height


# -- the picture -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_record", [False, True])
def test_the_picture_is_a_png_of_every_explanation(tmp_path, with_record):
    rows = rows_of(80, 4)
    rows[5] |= {"display": "$ is no $formula"}
    both = [explained(rows), unanswered(prediction_time=explained(rows).prediction_time)]
    file = save_picture(both, tmp_path / "patient.png", record=record_of(rows) if with_record else None)
    assert file.read_bytes().startswith(b"\x89PNG")
    again = save_picture(both, tmp_path / "again.png", record=record_of(rows) if with_record else None)
    assert file.read_bytes() == again.read_bytes()


def test_the_picture_of_nothing_is_a_picture(tmp_path):
    assert save_picture(unanswered(), tmp_path / "patient.png").is_file()


def test_no_contributions_cannot_be_drawn(tmp_path):
    with pytest.raises(ValueError, match="most got 0"):
        save_picture(several(), tmp_path / "patient.png", most=0)


# -- a cohort ----------------------------------------------------------------------------------------------------------


def cohort(rows):
    return pl.DataFrame(rows, schema=list(COHORT_COLUMNS), orient="row")


COHORT = cohort(
    [
        ("DIAGNOSIS//ICD10CM//I50", "heart failure <b>", 40, 0.4, 0.51, 0.4, 0.62, "positive prediction"),
        ("LAB//LOINC//1", None, 9, 0.09, -0.2, -0.5, 0.1, "positive prediction"),
        ("MEDICATION//RXNORM//2", "few $ patients", 2, 0.02, 1.5, None, None, "positive prediction"),
        ("DIAGNOSIS//ICD10CM//I50", "heart failure <b>", 100, 0.1, 0.31, 0.2, 0.4, "all"),
    ]
)


def test_the_page_of_a_cohort_has_its_numbers(tmp_path):
    options = {"task": "mortality_30d", "method": "prefix_deltas", "words": ["From <here>."]}
    source = write_cohort_page(COHORT, tmp_path / "cohort.html", **options).read_text()
    page = read_page(source)
    words = " ".join(page.texts)
    expected = (
        "mortality 30d",
        "by prefix deltas",
        "From <here>.",
        "+0.510",
        "+0.400 to +0.620",
        "heart failure <b>",
    )
    assert all(part in words for part in expected)
    assert words.index("Positive prediction") < words.index("All")
    assert source.count("<svg") == 2
    assert "LAB//LOINC//1" in words  # the code where there is no name
    assert write_cohort_page(COHORT, tmp_path / "again.html", **options).read_text() == source


def test_few_patients_are_left_out_and_counted(tmp_path):
    source = write_cohort_page(COHORT, tmp_path / "cohort.html", task="t", least_patients=5).read_text()
    assert "few $ patients" not in source
    assert "Left out: 1 rows with fewer than 5 patients." in source
    empty = write_cohort_page(COHORT, tmp_path / "cohort.html", task="t", least_patients=500).read_text()
    assert "There is no contribution to show." in empty


@pytest.mark.parametrize(
    ("table", "options", "message"),
    [
        (COHORT.drop("mean"), {}, r"lacks the columns \['mean'\]"),
        ("cohort.parquet", {}, "must be a polars.DataFrame"),
        (COHORT, {"least_patients": 0}, "least_patients must be a whole number"),
    ],
)
def test_bad_cohorts_are_told(tmp_path, table, options, message):
    with pytest.raises(ValueError, match=message):
        write_cohort_page(table, tmp_path / "cohort.html", task="t", **options)


def test_names_of_codes_are_filled_in_where_there_is_none():
    explanation = explained(rows_of(30, 2))
    table = explanation.contributions
    code = table.filter(pl.col("display").is_null(), pl.col("event").is_not_null())["code"][0]
    named = explanation.named({code: "a name", table["code"][0]: "another"}).contributions
    assert set(named.filter(pl.col("code") == code)["display"]) == {"a name"}
    assert named["display"][0] == "female"  # it had one
    assert named.drop("display").equals(table.drop("display"))
