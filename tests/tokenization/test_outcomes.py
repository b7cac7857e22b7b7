"""Outcomes from words and codes to tokens, against a vocabulary of a few tokens by hand."""

import numpy as np
import pytest

from ehrseq.tokenization.ehr_codes import DEFAULT_CODE_MAP, EVENT_KINDS
from ehrseq.tokenization.ehr_outcomes import (
    codes_of_tokens,
    death_ids,
    limited_bins,
    read_outcomes,
    visit_end_ids,
    visit_start_ids,
)
from ehrseq.tokenization.ehr_vocabulary import SPECIAL_TOKENS, Bins, EventVocabulary
from tests.tokenization.timelines import event, fitted

POTASSIUM, GLUCOSE, IN_CODE = "LAB//LOINC//2823-3", "LAB//LOINC//2345-7", "LAB//50971//mEq/L"
EVENTS = [
    "MEDS_DEATH",
    "VISIT_END//exp",
    "VISIT_END//home",
    "VISIT_START//IMP",
    "VISIT_START//ACUTE",
    "VISIT_START//AMB",
    "ICU_ADMISSION//MICU",
    "ICU_DISCHARGE//MICU",
    "DIAGNOSIS//ICD10CM//I50",
    "DIAGNOSIS//ICD10CM//I50.9",
    "DIAGNOSIS//ICD10CM//I10",
    "LAB//COVID",
    "LAB//COVID//POSITIVE",
    "LAB//FLU//POSITIVE",
    POTASSIUM,
    *(f"{POTASSIUM}//mmol/L_{k}" for k in range(4)),
    *(f"{GLUCOSE}//mg/dL_{k}" for k in range(3)),
    *(f"{GLUCOSE}//mmol/L_{k}" for k in range(2)),
    *(f"{IN_CODE}_{k}" for k in range(2)),
]
TASK = "[MOR_1M]"
BINS = {
    POTASSIUM: {"mmol/L": [3.5, 4.5, 5.5]},
    GLUCOSE: {"mg/dL": [90.0, 120.0], "mmol/L": [5.0]},
    IN_CODE: {"": [5.0]},
}


def make_vocabulary(tokens: list[str] = EVENTS, kinds: tuple[str, ...] = EVENT_KINDS) -> EventVocabulary:
    whole = [*SPECIAL_TOKENS, *tokens, TASK]
    ids = {token: number for number, token in enumerate(whole)}
    return EventVocabulary(ids, BINS, list(kinds), DEFAULT_CODE_MAP, frozenset([*SPECIAL_TOKENS, TASK]))


VOCABULARY = make_vocabulary()


def tokens_of(ids: np.ndarray | tuple[int, ...]) -> list[str]:
    names = list(VOCABULARY.token_ids)
    return [names[number] for number in ids]


def read(spec: object, *, time_head: bool = True) -> list[str]:
    (outcome,) = read_outcomes({"x": spec}, VOCABULARY, time_head=time_head)
    assert outcome.name == "x"
    assert outcome.ids.dtype == np.int64
    assert (np.diff(outcome.ids) > 0).all()
    return tokens_of(outcome.ids)


def bins(code: str, unit: str, *numbers: int) -> list[str]:
    return [f"{code}//{unit}_{k}" for k in numbers]


@pytest.mark.parametrize(
    ("spec", "tokens"),
    [
        ("death", ["MEDS_DEATH", "VISIT_END//exp"]),
        ("any_admission", ["VISIT_START//IMP", "VISIT_START//ACUTE"]),
        ("icu_admission", ["ICU_ADMISSION//MICU"]),
        ("any_visit", ["[VS]"]),
        ("DIAGNOSIS//ICD10CM//I50", ["DIAGNOSIS//ICD10CM//I50"]),
        ("DIAGNOSIS//ICD10CM//I50*", ["DIAGNOSIS//ICD10CM//I50", "DIAGNOSIS//ICD10CM//I50.9"]),
        (["DIAGNOSIS//ICD10CM//I10", "death"], ["MEDS_DEATH", "VISIT_END//exp", "DIAGNOSIS//ICD10CM//I10"]),
        # A code means its rows with any result, whether or not the bare code is a token.
        (POTASSIUM, [POTASSIUM, *bins(POTASSIUM, "mmol/L", 0, 1, 2, 3)]),
        (GLUCOSE, [*bins(GLUCOSE, "mg/dL", 0, 1, 2), *bins(GLUCOSE, "mmol/L", 0, 1)]),
        ("LAB//COVID", ["LAB//COVID", "LAB//COVID//POSITIVE"]),
        ("LAB//COVID//POSITIVE", ["LAB//COVID//POSITIVE"]),
        ({"code": POTASSIUM, "above": 5.5}, bins(POTASSIUM, "mmol/L", 3)),
        ({"code": POTASSIUM, "at_most": 4.5, "unit": "MMOL/L"}, bins(POTASSIUM, "mmol/L", 0, 1)),
        ({"code": GLUCOSE, "above": 5, "unit": "mmol/L"}, bins(GLUCOSE, "mmol/L", 1)),
        ({"code": [IN_CODE], "above": 5, "unit": "mEq/L"}, [f"{IN_CODE}_1"]),
        ({"code": IN_CODE, "above": 5}, [f"{IN_CODE}_1"]),
    ],
)
def test_what_stands_for_an_outcome(spec: object, tokens: list[str]) -> None:
    assert read(spec) == sorted(tokens, key=VOCABULARY.token_ids.__getitem__)


def test_that_nothing_comes_is_the_complement_of_the_same_tokens() -> None:
    plain, none = read_outcomes({"a": "death", "b": {"not": "death"}}, VOCABULARY, time_head=False)
    assert not plain.complement
    assert none.complement
    assert none.ids.tolist() == plain.ids.tolist()


@pytest.mark.parametrize(
    ("limit", "amount", "numbers", "split"),
    [
        # Bins (-inf, 3.5], (3.5, 4.5], (4.5, 5.5], (5.5, inf): a value on an edge belongs to the bin below.
        ("above", 4.5, [2, 3], None),
        ("above", 4.6, [3], (4.5, 5.5)),
        ("above", 9.0, [], (5.5, np.inf)),
        ("at_least", 4.5, [2, 3], (3.5, 4.5)),
        ("below", 4.5, [0], (3.5, 4.5)),
        ("below", 4.4, [0], (3.5, 4.5)),
        ("at_most", 4.5, [0, 1], None),
        ("at_most", 1.0, [], (-np.inf, 3.5)),
    ],
)
def test_bins_that_meet_a_limit_and_the_one_that_it_splits(
    limit: str, amount: float, numbers: list[int], split: tuple[float, float] | None
) -> None:
    edges = np.array([3.5, 4.5, 5.5], dtype=np.float32)
    found, bounds = limited_bins(Bins(edges, [0, 1, 2, 3], "exact"), limit, amount)
    assert (found, bounds) == (numbers, split)
    # Truth: values themselves, thrown into bins.
    values = np.linspace(0, 12, 12001).astype(np.float32)
    amount32 = np.float32(amount)
    meets = {"above": values > amount32, "below": values < amount32}.get(
        limit, values >= amount32 if limit == "at_least" else values <= amount32
    )
    of_bin = np.searchsorted(edges, values, side="left")
    whole = [k for k in range(4) if meets[of_bin == k].all()]
    mixed = [k for k in range(4) if meets[of_bin == k].any() and not meets[of_bin == k].all()]
    assert found == whole
    assert (bounds is not None) == bool(mixed)


def test_a_limit_inside_a_bin_is_told() -> None:
    (outcome,) = read_outcomes({"x": {"code": POTASSIUM, "above": 5.0}}, VOCABULARY, time_head=True)
    assert tokens_of(outcome.ids) == bins(POTASSIUM, "mmol/L", 3)
    assert outcome.notes == (f"{POTASSIUM}: above 5 splits the bin from 4.5 to 5.5; only values above 5.5 count",)


def test_a_bin_that_is_no_token_is_told() -> None:
    lost = make_vocabulary([token for token in EVENTS if token != f"{POTASSIUM}//mmol/L_3"])
    (outcome,) = read_outcomes({"x": {"code": POTASSIUM, "above": 4.5}}, lost, time_head=True)
    assert len(outcome.ids) == 1
    assert "1 of 2 value bins are no tokens" in outcome.notes[0]
    with pytest.raises(ValueError, match=r"none of the value bins .* above 5.5 is a token"):
        read_outcomes({"x": {"code": POTASSIUM, "above": 5.5}}, lost, time_head=True)


def test_ends_of_visits_without_a_time_head() -> None:
    assert read("VISIT_END//*", time_head=False) == ["VISIT_END//exp", "VISIT_END//home"]
    (outcome,) = read_outcomes({"x": "VISIT_END//*"}, VOCABULARY, time_head=False)
    assert "no time within visits" in outcome.notes[0]
    with pytest.raises(ValueError, match="a visit goes on, and the model has no time within visits"):
        read_outcomes({"x": {"not": "VISIT_END//home"}}, VOCABULARY, time_head=False)
    assert read_outcomes({"x": {"not": "VISIT_END//home"}}, VOCABULARY, time_head=True)[0].complement


@pytest.mark.parametrize(
    ("outcomes", "message"),
    [
        ([], "outcomes is a list; expected a mapping"),
        ({}, "no outcome is asked for"),
        ({"": "death"}, "an outcome is named ''"),
        ({"x": []}, "'x' is an empty list"),
        ({"x": 3}, "'x' is 3; expected a code"),
        ({"x": ""}, "a code is ''"),
        (
            {"x": "ICU_ADMISION//MICU"},
            "no token for 'ICU_ADMISION//MICU'. The nearest that it has: 'ICU_ADMISSION//MICU'",
        ),
        (
            {"x": "icu_admission//*"},
            "no token for 'icu_admission//\\*'. The nearest that it has: 'ICU_ADMISSION//MICU'",
        ),
        ({"x": "LAB//FLU"}, r"longer ones: ask for 'LAB//FLU//\*'"),
        ({"x": "DIAGNOSIS//ICD10CM//I50.22"}, "as the more general 'DIAGNOSIS//ICD10CM//I50'"),
        ({"x": "zzzzqqqq"}, r"no token for 'zzzzqqqq'\.$"),
        ({"x": "[VS]"}, "special token"),
        ({"x": TASK}, "special token"),
        ({"x": ["death", "nothing//here"]}, "no token for 'nothing//here'"),
        ({"x": {"code": POTASSIUM}}, "expected 'code', one of"),
        ({"x": {"above": 4}}, "expected 'code', one of"),
        ({"x": {"code": POTASSIUM, "above": 4, "below": 5}}, "expected 'code', one of"),
        ({"x": {"code": POTASSIUM, "over": 4}}, r"unknown keys \['over'\]"),
        ({"x": {"code": POTASSIUM, "above": "high"}}, "'above' is 'high'; expected a number"),
        ({"x": {"code": POTASSIUM, "above": float("nan")}}, "expected a number"),
        ({"x": {"code": POTASSIUM, "above": True}}, "expected a number"),
        ({"x": {"code": [], "above": 4}}, "'code' is an empty list"),
        ({"x": {"code": POTASSIUM, "above": 4, "unit": 3}}, "'unit' is 3; expected a text"),
        ({"x": {"code": POTASSIUM, "above": 5.5, "unit": "mg/dL"}}, r"no code has values in 'mg/dL'.*\['mmol/L'\]"),
        ({"x": {"code": GLUCOSE, "above": 5}}, r"several units; give 'unit' .*\['mg/dL', 'mmol/L'\]"),
        ({"x": {"code": POTASSIUM, "above": 5.6}}, r"lies wholly above 5.6: its edges are \[3.5, 4.5, 5.5\]"),
        ({"x": {"code": POTASSIUM, "below": 3.0}}, "lies wholly below 3"),
        ({"x": {"code": "DIAGNOSIS//ICD10CM//I10", "above": 1}}, "has no value bins"),
        ({"x": {"not": {"not": "death"}}}, "'not' stands inside"),
        ({"x": ["death", {"not": "death"}]}, "'not' stands inside"),
        ({"x": {"not": "death", "code": "death"}}, r"unknown keys \['code'\]"),
    ],
)
def test_what_cannot_be_asked(outcomes: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_outcomes(outcomes, VOCABULARY, time_head=True)  # type: ignore[arg-type]


def test_words_that_the_vocabulary_cannot_say() -> None:
    without = make_vocabulary(
        [token for token in EVENTS if "ICU" not in token and "DEATH" not in token and "exp" not in token]
    )
    for word in ("death", "icu_admission"):
        with pytest.raises(ValueError, match=f"no token for '{word}': no code that it was trained on is one"):
            read_outcomes({"x": word}, without, time_head=True)
    paper = make_vocabulary(["LAB//COVID"], kinds=("procedure", "medication", "lab"))
    with pytest.raises(ValueError, match=r"its input_kinds .* leave out 'visit_start'"):
        read_outcomes({"x": "any_admission"}, paper, time_head=True)
    assert death_ids(paper) == ()


def test_starts_and_ends_of_classes() -> None:
    assert tokens_of(visit_start_ids(VOCABULARY, ["AMB"])) == ["VISIT_START//AMB"]
    assert tokens_of(visit_end_ids(VOCABULARY)) == ["[VE]", "VISIT_END//exp", "VISIT_END//home", "ICU_DISCHARGE//MICU"]
    assert tokens_of(visit_end_ids(VOCABULARY, ["IMP"])) == ["[VE]"]
    assert tokens_of(visit_end_ids(VOCABULARY, ["*"])) == ["[VE]", "VISIT_END//exp", "VISIT_END//home"]
    assert tokens_of(visit_end_ids(VOCABULARY, ["ICU"])) == ["[VE]", "ICU_DISCHARGE//MICU"]


def test_every_token_of_a_row_stands_under_its_code() -> None:
    """Of a fitted tokenizer: a row's token is among those of the row's code."""
    rows = [event(hour, POTASSIUM, numeric_value=3.0 + hour / 10, unit="mmol/L") for hour in range(30)]
    rows += [event(40 + k, "LAB//COVID", text_value="POSITIVE") for k in range(3)]
    rows += [event(50, "DIAGNOSIS//ICD10CM//I50.9")]
    tokenizer = fitted(rows, rows, rows, rows, rows, rows, min_text_subjects=2)
    codes = codes_of_tokens(tokenizer.vocabulary)
    for row in rows:
        token, how = tokenizer.vocabulary.row_id(
            row["code"], row.get("numeric_value"), row.get("text_value"), row.get("unit")
        )
        assert how == "exact"
        assert token in codes[row["code"]]
