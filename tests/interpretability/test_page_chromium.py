"""The page of a patient in headless Chromium: what a person clicks, presses, prints and waits for."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import polars as pl
import pytest

from ehrseq.interpretability.explanation import CONTRIBUTION_SCHEMA as SCHEMA
from ehrseq.interpretability.page import write_page
from tests.chromium import Chromium, find_chromium
from tests.interpretability.page_samples import TASKS, explained, record_of, rows_of, several, unanswered, weights_of

pytestmark = pytest.mark.skipif(find_chromium() is None, reason="no headless browser on this machine")

SETTLED = "new Promise(done => requestAnimationFrame(() => setTimeout(done, 150)))"
GROUPS = "#groups .level1"


@pytest.fixture(scope="module")
def browser():
    with Chromium() as chromium:
        yield chromium


@pytest.fixture
def look(browser, tmp_path):
    """Opens the page of explanations in a window, and in the end asks that nothing was wrong."""

    def at(explanations, width=1200, **options):
        browser.media()
        browser.size(width, 900)
        browser.open(write_page(explanations, tmp_path / "patient.html", **options))
        browser.run(SETTLED)
        return browser

    browser.problems.clear()
    browser.asked.clear()
    yield at
    assert browser.problems == []
    assert {address.split(":")[0] for address in browser.asked} <= {"file"}


def text(browser, selector):
    return browser.run(f"document.querySelector({json.dumps(selector)}).textContent")


def number(browser, selector):
    return browser.run(f"document.querySelectorAll({json.dumps(selector)}).length")


def test_a_visit_opens_to_kinds_and_a_kind_to_events(look):
    explanation = several(400, 12)[0]
    page = look(explanation)
    assert number(page, GROUPS) == 14  # visits, facts without a time, the question
    assert number(page, ".event") == 0  # nothing is built before it is opened
    visit = f"{GROUPS}:nth-child(4)"
    assert "Visit 3" in text(page, visit)
    page.click(f"{visit} button")
    kinds = number(page, f"{visit} .level2")
    own = explanation.contributions.filter(pl.col("visit") == 3)
    assert kinds == own["kind"].n_unique()
    page.run(f"document.querySelectorAll('{visit} .level2 > button[aria-expanded=false]').forEach(b => b.click())")
    assert number(page, f"{visit} .event") == own.height
    shown = sum(float(each.replace("−", "-")) for each in page.run(
        f"[...document.querySelectorAll('{visit} .event .value')].map(e => e.textContent)"
        ".filter(t => !t.startsWith('≈'))"
    ))  # fmt: skip
    assert shown == pytest.approx(own["contribution"].sum(), abs=0.005 * own.height)
    page.click(f"{visit} button")
    assert page.run(f"document.querySelector('{visit} .below').hidden")


def test_task_and_method_are_switched(look):
    explanations = several()
    page = look(explanations, tasks=TASKS)
    assert text(page, "#definition") == TASKS[0]["definition"]
    for task, method in ((1, 1), (1, 0), (0, 1), (0, 0)):
        page.click(f"#tasks button:nth-child({task + 1})")
        page.click(f"#methods button:nth-child({method + 1})")
        given = explanations[2 * task + method]
        shown = float(text(page, "#answer-title").removeprefix("Risk ").split("\u00a0")[0])
        assert shown == pytest.approx(100 * given.score, abs=0.051)
        assert given.label in text(page, "#answer-title")
        first = given.contributions.filter(pl.col("event").is_not_null())
        first = first.sort(pl.col("contribution").abs(), descending=True).row(0, named=True)
        assert (first["display"] or first["code"]) in text(page, "#top tbody tr")
        assert number(page, "#tasks [aria-pressed=true]") == number(page, "#methods [aria-pressed=true]") == 1
        # The risk on the way is told by prefix deltas under both methods.
        assert number(page, "#record .course") == 1


def test_order_span_and_all(look):
    explanation = several(400, 12)[0]
    page = look(explanation)
    page.click("#orders button:nth-child(2)")
    sums = explanation.contributions.group_by("visit").agg(pl.col("contribution").sum()).drop_nulls()
    largest = sums.sort(pl.col("contribution").abs(), descending=True)["visit"][0]
    assert f"Visit {largest} " in text(page, f"{GROUPS}:nth-child(1)")
    page.click("#open-all")
    assert number(page, f"{GROUPS} > button[aria-expanded=true]") == 14
    ticks = "document.querySelector('#record .tick').getAttribute('d').length"
    whole = page.run(ticks)
    page.click("#spans button:last-child")
    assert page.run(ticks) < whole
    assert page.run("document.querySelector('#spans button:last-child').getAttribute('aria-pressed')") == "true"


def test_a_visit_of_the_timeline_leads_to_its_line(look):
    rows = rows_of(200, 6)
    page = look(explained(rows), record=record_of(rows))
    assert number(page, "#record .visit") == 6
    assert number(page, "#record .admission") == 2
    page.click("#record .visit:nth-of-type(3)")
    assert page.run("document.activeElement.textContent").startswith("Visit 3")
    assert page.run("document.activeElement.getAttribute('aria-expanded')") == "true"


def test_everything_is_reached_by_the_keyboard(look):
    page = look(several())
    reached = []
    for _ in range(60):
        page.press("Tab")
        reached.append(page.run("document.activeElement.textContent"))
    assert reached[0].startswith("mortality 30d")
    assert reached[2] == "prefix deltas"
    for wanted in ("integrated gradients", "by size", "Open all", "Visit 12"):
        assert any(each.startswith(wanted) for each in reached), wanted
    # Enter and the space bar press; the place is not lost when the buttons are drawn anew.
    page.run("document.querySelector('#tasks button:nth-child(2)').focus()")
    page.press("Enter")
    assert "return" in text(page, "#answer-title")
    assert page.run("document.activeElement.textContent").startswith("readmission 30d")
    page.run(f"document.querySelector('{GROUPS} button').focus()")
    page.press(" ")
    assert page.run("document.activeElement.getAttribute('aria-expanded')") == "true"


def test_untrusted_text_stays_text(look):
    hostile = "</script><img src=x onerror=\"document.title='hit'\"><script>document.title='hit'</script>"
    rows = rows_of(40, 2)
    for row in rows:
        if row["event"] is not None:
            row |= {"code": hostile, "display": hostile, "unit": hostile, "text": hostile}
    changes = {"label": hostile, "baseline_name": hostile, "settings": {hostile: hostile}, "notes": {hostile: 2}}
    page = look(explained(rows, subject=hostile, **changes), tasks=[TASKS[0] | {"definition": hostile}])
    page.click("#open-all")
    page.run(f"document.querySelectorAll('.level2 > button').forEach(b => b.click()); {SETTLED}")
    assert number(page, "img") == 0
    assert number(page, "script") == 2
    assert page.run("document.title") == f"Patient {hostile}: explanation"
    assert text(page, "#patient") == f"Patient {hostile}"


def test_the_policy_stops_what_would_be_loaded(look):
    page = look(several())
    blocked = page.run(
        "new Promise(done => { document.addEventListener('securitypolicyviolation', e => done(e.effectiveDirective)); "
        "const image = document.createElement('img'); image.src = 'https://localhost:9/a.png'; "
        "document.body.append(image); setTimeout(() => done('nothing'), 3000) })"
    )
    assert blocked == "img-src"
    page.problems.clear()  # the console tells the same, and that it was asked for
    page.asked.clear()


def test_ten_thousand_events_are_there_in_two_seconds_and_open_at_once(look):
    rows = rows_of(10_000, 60)
    methods = ("prefix_deltas", "integrated_gradients", "relevance")
    page = look([explained(rows, task, method) for task in TASKS for method in methods], record=record_of(rows))
    shown, painted = page.run(
        "[performance.getEntriesByName('ehrseq-shown')[0].startTime,"
        " performance.getEntriesByName('first-contentful-paint')[0].startTime]"
    )
    assert max(shown, painted) < 2000  # milliseconds; a fifth of a second on two idle cores
    assert number(page, "*") < 3000
    assert page.run("(() => { const t = performance.now(); openNothing = document.querySelector('#open-all'); "
                    "openNothing.click(); return performance.now() - t })()") < 2000  # fmt: skip
    page.click("#methods button:nth-child(2)")
    assert "integrated gradients" in text(page, "#method")


def test_thousands_of_events_of_one_kind_come_a_hundred_at_a_time(look):
    rows = [row | {"kind": "lab", "visit": 1} for row in rows_of(3000, 1) if row["event"] is not None]
    page = look(explained(rows))
    page.click(f"{GROUPS} button")
    assert number(page, ".event") == 100
    page.click(".more")
    assert number(page, ".event") == 200
    assert text(page, ".more") == "Show 100 more of 2,800"


def test_a_stay_without_visits_is_cut_by_time(look):
    page = look(explained(rows_of(60, 1, visits_known=False)))
    assert "from 2012-" in text(page, "#groups")
    assert "Visit" not in text(page, "#groups")


@pytest.mark.parametrize("with_events", [False, True])
def test_groups_are_lines_that_do_not_open(look, with_events):
    rows = rows_of(100, 3)
    groups = [
        dict.fromkeys(SCHEMA) | {"group": f"visit {number}", "kind": "visit", "visit": number, "contribution": value}
        for number, value in ((1, 0.5), (2, -0.25))
    ]
    by_visit = explained(rows, method="occlusion", contributions=pl.DataFrame(groups, schema=SCHEMA))
    page = look([by_visit, *([explained(rows)] if with_events else [])], record=record_of(rows))
    assert text(page, "#groups") == "visit 1+0.50visit 2−0.25"
    assert text(page, "#top tbody") == "visit 1+0.50×\u00a01.65visit 2−0.25×\u00a00.779"
    assert page.run("document.querySelector('#open-all').hidden")
    # The record is drawn all the same.
    assert number(page, "#record .visit") == 3
    assert page.run("document.querySelector('#record .tick').getAttribute('d').length") > 10


def test_a_task_that_does_not_apply_tells_why(look):
    both = [several()[0], unanswered(prediction_time=several()[0].prediction_time)]
    page = look(both)
    page.click("#tasks button:nth-child(2)")
    assert "died before prediction" in text(page, "#reason")
    assert page.run("document.querySelector('#sum').hidden && document.querySelector('#all').hidden")
    page.click("#tasks button:nth-child(1)")
    assert not page.run("document.querySelector('#sum').hidden")


def test_a_question_outside_of_what_was_learnt_is_told_beside_its_explanation(look):
    page = look(replace(several()[0], reason="no_admission"))
    assert "with care" in text(page, "#reason")
    assert "no admission" in text(page, "#reason")
    assert not page.run("document.querySelector('#sum').hidden")


def test_an_empty_record_is_a_page(look):
    page = look(explained([], prediction_time=None, subject=None))
    assert "no event" in text(page, "#record")
    assert text(page, "#patient") == "Patient"


def test_the_matrix_tells_the_pair_under_the_pointer_and_the_keys(look):
    size = 50
    tokens = pl.DataFrame(rows_of(60, 2)[:size], schema=SCHEMA)
    heads = np.zeros((2, size, size))
    heads[0, 3, 2], heads[1, size - 1, size - 2] = 0.5, 0.25
    page = look(several(), attention=[weights_of([heads, heads[::-1]], "attention", tokens)])
    page.run("document.querySelector('#matrix').focus()")
    page.press("ArrowUp")
    page.press("ArrowLeft")
    assert f"{size} · " in text(page, "#cell")
    assert f"looks at {size - 1} · " in text(page, "#cell")
    assert text(page, "#cell").endswith(": 0")
    page.run("(() => { const s = document.querySelectorAll('#attention-controls select')[1]; s.value = 1; "
             "s.dispatchEvent(new Event('change')) })()")  # fmt: skip
    assert text(page, "#cell").endswith(": 0.25")
    page.run(
        "(() => { const c = document.querySelector('#matrix'), b = c.getBoundingClientRect(), s = b.width / 50; "
        "c.dispatchEvent(new PointerEvent('pointermove', {clientX: b.x + 2.5 * s, clientY: b.y + 3.5 * s})) })()"
    )
    assert text(page, "#cell").startswith("4 · ")
    # The other layer has the heads the other way round.
    page.run("(() => { const s = document.querySelector('#attention-controls select'); s.value = 1; "
             "s.dispatchEvent(new Event('change')) })()")  # fmt: skip
    assert text(page, "#cell").endswith(": 0")


def test_weights_of_a_stay_are_bars_by_variable(look):
    tokens = pl.DataFrame(
        [row | {"display": row["code"]} for row in rows_of(100, 1, visits_known=False)], schema=SCHEMA
    )
    weights = np.linspace(0, 1, tokens.height) / tokens.height
    page = look(several(), fusion=weights_of([weights], "fusion weights", tokens))
    sums = tokens.with_columns(weight=weights).group_by("code").agg(pl.col("weight").sum())
    first = sums.sort("weight", descending=True).row(0)
    assert text(page, "#weights text[text-anchor=end]") == first[0]
    assert number(page, "#weights .weight") > 0
    assert page.run("document.querySelector('#attention').hidden")


@pytest.mark.parametrize("width", [1200, 390])
def test_nothing_stands_over_the_edge(look, width):
    rows = rows_of(300, 8)
    for row in rows[::3]:
        row |= {"display": None, "code": "MEDICATION//RXNORM//" + "1234567890" * 3}
    page = look(explained(rows), width)
    assert page.run("[...document.querySelectorAll('.wide, .plot')].every(e => e.scrollWidth <= e.clientWidth)")
    page.click("#open-all")
    assert page.run("document.documentElement.scrollWidth") <= width
    beyond = page.run(
        "[...document.querySelectorAll('.line, button')].filter(e => e.getBoundingClientRect().right > innerWidth + 1)"
        ".map(e => e.textContent)"
    )
    assert beyond == []


def test_dark_and_paper(look, tmp_path):
    page = look(several())
    light = page.run("getComputedStyle(document.body).backgroundColor")
    page.media(prefers_color_scheme="dark")
    assert page.run("getComputedStyle(document.body).backgroundColor") != light
    page.media("print")
    assert page.run("getComputedStyle(document.querySelector('.controls')).display") == "none"
    page.media()
    assert page.paper(tmp_path / "patient.pdf").read_bytes().startswith(b"%PDF")
