"""Kinds of codes and their parents."""

import pytest

from ehrseq.tokenization.ehr_codes import (
    DEFAULT_CODE_MAP,
    EVENT_KINDS,
    category_and_chapter,
    code_kinds,
    code_parents,
    resolve_input_kinds,
)


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("MEDS_BIRTH", "birth"),
        ("MEDS_DEATH", "death"),
        ("MEDS_DEATHLY", "other"),
        ("GENDER//F", "static"),
        ("RACE//WHITE", "static"),
        ("DIAGNOSIS//ICD10CM//I10", "diagnosis"),
        ("PROCEDURE//SNOMED//80146002", "procedure"),
        ("MEDICATION//RXNORM//860975", "medication"),
        ("IMMUNIZATION//CVX//140", "medication"),
        ("LAB//LOINC//2345-7", "lab"),
        ("VITAL//LOINC//8867-4", "vital"),
        ("SOMETHING//ELSE", "other"),
        ("VISIT_START//IMP", "visit_start:IMP"),
        ("VISIT_START//AMB", "visit_start:AMB"),
        ("VISIT_END//home", "visit_end:*"),
        ("VISIT_END//IMP", "visit_end:IMP"),
        ("HOSPITAL_ADMISSION//EW EMER.//EMERGENCY ROOM", "visit_start:IMP"),
        ("HOSPITAL_DISCHARGE//HOME", "visit_end:IMP"),
        ("ED_REGISTRATION", "visit_start:EMER"),
        ("ED_OUT", "visit_end:EMER"),
        ("ICU_ADMISSION//Medical Intensive Care Unit (MICU)", "visit_start:ICU"),
        ("ICU_DISCHARGE//Medical Intensive Care Unit (MICU)", "visit_end:ICU"),
        ("INFUSION_START//225158", "medication"),
        ("TRANSFER_TO//admit//Med/Surg/GYN", "other"),
        ("Blood Pressure", "vital"),
        ("Visit/IP", "visit_start:IMP"),
        ("Visit/IP/end", "visit_end:IMP"),
        ("Visit/ER", "visit_start:EMER"),
        ("Visit/OP", "visit_start:AMB"),
        ("ICD10CM/I10", "diagnosis"),
        ("ICD10PCS/0DTJ4ZZ", "procedure"),
        ("RxNorm/860975", "medication"),
        ("LOINC/2345-7", "lab"),
        ("Gender/F", "static"),
    ],
)
def test_the_default_map_knows_the_namespaces(code: str, kind: str) -> None:
    assert code_kinds([code]) == [kind]


def test_a_map_of_ones_own_decides_in_its_order() -> None:
    rules = [["X//LAB", "lab"], ["X//", "ignore"], [r"STAY//(\w+)", r"visit_start:\1"]]
    assert code_kinds(["X//LAB//1", "X//1", "STAY//IMP", "Y"], rules) == ["lab", "ignore", "visit_start:IMP", "other"]


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([["(", "lab"]], "no regular expression"),
        ([["X", "laboratory"]], "expected one of"),
        ([["X", "visit_start"]], "visit_start:IMP"),
        ([["X"]], "pairs"),
        (["X"], "pairs"),
    ],
)
def test_a_bad_map_is_refused(rules: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        code_kinds(["X"], rules)


@pytest.mark.parametrize(
    ("code", "parents"),
    [
        ("DIAGNOSIS//ICD10CM//I10", ["DIAGNOSIS//ICD10CM//I00-I99"]),
        ("DIAGNOSIS//ICD10CM//E11.65", ["E1165", "E11.6", "E116", "E11", "E00-E99"]),
        ("DIAGNOSIS//ICD//10//E1165", ["E11.65", "E116", "E11.6", "E11", "E00-E99"]),
        ("DIAGNOSIS//mimic-diagnosis-icd9//41071", ["410.71", "4107", "410.7", "410", "390-459"]),
        ("DIAGNOSIS//ICD9CM//V58.61", ["V5861", "V58.6", "V586", "V58", "V01-V91"]),
        ("DIAGNOSIS//ICD9CM//E878", ["E000-E999"]),
        ("ICD10CM/C7A.1", ["C7A1", "C7A", "C00-D49"]),
        ("DIAGNOSIS//ICD10CM//O9A.1", ["O9A1", "O9A", "O00-O99"]),
        ("PROCEDURE//ICD//9//7094", ["70.94", "709", "70.9", "70"]),
        ("PROCEDURE//ICD10PCS//0DTJ", ["0DT.J", "0DT"]),
        ("LAB//LOINC//2345-7", []),
        ("MEDICATION//RXNORM//860975", []),
    ],
)
def test_parents_stand_nearest_first(code: str, parents: list[str]) -> None:
    head = code[: max(code.rfind("//") + 2, code.rfind("/") + 1)]
    assert code_parents(code) == [p if p.startswith(head) else head + p for p in parents]


def test_categories_and_chapters_are_the_parents_a_vocabulary_keeps() -> None:
    assert category_and_chapter("ICD10CM/I13.12") == ["ICD10CM/I13", "ICD10CM/I00-I99"]
    assert category_and_chapter("ICD10CM/I10") == ["ICD10CM/I00-I99"]
    assert category_and_chapter("PROCEDURE//ICD//9//7094") == ["PROCEDURE//ICD//9//70"]


@pytest.mark.parametrize("revision", ["ICD10CM", "ICD9CM"])
def test_every_category_has_one_chapter(revision: str) -> None:
    categories = (
        [f"{letter}{number:02d}" for letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZ" for number in range(100)]
        if revision == "ICD10CM"
        else [f"{number:03d}" for number in range(1, 1000)]
    )
    for category in categories:
        (chapter,) = code_parents(f"DIAGNOSIS//{revision}//{category}")
        low, high = chapter.rpartition("/")[2].split("-")
        assert low <= category
        assert category[0] <= high[0]  # the last numbers of some letters are not assigned


def test_input_kinds() -> None:
    assert resolve_input_kinds(None) == list(EVENT_KINDS) == resolve_input_kinds("all")
    assert set(resolve_input_kinds("paper")) == {"procedure", "medication", "lab"}
    assert resolve_input_kinds(["lab", "diagnosis", "lab"]) == ["diagnosis", "lab"]
    for wrong in ("papers", ["labs"], []):
        with pytest.raises(ValueError, match=r"expected some of|preset"):
            resolve_input_kinds(wrong)


def test_the_default_map_compiles_and_has_no_shadowed_rule() -> None:
    patterns = [pattern for pattern, _ in DEFAULT_CODE_MAP]
    assert len(patterns) == len(set(patterns))
