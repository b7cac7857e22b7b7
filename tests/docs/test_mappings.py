"""The tables of `docs/reference/mappings.md` that are written by hand say what the code does, row by row; so do the
tables that the site takes from the code.
"""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

from ehrseq.data import instants, meds_mending, unread_codes
from ehrseq.data.fhir import (
    classes,
    concepts,
    death_words,
    dispositions,
    elements,
    lookups,
    medications,
    periods,
    systems,
)
from ehrseq.data.units import EQUAL, UNIT_PARTS, WHOLE, canonical_unit
from ehrseq.tokenization.ehr_codes import EXPIRED, INPATIENT_CLASSES

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "reference" / "mappings.md").read_text(encoding="utf-8")
CODE = re.compile(r"`([^`]+)`")
Rows = list[list[str]]


def rows_of(text: str, head: str) -> Rows:
    """Cells of the table whose first line begins so, without its head."""
    lines = text[text.index(f"| {head}") :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if line.startswith("|")]


def codes_in(cell: str) -> frozenset[str]:
    return frozenset(CODE.findall(cell))


def code_in(cell: str) -> str:
    return CODE.findall(cell)[0]


def section(heading: str) -> str:
    return PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]


DIED = section('Discharge dispositions that say "died"')
CLASSES = section("Classes of encounters")
NOT = section('What says "not"')


def test_the_dispositions_that_say_died_are_those_of_the_code() -> None:
    written = {code_in(system): codes_in(codes) for system, codes, _ in rows_of(DIED, "system | codes")}
    snomed = frozenset(re.findall(r"^\| \[(\d+)\]", DIED, flags=re.MULTILINE))
    assert written.pop("http://snomed.info/sct") == frozenset()
    assert written | {"http://snomed.info/sct": snomed} == dispositions.DEATH_CODES


def test_every_disposition_has_a_source() -> None:
    assert all(source for _, _, source in rows_of(DIED, "system | codes"))


def test_a_snomed_code_links_to_itself() -> None:
    linked = re.findall(r"\[(\d+)\]\(https://snomed.info/id/(\d+)\)", PAGE)
    assert linked
    assert all(shown == target for shown, target in linked)


def test_the_words_that_say_died_are_those_of_the_code() -> None:
    rows = rows_of(DIED, "language")
    assert {row[0]: codes_in(row[1]) for row in rows} == {
        language: frozenset(words) for language, words in death_words.DEATH_WORDS.items()
    }
    assert {row[0]: codes_in(row[2]) for row in rows} == {
        language: frozenset(words) for language, words in death_words.DENYING_WORDS.items()
    }


@pytest.mark.parametrize("language", death_words.DEATH_WORDS)
def test_every_word_of_death_says_so_and_every_denial_of_its_language_denies_it(language: str) -> None:
    for word in death_words.DEATH_WORDS[language]:
        assert death_words.says_death(word) == death_words.DEAD
        for denial in death_words.DENYING_WORDS[language]:
            assert death_words.says_death(f"{denial} {word}") == death_words.ALIVE


@pytest.mark.parametrize("table", [death_words.UNCLEAR_BEFORE, death_words.EXPIRING, death_words.UNCLEAR_AFTER])
def test_what_makes_a_death_unclear_is_on_the_page(table: tuple[str, ...]) -> None:
    assert frozenset(table) in {codes_in(paragraph) for paragraph in DIED.split("\n\n")}


@pytest.mark.parametrize("word", death_words.UNCLEAR_BEFORE)
def test_what_makes_a_death_unclear_does(word: str) -> None:
    assert death_words.says_death(f"{word} died") == death_words.UNCLEAR


def test_the_classes_are_those_of_the_code() -> None:
    rows = rows_of(CLASSES, "class | meaning")
    assert {code_in(row[0]) for row in rows} == classes.CLASSES
    assert {code_in(row[0]) for row in rows if row[2].startswith("yes")} == INPATIENT_CLASSES


def test_the_codes_of_classes_are_those_of_the_code() -> None:
    written: dict[str, dict[str, str]] = {}
    for system, code, _, read_as in rows_of(CLASSES, "system | code"):
        name = "SNOMED" if "SNOMED" in system else "0004"
        written.setdefault(name, {})[code_in(code)] = code_in(read_as)
    known = dict(classes.CLASS_CODES)
    assert written["SNOMED"] == known.pop("http://snomed.info/sct")
    assert all(f"`{system}`" in CLASSES and codes == written["0004"] for system, codes in known.items())


def test_the_statuses_of_encounters_are_those_of_the_code() -> None:
    rows = rows_of(section("Statuses of encounters without an end"), "status")
    ended, going_on, _, left_out = (codes_in(row[0]) for row in rows)
    assert ended == periods.OVER
    assert going_on == periods.ONGOING
    assert left_out == {*lookups.LEFT_OUT_STATUSES["Encounter"], "entered-in-error"}


def test_what_says_not_is_that_of_the_code() -> None:
    rows = [(element, system, codes_in(codes)) for element, system, codes, _ in rows_of(NOT, "element")]
    stated = {code for element, system, codes in rows if element == "verificationStatus" for code in codes}
    absent = {code for element, system, codes in rows if (element, system) == ("code", "SNOMED CT") for code in codes}
    assert stated == {*frozenset().union(*concepts.NOT_CONFIRMED.values()), *concepts.SNOMED_NOT}
    assert absent == concepts.ABSENT_FINDINGS
    assert concepts._ABSENT_UNKNOWN in NOT
    assert concepts._CERTAINTY_SYSTEMS in NOT.lower()


def test_what_a_snomed_status_stands_for_is_its_meaning() -> None:
    meanings = {code: row[3] for row in rows_of(NOT, "element") for code in codes_in(row[2])}
    for code, status in concepts.SNOMED_NOT.items():
        assert (status == "entered-in-error") == (meanings[code] == "Entered in error")


def test_the_statuses_that_are_left_out_are_those_of_the_code() -> None:
    written = {kind: codes_in(codes) for kind, codes in rows_of(NOT, "resource")}
    known = {kind: frozenset(codes) for kind, codes in lookups.LEFT_OUT_STATUSES.items() if codes}
    assert written == known
    assert all(f"`{intent}`" in NOT for intent in medications._ORDERS)


def test_the_codes_of_old_meds_datasets_are_those_of_the_code() -> None:
    text = section("MEDS datasets")
    rows = rows_of(text, "code | meaning")
    written = {code: code_in(read_as) for codes, _, read_as in rows for code in codes_in(codes)}
    assert written == meds_mending.OLD_CODES
    died = {code for ends, _ in rows_of(text, "what stands after") for code in codes_in(ends)}
    assert all(re.search(EXPIRED, f"VISIT_END//{code}") for code in died)
    words = set(re.findall(r"[a-z]{3,}", EXPIRED))
    assert words <= died
    assert f"`{meds_mending.DEATH_TYPE}`" in text
    denied = next(
        paragraph for paragraph in text.split("\n\n") if "whose text is one of" in paragraph.replace("\n", " ")
    )
    assert codes_in(denied) >= unread_codes._SAYS_NO


def test_the_examples_of_codes_that_look_like_a_death_do_and_the_others_do_not() -> None:
    (paragraph,) = [
        text for text in section("MEDS datasets").split("\n\n") if text.startswith("Other codes that no rule")
    ]
    like, unlike = (codes_in(part) for part in paragraph.split("They do not"))
    assert unread_codes.deathlike_codes(like) == sorted(like)
    assert unread_codes.deathlike_codes(unlike) == []


def test_the_dates_that_stand_for_none_are_those_of_the_code() -> None:
    ((_, years, days),) = rows_of(section("Dates that stand for none"), "source")
    assert years == f"before {instants.FIRST_YEAR}, after {instants.LAST_YEAR}"
    assert codes_in(days) == instants.PLACEHOLDER_DAYS


# -- tables that the site takes from the code --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("site_hooks", ROOT / "docs" / "_hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_spelling_of_a_system_is_on_the_site(hooks: ModuleType) -> None:
    rows = {code_in(row[0]): row[1:] for row in rows_of(hooks.code_systems(), "short name")}
    for system, name in systems.SYSTEM_NAMES.items():
        assert system.removeprefix("urn:oid:") in codes_in(" ".join(rows[name]))


@pytest.mark.parametrize(
    ("path", "known"),
    [
        ("ehrseq.data.fhir.classes.CLASS_WORDS", classes.CLASS_WORDS),
        ("ehrseq.data.fhir.elements.CATEGORY_KINDS", elements.CATEGORY_KINDS),
        ("ehrseq.data.units.EQUAL", EQUAL),
        ("ehrseq.data.meds_mending.SPELLINGS", meds_mending.SPELLINGS),
    ],
)
def test_every_word_is_on_the_site_beside_what_it_is_read_as(hooks: ModuleType, path: str, known: dict) -> None:
    rows = {code_in(row[0]): codes_in(row[1]) for row in rows_of(hooks.mapping(path), "read as")}
    assert {word: name for name, words in rows.items() for word in words} == known


@pytest.mark.parametrize(
    ("path", "known"), [("ehrseq.data.units.UNIT_PARTS", UNIT_PARTS), ("ehrseq.data.units.WHOLE", WHOLE)]
)
def test_every_spelling_of_a_unit_is_on_the_site_and_read_so(hooks: ModuleType, path: str, known: dict) -> None:
    rows = {code_in(row[0]): codes_in(row[1]) for row in rows_of(hooks.mapping(path), "read as")}
    assert rows == {unit: frozenset(spellings) for unit, spellings in known.items()}
    if known is WHOLE:
        assert all(canonical_unit(text) == unit for unit, spellings in rows.items() for text in spellings)
