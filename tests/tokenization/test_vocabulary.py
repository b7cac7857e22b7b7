"""What becomes a token: bins, units, texts, fallbacks, selection, determinism."""

import numpy as np
import polars as pl
import pytest

from ehrseq.tokenization.ehr_sequence import subjects_digest
from ehrseq.tokenization.ehr_vocabulary import (
    INTERVAL_STARTS,
    LONG_TERM,
    MONTHS,
    SPECIAL_TOKENS,
    WEEKS,
    interval_token,
    is_finite,
)
from ehrseq.tokenization.tokenization_ehr import EhrTokenizer
from tests.tokenization.timelines import event, fitted, table, words

GLUCOSE = "LAB//LOINC//2345-7"


def results(*values: float | None, unit: str | None = "mg/dL", code: str = GLUCOSE) -> list[dict]:
    return [event(hour, code, numeric_value=value, unit=unit) for hour, value in enumerate(values)]


def one(tokenizer: EhrTokenizer, **row: object) -> str:
    """The token of a single row."""
    return words(tokenizer, [event(0, **{"code": GLUCOSE, **row})]).split()[2]


def test_special_tokens_come_first_tasks_last_and_ids_are_contiguous() -> None:
    tokenizer = fitted(results(1, 2, 3), [event(0, "DIAGNOSIS//ICD10CM//I10")])
    assert tokenizer.convert_ids_to_tokens(list(range(25))) == SPECIAL_TOKENS
    assert SPECIAL_TOKENS[:7] == ["[PAD]", "[UNK]", "[MASK]", "[CLS]", "[VS]", "[VE]", "[REG]"]
    assert SPECIAL_TOKENS[7:] == [*(f"[W_{k}]" for k in range(4)), *(f"[M_{k}]" for k in range(13)), "[LT]"]
    assert tokenizer.convert_ids_to_tokens([len(tokenizer) - 2, len(tokenizer) - 1]) == ["[MOR_1M]", "[REA_1M]"]
    assert sorted(tokenizer.get_vocab().values()) == list(range(len(tokenizer)))
    assert len(tokenizer.token_types) == len(tokenizer) == tokenizer.vocab_size


def test_bins_are_quantiles_with_open_ends() -> None:
    values = np.random.default_rng(0).normal(100, 20, 1001).astype(np.float32)
    tokenizer = fitted(results(*values.tolist()))
    edges = np.quantile(values, [0.2, 0.4, 0.6, 0.8], method="lower")
    assert tokenizer.vocabulary.value_bins == {GLUCOSE: {"mg/dL": edges.tolist()}}
    counts = np.zeros(5, int)
    for value in values:
        bin_of = int((value > edges).sum())
        counts[bin_of] += 1
        assert one(tokenizer, numeric_value=float(value), unit="mg/dL") == f"{GLUCOSE}//mg/dL_{bin_of}"
    assert counts.min() >= 199
    for value, bin_of in ((-1e30, 0), (float(values.min()), 0), (float(values.max()), 4), (3e38, 4)):
        assert one(tokenizer, numeric_value=value, unit="mg/dL") == f"{GLUCOSE}//mg/dL_{bin_of}"


@pytest.mark.parametrize(
    ("values", "edges"),
    [
        ([5, 5, 5], []),
        ([0, 0, 0, 0, 1], [0]),
        ([1, 2, 3, 4, 5], [1, 2, 3, 4]),
        ([0, 1, 1, 1, 1], [0]),
        ([7], []),
        ([float("nan"), 1, float("inf"), 2, -float("inf")], [1]),
    ],
)
def test_every_bin_has_been_seen(values: list[float], edges: list[float]) -> None:
    tokenizer = fitted(results(*values))
    assert tokenizer.vocabulary.value_bins == {GLUCOSE: {"mg/dL": edges}}
    finite = np.asarray([value for value in values if np.isfinite(value)])
    seen = {int((value > np.asarray(edges)).sum()) for value in finite}
    assert seen == set(range(len(edges) + 1))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e39, None])
def test_a_value_that_is_no_number_leaves_the_bare_code(value: float | None) -> None:
    tokenizer = fitted(results(1, 2, 3))
    assert one(tokenizer, numeric_value=value, unit="mg/dL") == GLUCOSE
    frame = table([event(0, GLUCOSE, unit="mg/dL")]).with_columns(pl.lit(value, pl.Float64).alias("numeric_value"))
    (row,) = tokenizer.encode_table(frame).to_pylist()
    assert tokenizer.convert_ids_to_tokens(row["input_ids"])[2] == GLUCOSE


def test_units_have_bins_of_their_own() -> None:
    tokenizer = fitted(results(90, 100, 110), results(5, 6, 7, unit="mmol/L"))
    assert one(tokenizer, numeric_value=6, unit="mmol/L") == f"{GLUCOSE}//mmol/L_1"
    assert one(tokenizer, numeric_value=6, unit="mg/dL") == f"{GLUCOSE}//mg/dL_0"
    assert one(tokenizer, numeric_value=6, unit="MG / DL") == f"{GLUCOSE}//mg/dL_0", "the same unit, spelled otherwise"
    assert one(tokenizer, numeric_value=6, unit="g/L") == GLUCOSE, "another unit's bins would say something false"
    assert one(tokenizer, numeric_value=6, unit=None) == GLUCOSE, "two units: which is meant?"


def test_a_value_without_a_unit_takes_the_only_one() -> None:
    tokenizer = fitted(results(90, 100, 110))
    assert one(tokenizer, numeric_value=200, unit=None) == f"{GLUCOSE}//mg/dL_2"
    assert one(tokenizer, numeric_value=200, unit="") == f"{GLUCOSE}//mg/dL_2"


def test_text_results() -> None:
    patients = [[event(0, "LAB//NITRITE", text_value="positive"), event(1, "LAB//NITRITE")] for _ in range(5)]
    patients[0].append(event(2, "LAB//NITRITE", text_value="seen in J. Doe's sample"))
    tokenizer = fitted(*patients)
    assert one(tokenizer, code="LAB//NITRITE", text_value="positive") == "LAB//NITRITE//positive"
    assert one(tokenizer, code="LAB//NITRITE", text_value="trace") == "LAB//NITRITE"
    assert not any("Doe" in token for token in tokenizer.get_vocab()), "rare text may name a patient"
    assert one(tokenizer, code="LAB//NITRITE", text_value="positive", numeric_value=1.0) == "LAB//NITRITE"


def test_rare_codes_fall_back_to_their_parents() -> None:
    icd = "DIAGNOSIS//ICD10CM//"
    often = [event(k, icd + "I10", "v") for k in range(5)]
    tokenizer = fitted([*often, event(9, icd + "E11.65", "v"), event(10, icd + "I13.0", "v")], min_count=2)
    for code, expected in {
        "I10": "I10",
        "I10.1": "I10",
        "I10.12": "I10",
        "I13.0": "I00-I99",  # seen once: its category too
        "I99": "I00-I99",
        "E11.65": "[UNK]",  # nothing of its chapter was seen twice
        "Z00": "[UNK]",
    }.items():
        assert one(tokenizer, code=icd + code) == (expected if expected == "[UNK]" else icd + expected), code
    assert one(tokenizer, code=icd + "I101") == icd + "I10"


def test_max_vocab_size_keeps_the_most_frequent() -> None:
    counts = {"LAB//a": 4, "LAB//b": 3, "LAB//c": 2, "LAB//d": 1}
    patient = [event(k, code, "v") for code, count in counts.items() for k in range(count)]
    small = fitted(patient, max_vocab_size=len(fitted(patient)) - 2)
    assert {token for token in small.get_vocab() if token in counts} == {"LAB//a", "LAB//b"}
    with pytest.raises(ValueError, match="give at least 27"):
        fitted(patient, max_vocab_size=26)


def test_training_does_not_depend_on_the_order_of_rows() -> None:
    rng = np.random.default_rng(0)
    codes = [f"DIAGNOSIS//ICD10CM//{letter}{k:02d}.{k}" for letter in "AEI" for k in range(10)]
    patients = [
        [event(k, str(rng.choice(codes)), "v") for k in range(20)] + results(*rng.normal(size=20).tolist())
        for _ in range(5)
    ]
    events = table(*patients)
    settings = {"min_count": 2, "max_vocab_size": 60, "tasks": ["mortality_30d"]}
    first = EhrTokenizer.train(events, **settings)
    second = EhrTokenizer.train(events.sample(fraction=1.0, shuffle=True, seed=1), **settings)
    assert first.get_vocab() == second.get_vocab()
    assert first.init_kwargs["event_vocabulary"] == second.init_kwargs["event_vocabulary"]


def test_the_digest_tells_the_fitted_subjects() -> None:
    tokenizer = EhrTokenizer.train(table(results(1), results(2), first=7))
    assert tokenizer.fitted_subjects_digest == subjects_digest([8, 7])
    assert tokenizer.fitted_subjects_digest != subjects_digest([7])


def test_token_types() -> None:
    codes = {
        "LAB//1": 5, "MEDICATION//1": 6, "PROCEDURE//1": 7, "DIAGNOSIS//1": 9, "VITAL//1": 10, "X//1": 11,
        "MEDS_DEATH": 11, "VISIT_START//IMP": 11,
    }  # fmt: skip
    events = [event(k, code) for k, code in enumerate(codes)] + [event(None, "GENDER//F")]
    tokenizer = fitted(events)
    row = tokenizer({"events": events})
    kinds = dict(zip(tokenizer.convert_ids_to_tokens(row["input_ids"]), row["token_type_ids"], strict=True))
    assert {code: kinds[code] for code in codes} == codes
    assert {token: kinds[token] for token in ("[CLS]", "[VS]", "GENDER//F")} == {"[CLS]": 1, "[VS]": 2, "GENDER//F": 12}
    for token, kind in kinds.items():
        assert tokenizer.token_types[tokenizer.convert_tokens_to_ids(token)] == kind


def test_the_paper_reads_procedures_medications_and_labs() -> None:
    events = [
        event(None, "GENDER//F"), event(0, "VISIT_START//IMP", "a"), event(1, "LAB//1", "a"), event(2, "VITAL//1", "a"),
        event(3, "DIAGNOSIS//1", "a"), event(4, "PROCEDURE//1", "a"), event(5, "MEDICATION//1", "a"),
        event(6, "VISIT_END//home", "a"), event(30, "DIAGNOSIS//1"),
    ]  # fmt: skip
    tokenizer = fitted(events, input_kinds="paper")
    assert words(tokenizer, events) == "[CLS] [VS] LAB//1 PROCEDURE//1 MEDICATION//1 [VE] [REG]"
    assert {token for token in tokenizer.get_vocab() if "//" in token} == {"LAB//1", "PROCEDURE//1", "MEDICATION//1"}


def test_a_code_cannot_name_a_special_token() -> None:
    tokenizer = fitted([event(0, "LAB//1"), event(1, "[REG]"), event(2, "[MOR_1M]")])
    assert words(tokenizer, [event(0, "[REG]"), event(1, "[MOR_1M]")]) == "[CLS] [VS] [UNK] [UNK] [VE] [REG]"


def test_coverage_counts_every_row() -> None:
    icd = "DIAGNOSIS//ICD10CM//"
    tokenizer = fitted([event(0, icd + "I10"), event(1, "LAB//1"), *results(1, 2, 3)])
    events = [
        event(0, "MEDS_BIRTH"), event(1, icd + "I10"), event(2, icd + "I10.1"), event(3, "LAB//1", numeric_value=3.0),
        event(4, "NEVER//SEEN"), *results(2.5), event(9, "VISIT_END//IMP"),
    ]  # fmt: skip
    assert tokenizer.coverage(table(events)) == {
        "exact": 2 / 5, "fallback": 2 / 5, "lost": 1 / 5,
        "events": 5, "exact_events": 2, "fallback_events": 2, "lost_events": 1,
        "visit_boundaries": 1, "not_used": 1, "lapsed_encounters": 0,
    }  # fmt: skip


def test_a_value_is_finite_where_single_precision_holds_it():
    largest = float(np.finfo(np.float32).max)
    halfway = (2 - 2**-24) * 2.0**127  # rounds to infinity; the number below it to the largest
    values = [0.0, -1.5, largest, np.nextafter(halfway, 0), halfway, 1e300, float("inf"), float("-inf"), float("nan")]
    with np.errstate(over="ignore"):
        assert [is_finite(value) for value in values] == np.isfinite(np.float32(values)).tolist()


def test_interval_tokens_of_many_are_those_of_each():
    days = np.arange(800)
    tokens = np.asarray([*WEEKS, *MONTHS, LONG_TERM])[INTERVAL_STARTS.searchsorted(days, "right")]
    assert tokens.tolist() == [interval_token(day) for day in days.tolist()]
