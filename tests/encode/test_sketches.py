"""Quantiles of many groups in one pass: exact while few values, and never further off than is stated."""

import math

import numpy as np
import polars as pl
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ehrseq.data.simulate.cohort import simulate
from ehrseq.encode.counts import EventCounts
from ehrseq.encode.sketches import QuantileSketches
from ehrseq.tokenization.tokenization_ehr import EhrTokenizer
from tests.properties import examples

SHARES = np.arange(1, 10) / 10
RNG = np.random.default_rng(0)
DRAWS = {
    "normal": RNG.normal(size=200_000),
    "ties": np.round(RNG.normal(size=200_000), 1),
    "ascending": np.sort(RNG.normal(size=200_000)),
    "descending": -np.sort(RNG.normal(size=200_000)),
    "over sixty orders": RNG.choice([-1, 1], 200_000) * np.exp(RNG.uniform(-70, 70, 200_000)),
    "one value and noise": np.where(RNG.random(200_000) < 0.7, 5.0, RNG.normal(size=200_000)),
    "two clouds": np.concatenate([RNG.normal(0, 1e-3, 100_000), RNG.normal(1e6, 1, 100_000)]),
}


def rank_off(values: np.ndarray, found: np.ndarray) -> int:
    """By how many places the quantiles miss their ranks, at worst."""
    ordered = np.sort(values.astype(np.float32))
    wanted = np.floor((len(values) - 1) * SHARES).astype(int)
    first, last = np.searchsorted(ordered, found, "left"), np.searchsorted(ordered, found, "right") - 1
    return int(np.maximum(0, np.maximum(first - wanted, wanted - last)).max())


@pytest.mark.parametrize("values", DRAWS.values(), ids=DRAWS)
@pytest.mark.parametrize("size", [64, 512])
@pytest.mark.parametrize("rows", [1000, 7777])
def test_the_error_is_at_most_what_is_stated(values, size, rows):
    sketches, blocks = QuantileSketches(size), 0
    for start in range(0, len(values), rows):
        part = values[start : start + rows].astype(np.float32)
        sketches.add(np.full(len(part), 3), part)
        blocks += 1
    groups, totals, largest, found, errors = sketches.quantiles(SHARES)
    assert groups.tolist() == [3]
    assert totals.tolist() == [len(values)]
    assert largest[0] == np.float32(values.max())
    assert np.isin(found[0], values.astype(np.float32)).all()
    assert rank_off(values, found[0]) <= errors[0]
    assert errors[0] <= (math.log2(blocks) + 2) * len(values) / size / 2 + 1


@examples(200)
@given(
    blocks=st.lists(
        st.lists(st.tuples(st.integers(0, 3), st.integers(-40, 40)), min_size=1, max_size=60), min_size=1, max_size=9
    ),
    sides=st.lists(st.integers(0, 2), min_size=9, max_size=9),
)
@example(blocks=[[(0, -4)], [(0, value) for value in range(-4, 5)]], sides=[0] * 9)  # nothing lies below the first
def test_any_blocks_merged_in_any_way_keep_the_stated_error(blocks, sides):
    parts = [QuantileSketches(8) for _ in range(3)]
    of_group: dict[int, list[float]] = {}
    for block, side in zip(blocks, sides, strict=False):
        groups = np.asarray([group for group, _ in block])
        values = np.asarray([value / 3 for _, value in block], np.float32)
        parts[side].add((groups + side) % 4, values)  # each part numbers its groups its own way
        for group, value in zip(groups.tolist(), values.tolist(), strict=True):
            of_group.setdefault(group, []).append(value)
    whole = QuantileSketches(8)
    for side, part in enumerate(parts):
        state = {name: array.copy() for name, array in part.state().items()}
        whole.merge(QuantileSketches.from_state(state, 8), (np.arange(4) - side) % 4)
    found_groups, totals, largest, found, errors = whole.quantiles(SHARES)
    assert found_groups.tolist() == sorted(of_group)
    for row, group in enumerate(found_groups.tolist()):
        values = np.asarray(of_group[group])
        assert (totals[row], largest[row]) == (len(values), values.max())
        assert rank_off(values, found[row]) <= errors[row]
        if len(set(of_group[group])) <= 8:
            assert errors[row] == 0


@pytest.mark.parametrize("values", [DRAWS["ties"], np.asarray([0.0, -0.0, 1.5, -3e38, 3e38, 1e-40])])
def test_few_values_are_exact_as_polars_has_them(values):
    values = values.astype(np.float32)
    sketches = QuantileSketches(4096)
    for part in np.array_split(values, 5):
        sketches.add(np.zeros(len(part), np.int64), part)
    *_, found, errors = sketches.quantiles(SHARES)
    assert errors.tolist() == [0]
    assert found[0].tolist() == [pl.Series(values).quantile(share, "lower") for share in SHARES]


def test_without_size_everything_is_exact():
    sketches = QuantileSketches(None)
    for part in np.array_split(DRAWS["normal"].astype(np.float32), 7):
        sketches.add(np.zeros(len(part), np.int64), part)
    *_, found, errors = sketches.quantiles(SHARES)
    assert errors.tolist() == [0]
    assert rank_off(DRAWS["normal"], found[0]) == 0


def test_many_groups_are_thinned_more_so_that_memory_is_bounded(monkeypatch):
    monkeypatch.setattr("ehrseq.encode.sketches._MAX_POINTS", 2000)
    sketches = QuantileSketches(1024)
    values = DRAWS["normal"][:100_000].astype(np.float32)
    groups = np.arange(100_000) % 20
    for part in np.array_split(np.arange(100_000), 8):
        sketches.add(groups[part], values[part])
    assert all(summary is None or len(summary.points) <= 2000 for summary in sketches._levels)
    *_, found, errors = sketches.quantiles(SHARES)
    for group in range(20):
        assert 0 < rank_off(values[groups == group], found[group]) <= errors[group]


def test_no_values_are_no_groups():
    sketches = QuantileSketches()
    sketches.add(np.zeros(0, np.int64), np.zeros(0, np.float32))
    assert [len(part) for part in sketches.quantiles(SHARES)] == [0] * 5


# -- counts of events ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def events() -> pl.DataFrame:
    frame = simulate(150, seed=8, progress=False).events()
    # Result texts, some in few subjects, and prose.
    text = (
        pl.when(pl.col("numeric_value").is_null() & (pl.int_range(pl.len()) % 3 == 0))
        .then(pl.lit("result ") + (pl.col("subject_id") % 28).cast(pl.String))
        .when(pl.int_range(pl.len()) % 50 == 0)
        .then(pl.lit("x" * 65))
    )
    return frame.with_columns(text.alias("text_value"))


def counted(events: pl.DataFrame, blocks: int, parts: int = 1, **settings) -> EventCounts:
    """Counts of whole subjects in blocks, in so many parts that are written down and merged."""
    subjects = np.array_split(events["subject_id"].unique().sort().to_numpy(), blocks)
    found = [EventCounts(**settings) for _ in range(parts)]
    for number, block in enumerate(subjects):
        found[number % parts].add(events.filter(pl.col("subject_id").is_in(block.tolist())))
    if parts == 1:
        return found[0]
    whole = EventCounts(**settings)
    for part in found:
        whole.merge(EventCounts.from_state(part.state(), **settings))
    return whole


def stored(tokenizer: EhrTokenizer) -> tuple[dict, dict]:
    return tokenizer.get_vocab(), tokenizer.init_kwargs["event_vocabulary"]


@pytest.mark.parametrize(("blocks", "parts"), [(1, 1), (9, 1), (20, 3)])
@pytest.mark.parametrize(
    ("counting", "fitting"),
    [
        ({}, {}),
        (
            {"input_kinds": "paper"},
            {"min_count": 20, "num_value_bins": 7, "max_vocab_size": 400, "tasks": ["mortality_30d"]},
        ),
        ({"code_map": [["MEDS_BIRTH", "birth"], ["LAB//", "lab"]]}, {"min_text_subjects": 3}),
    ],
)
def test_counted_in_blocks_is_trained_on_the_table(events, blocks, parts, counting, fitting):
    whole = EhrTokenizer.train(events, **counting, **fitting)
    ours = EhrTokenizer.from_counts(counted(events, blocks, parts, max_values=4096, **counting), **fitting)
    assert stored(ours) == stored(whole)
    assert any("//result" in token for token in whole.get_vocab()) or fitting.get("max_vocab_size")


def test_with_few_kept_values_the_bins_are_near_and_say_so(events):
    counts = counted(events, 12, 3, max_values=64)
    approximate = EhrTokenizer.from_counts(counts)
    exact = EhrTokenizer.train(events)
    error = approximate.init_kwargs["event_vocabulary"]["bin_rank_error"]
    assert 0 < error < 0.1
    numbers = events.filter(pl.col("numeric_value").is_not_null())
    for code, units in approximate.vocabulary.value_bins.items():
        for unit, edges in units.items():
            values = numbers.filter((pl.col("code") == code) & (pl.col("unit").fill_null("") == unit))["numeric_value"]
            known = exact.vocabulary.value_bins[code][unit]
            if len(edges) == len(known) == 4:
                shares = np.asarray([(values <= edge).mean() for edge in edges])
                low = np.asarray([(values < edge).mean() for edge in edges])
                wanted = np.arange(1, 5) / 5
                slack = error + 2 / len(values)
                assert (low - slack <= wanted).all()
                assert (wanted <= shares + slack).all()


def test_too_many_texts_forget_the_rarest_and_say_how_much(events, monkeypatch):
    monkeypatch.setattr("ehrseq.encode.counts._MAX_TEXTS", 50)
    counts = counted(events, 15, 3, max_values=4096)
    exact = counted(events, 1)
    assert counts.forgotten["subjects"] > 0
    both = exact.texts().join(counts.texts(), on=["code", "text"], how="left", suffix="_kept").fill_null(0)
    for name in ("rows", "subjects"):
        short = both[name] - both[f"{name}_kept"]
        assert 0 <= short.min() <= short.max() <= counts.forgotten[name]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"input_kinds": "none"}, "is no preset"),
        ({"code_map": [["(", "lab"]]}, "no regular expression"),
        ({"code_map": [["LAB", "labs"]]}, "expected one of"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_counted(settings, message):
    with pytest.raises(ValueError, match=message):
        EventCounts(**settings)


def test_counts_of_nothing_make_no_tokenizer():
    with pytest.raises(ValueError, match="counts of no row"):
        EhrTokenizer.from_counts(EventCounts())
    with pytest.raises(ValueError, match="max_vocab_size got 0"):
        EhrTokenizer.from_counts(EventCounts(), max_vocab_size=0)
