"""Futures of records by hand, distances by hand, and a planted world of two kinds of trajectories."""

from datetime import datetime, timedelta

import numpy as np
import polars as pl
import pytest
from scipy.spatial.distance import jensenshannon
from scipy.stats import ks_2samp

from ehrseq.data.schema import EVENT_SCHEMA
from ehrseq.forecasting.plausibility import compare_futures, jensen_shannon, kolmogorov
from ehrseq.forecasting.recorded_futures import RecordedFuture, recorded_futures
from ehrseq.modeling.ehr_trajectories import PatientTrajectories, TrajectoryEnd
from ehrseq.tokenization.ehr_vocabulary import (
    TYPE_DIAGNOSIS,
    TYPE_INTERVAL,
    TYPE_LAB,
    TYPE_OTHER,
    TYPE_PAD,
    TYPE_REG,
    TYPE_VE,
    TYPE_VS,
)
from ehrseq.tokenization.tokenization_ehr import EhrTokenizer

START = datetime(2020, 1, 1)


def record(*rows):
    """A record of (day, code) rows."""
    table = pl.DataFrame(
        [
            {"subject_id": 7, "time": None if day is None else START + timedelta(days=day), "code": code}
            for day, code in rows
        ],
        schema={name: EVENT_SCHEMA[name] for name in ("subject_id", "time", "code")},
    )
    return table.with_columns(
        pl.lit(None, dtype).alias(name) for name, dtype in EVENT_SCHEMA.items() if name not in table.columns
    ).select(list(EVENT_SCHEMA))


RECORD = record(
    (None, "GENDER//F"),
    (0.0, "VISIT_START//AMB"),
    (0.1, "LAB//A"),
    (0.2, "VISIT_END//AMB"),
    (10.0, "VISIT_START//AMB"),
    (10.1, "LAB//B"),
    (10.2, "VISIT_END//AMB"),
    (45.0, "VISIT_START//AMB"),
    (45.5, "LAB//A"),
    (46.0, "VISIT_END//AMB"),
)


@pytest.fixture(scope="module")
def encoded():
    tokenizer = EhrTokenizer.train(RECORD, tasks=[], min_count=1)
    return tokenizer, tokenizer.encode_histories(RECORD)


def future(encoded, day, horizon=100.0, data_end=60.0):
    tokenizer, histories = encoded
    times = np.array([START + timedelta(days=day)], "datetime64[us]")
    end = np.datetime64(START + timedelta(days=data_end))
    found = recorded_futures(histories, [7], times, horizon_days=horizon, end_of_data=end)[0]
    return tokenizer.convert_ids_to_tokens(found.tokens.tolist()), found


def test_what_comes_after_a_closed_visit(encoded):
    names, found = future(encoded, 1.0)
    visit = ["[VS]", "VISIT_START//AMB"]
    assert names == ["[W_1]", *visit, "LAB//B", "[VE]", "[REG]", "[M_1]", *visit, "LAB//A", "[VE]", "[REG]"]
    nan = np.nan
    assert found.days == pytest.approx([nan, 9, 9, 9.1, 9.1, 9.1, nan, 44, 44, 44.5, 44.5, 44.5], nan_ok=True)
    assert found.followed_days == pytest.approx(59.0)
    known = encoded[0].convert_ids_to_tokens(found.known.tolist())
    assert set(known) == {"GENDER//F", "[VS]", "VISIT_START//AMB", "LAB//A"}
    lab_a, lab_b = encoded[0].convert_tokens_to_ids(["LAB//A", "LAB//B"])
    assert (found.first_day([lab_a]), found.first_day([lab_b])) == pytest.approx((44.5, 9.1))
    assert (found.has_known([lab_a]), found.has_known([lab_b])) == (True, False)
    assert np.isinf(found.first_day([0]))
    assert np.isnan(found.age)


def test_what_comes_inside_a_visit(encoded):
    names, found = future(encoded, 10.05)
    assert names[:4] == ["LAB//B", "[VE]", "[REG]", "[M_1]"]
    assert found.days[:3] == pytest.approx([0.05] * 3)


def test_the_instant_is_known_and_the_horizon_counts(encoded):
    names, _ = future(encoded, 10.1, horizon=10.0)
    assert names == ["[VE]", "[REG]"]
    names, _ = future(encoded, 1.0, horizon=9.0)  # the visit starts on its last instant
    assert names == ["[W_1]", "[VS]", "VISIT_START//AMB"]
    assert future(encoded, 1.0, horizon=8.9)[0] == []
    assert future(encoded, 50.0)[0] == []


def test_the_future_begins_where_the_prompt_ends(encoded):
    """Prompt and future, laid end to end, are the tokens of the record."""
    tokenizer, histories = encoded
    whole = histories.windows(1000)[0]["input_ids"]
    for day in (0.0, 0.15, 1.0, 10.0, 10.1, 30.0, 45.2):
        _, found = future(encoded, day)
        until = RECORD.filter(pl.col("time").is_null() | (pl.col("time") <= START + timedelta(days=day)))
        prompt = tokenizer.encode_histories(until).windows(1000)[0]["input_ids"]
        assert np.concatenate([prompt, found.tokens]).tolist() == whole.tolist()


@pytest.mark.parametrize(
    ("change", "message"),
    [({"horizon_days": 0.0}, "horizon_days got 0.0"), ({"subject_ids": [8]}, "lack 1 patients, the first: 8")],
)
def test_bad_questions_are_told(encoded, change, message):
    given = {
        "subject_ids": [7],
        "prediction_times": np.array([START], "datetime64[us]"),
        "horizon_days": 1.0,
        "end_of_data": np.datetime64(START),
    }
    with pytest.raises(ValueError, match=message):
        recorded_futures(encoded[1], **(given | change))


def test_distances_are_those_of_the_books():
    rng = np.random.default_rng(0)
    p, q = rng.integers(0, 9, (2, 40))
    assert jensen_shannon(p, q) == pytest.approx(jensenshannon(p, q, base=2) ** 2)
    a, b = rng.integers(0, 5, 30), rng.integers(0, 6, 50)
    assert kolmogorov(a, b) == pytest.approx(ks_2samp(a, b).statistic)
    assert np.isnan(kolmogorov([], b))
    assert np.isnan(jensen_shannon([0, 0], [1, 0]))


# -- a planted world: a visit after a gap, with some laboratory values, again and again -------------------------------

PAD, VS, VE, REG, WEEK, LAB, DIAGNOSIS, DEATH = range(8)
TYPES = [TYPE_PAD, TYPE_VS, TYPE_VE, TYPE_REG, TYPE_INTERVAL, TYPE_LAB, TYPE_DIAGNOSIS, TYPE_OTHER]
NAMES = ["[PAD]", "[VS]", "[VE]", "[REG]", "[W_0]", "LAB//A", "DIAGNOSIS//D", "MEDS_DEATH"]
HORIZON = 30.0


def drawn_future(rng, gap=5.0, labs=2.0, death=0.0):
    """Tokens, days, and whether it ended in death."""
    tokens, days, now = [], [], 0.0
    while True:
        now += rng.exponential(gap)
        if now > HORIZON:
            return np.array(tokens, np.int64), np.array(days, float), False
        tokens, days = [*tokens, WEEK, VS], [*days, np.nan, now]
        if rng.random() < death:
            return np.array([*tokens, DEATH]), np.array([*days, now]), True
        for token in (*[LAB] * (1 + rng.poisson(labs)), DIAGNOSIS, VE, REG):
            tokens, days = [*tokens, token], [*days, now]


def planted(patients, num, seed, **world):
    """Trajectories of one world, and records of the plain one."""
    rng = np.random.default_rng(seed)
    records = []
    for subject in range(patients):
        tokens, days, _ = drawn_future(rng, death=0.05)
        records.append(RecordedFuture(subject, tokens, days, 100.0, np.array([VS]), 20.0 + subject % 60))
    trajectories = []
    for _ in records:
        futures = [drawn_future(rng, **{"death": 0.05, **world}) for _ in range(num)]
        ends = np.array([TrajectoryEnd.DEATH if died else TrajectoryEnd.HORIZON for _, _, died in futures], np.int8)
        last = np.array([days[-1] if died else HORIZON for _, days, died in futures])
        trajectories.append(
            PatientTrajectories(
                np.zeros((num, 0, 1)),
                np.zeros((num, 0)),
                ends,
                last,
                np.array([len(tokens) for tokens, _, _ in futures]),
                [tokens for tokens, _, _ in futures],
                [days for _, days, _ in futures],
            )
        )
    return trajectories, records


def compare(trajectories, records, **change):
    given = {"horizon_days": HORIZON, "types": TYPES, "names": NAMES, "death_ids": (DEATH,), "num_resamples": 200}
    return compare_futures(trajectories, records, **(given | change))


def test_trajectories_of_the_same_world_are_as_near_as_halves():
    report = compare(*planted(300, 4, seed=0))
    assert (report.predictions, report.patients, report.trajectories, report.left_out) == (300, 300, 1200, 0)
    for each in report.distances:
        assert each.distance < 1.5 * each.yardstick + 1e-3, each
    for rate in report.kinds:
        assert rate.ratio.low < 1 < rate.ratio.high, rate
    assert {rate.group for rate in report.kinds} == {"lab", "diagnosis", "other", "visits", "deaths"}
    assert [rate.group for rate in report.ages][:2] == ["18 to 39 years: events", "18 to 39 years: visits"]


@pytest.mark.parametrize(
    ("world", "measure", "rate"),
    [
        ({"gap": 9.0}, "days to the next visit", "visits"),
        ({"gap": 9.0}, "visits", "visits"),
        ({"labs": 5.0}, "events of a visit", "lab"),
        ({"labs": 5.0}, "codes", "lab"),
        ({"death": 0.3}, "events", "deaths"),
    ],
)
def test_trajectories_of_another_world_are_told(world, measure, rate):
    report = compare(*planted(300, 4, seed=1, **world))
    found = next(each for each in report.distances if each.measure == measure)
    assert found.distance > 2 * found.yardstick
    ratio = next(each for each in report.kinds if each.group == rate).ratio
    assert not ratio.low < 1 < ratio.high


def test_rates_by_hand():
    record = RecordedFuture(1, np.array([WEEK, VS, LAB, LAB, VE, REG]), np.array([np.nan, 2, 2, 3, 3, 3]), 99.0,
                            np.array([]), 50.0)  # fmt: skip
    dead = RecordedFuture(2, np.array([DEATH, VE]), np.array([10.0, 10.0]), 5.0, np.array([]), 50.0)
    unfollowed = RecordedFuture(3, np.array([LAB]), np.array([1.0]), 5.0, np.array([]), 50.0)
    drawn = PatientTrajectories(
        np.zeros((2, 0, 1)),
        np.zeros((2, 0)),
        np.array([TrajectoryEnd.HORIZON, TrajectoryEnd.LENGTH], np.int8),
        np.array([30.0, 20.0]),
        np.array([1, 2]),
        [np.array([LAB]), np.array([LAB, LAB])],
        [np.array([1.0]), np.array([1.0, 20.0])],
    )
    report = compare([drawn] * 3, [record, dead, unfollowed], num_resamples=0)
    assert (report.predictions, report.left_out, report.cut) == (2, 1, 0.5)
    rates = {each.group: (each.drawn, each.recorded) for each in report.kinds}
    # Recorded: 2 laboratory values, a death and a visit in 30 + 10 days. Drawn: 2 x 3 values in 2 x 50 days.
    assert rates["lab"] == pytest.approx((6.0, 5.0))
    assert rates["visits"] == pytest.approx((0.0, 2.5))
    assert rates["deaths"] == pytest.approx((0.0, 2.5))
    assert report.codes["MEDS_DEATH"] == pytest.approx((0.0, 2.5))
    found = {each.measure: (each.drawn, each.recorded, each.recorded_mean) for each in report.distances}
    assert found["days of a visit"][1:] == (1, 1.0)
    assert found["events of a visit"][1:] == (1, 2.0)
    assert found["days to the next visit"][1:] == (1, 2.0)
    assert np.isnan(next(iter(report.distances)).yardstick)
    assert report.to_dict()["distances"][0]["yardstick"] is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda drawn, known: (drawn[1:], known), "trajectories of 2 prompts and 3 recorded"),
        (lambda drawn, known: ([PatientTrajectories(*[np.zeros((1, 1))] * 5)] * 3, known), "keep_tokens=True"),
        (lambda drawn, known: (drawn, [_cut(each) for each in known]), "none of the 3 predictions was followed"),
    ],
)
def test_bad_comparisons_are_told(change, message):
    with pytest.raises(ValueError, match=message):
        compare(*change(*planted(3, 1, seed=0)))


def _cut(known):
    return RecordedFuture(known.subject_id, known.tokens[:0], known.days[:0], 3.0, known.known, known.age)
