"""Gaps between events in bins: distribution function, its inverse, and what waiting rules out; by hand-made cases."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from ehrseq.modeling.configuration_ehrmamba import INTERVAL_DAYS, EhrMambaConfig
from ehrseq.modeling.ehr_intervals import INTERVAL_SPANS, draw_interval, interval_spans, share_beyond
from ehrseq.modeling.ehr_time_head import (
    DEFAULT_TIME_EDGES,
    EhrTimeHead,
    draw_gap,
    gap_bins,
    gap_cdf,
    share_within,
    waiting_weights,
)
from ehrseq.tokenization.ehr_vocabulary import interval_token

EDGES = torch.tensor([0.0, 1.0, 3.0], dtype=torch.float64)
PROBS = torch.tensor([0.1, 0.2, 0.4, 0.3], dtype=torch.float64)  # 0 exactly, [0, 1), [1, 3), [3, inf) of mean 3
SPECIALS = {"[VS]": 1, "[VE]": 2, "[REG]": 3, **{token: 4 + k for k, token in enumerate(INTERVAL_SPANS)}}


def doubles(*values):
    return torch.tensor(values, dtype=torch.float64)


def tiny_config(**changes):
    sizes = {"vocab_size": 26, "hidden_size": 8, "num_hidden_layers": 1, "state_size": 2, "special_token_ids": SPECIALS}
    return EhrMambaConfig(**(sizes | changes))


def test_distribution_function_by_hand():
    cases = {
        -1.0: 0.0,
        0.0: 0.1,
        0.5: 0.2,
        1.0: 0.3,
        2.0: 0.5,
        3.0: 0.7,
        6.0: 0.7 + 0.3 * (1 - math.exp(-1)),
        1e9: 1.0,
        math.inf: 1.0,
    }
    days = doubles(*cases)
    got = gap_cdf(PROBS.log().expand(len(cases), -1), EDGES, days)
    assert got.dtype == torch.float64
    np.testing.assert_allclose(got.numpy(), list(cases.values()), rtol=0, atol=1e-15)
    assert gap_cdf(PROBS.log(), EDGES, doubles(2.0)[0]).item() == pytest.approx(0.5, abs=1e-15)


def test_single_precision_logs_are_normalised_in_double():
    logs = torch.randn(50, 4, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    assert gap_cdf(logs, EDGES, torch.full((50,), math.inf, dtype=torch.float64)).min() > 1 - 1e-15


@pytest.mark.parametrize(
    ("uniform", "low", "high", "expected"),
    [
        (0.05, 0.0, math.inf, 0.0),  # the share of a gap of 0
        (0.1, 0.0, math.inf, 0.0),  # where the next bin begins
        (0.2, 0.0, math.inf, 0.5),
        (0.5, 0.0, math.inf, 2.0),
        (0.7 + 0.3 * (1 - math.exp(-1)), 0.0, math.inf, 6.0),
        (0.0, 2.0, math.inf, 2.0),
        (0.2 / 0.5, 2.0, math.inf, 3.0),  # beyond 2 lie 0.2 of [1, 3) and 0.3
        (0.5, 2.0, 3.0, 2.5),
        (0.25, 1.0, 3.0, 1.5),
        (0.5, 6.0, math.inf, 6.0 + 3.0 * math.log(2)),  # memoryless: as beyond 3
        (0.5, 3.0, 6.0, 3.0 - 3.0 * math.log1p(-0.5 * (1 - math.exp(-1)))),
        (0.5, 0.25, 0.75, 0.5),
    ],
)
def test_inverse_within_a_span_by_hand(uniform, low, high, expected):
    got = draw_gap(PROBS.log()[None], EDGES, doubles(uniform), doubles(low), doubles(high))
    assert got.item() == pytest.approx(expected, abs=1e-12)


def test_inverse_is_the_inverse():
    uniform = torch.rand(2000, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    logs = torch.randn(2000, len(DEFAULT_TIME_EDGES) + 1, generator=torch.Generator().manual_seed(2)).log_softmax(-1)
    edges = doubles(*DEFAULT_TIME_EDGES)
    zero, endless = torch.zeros(2000, dtype=torch.float64), torch.full((2000,), math.inf, dtype=torch.float64)
    days = draw_gap(logs, edges, uniform, zero, endless)
    reached = gap_cdf(logs, edges, days)
    positive = days > 0
    assert positive.sum() > 1900
    assert (reached - uniform)[positive].abs().max() < 1e-13
    assert (reached >= uniform)[~positive].all()


def test_a_span_is_half_open_whatever_is_rounded():
    ones = torch.full((4,), 1.0 - 2.0**-53, dtype=torch.float64)
    low, high = doubles(0.0, 1.0, 3.0, 2.9), doubles(1.0, 3.0, 6.0, 3.0)
    days = draw_gap(PROBS.log().expand(4, -1), EDGES, ones, low, high)
    assert ((days >= low) & (days < high)).all()


def test_a_span_without_probability_is_uniform_or_its_beginning():
    probs = doubles(1.0, 0.0, 0.0, 0.0).log().expand(2, -1)
    days = draw_gap(probs, EDGES, doubles(0.25, 0.25), doubles(1.0, 2.0), doubles(3.0, math.inf))
    assert days.tolist() == [1.5, 2.0]


def test_bins_and_shares_by_hand():
    assert gap_bins(EDGES, doubles(0.0, 1e-9, 0.999, 1.0, 2.999, 3.0, 99.0)).tolist() == [0, 1, 1, 2, 2, 3, 3]
    shares = share_within(EDGES, doubles(0.0, 0.5, 3.0), doubles(math.inf, 2.0, math.inf))
    np.testing.assert_allclose(shares, [[1, 1, 1, 1], [0, 0.5, 0.5, 0], [0, 0, 0, 1]], atol=1e-15)


# -- interval tokens ---------------------------------------------------------------------------------------------------


def test_every_day_lies_in_the_span_of_its_token():
    for days in range(1001):
        low, high = INTERVAL_SPANS[interval_token(days)]
        assert low <= days < high
        assert days + 1 <= high  # a token says whole days: the day's last instant has the same one
    assert list(INTERVAL_SPANS) == list(INTERVAL_DAYS)
    spans = list(INTERVAL_SPANS.values())
    assert all(before[1] == after[0] for before, after in pairwise(spans))
    edges = set(DEFAULT_TIME_EDGES)
    assert all({low, high} - {math.inf} <= edges for low, high in INTERVAL_SPANS.values())


def test_the_middle_of_a_token_is_the_mean_of_its_span():
    uniform = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    for token, (low, high) in INTERVAL_SPANS.items():
        days = draw_interval(torch.full_like(uniform, low), torch.full_like(uniform, high), uniform)
        assert ((days >= low) & (days < high)).all()
        # [M_12] covers 6 days, not 30: its token's middle (375) lies beyond them, and [M_0]'s is its middle.
        expected = 363.0 if token == "[M_12]" else INTERVAL_DAYS[token]
        assert days.mean().item() == pytest.approx(expected, abs=2e-3)


def test_shares_beyond_by_hand():
    low, high = doubles(7.0, 7.0, 7.0, 366.0, 366.0), doubles(14.0, 14.0, 14.0, math.inf, math.inf)
    share = share_beyond(low, high, doubles(0.0, 8.75, 14.0, 100.0, 366.0 + 181.0))
    np.testing.assert_allclose(share, [1.0, 0.75, 0.0, 1.0, math.exp(-1)], atol=1e-15)


def test_spans_of_a_vocabulary():
    spans = interval_spans(tiny_config())
    assert spans.dtype == torch.float64
    assert spans[SPECIALS["[M_3]"]].tolist() == [90.0, 120.0]
    assert spans[[0, 1, 2, 3, 22, 25]].isnan().all()


# -- waiting -----------------------------------------------------------------------------------------------------------


def test_waiting_between_visits():
    weights = waiting_weights(tiny_config(), None, torch.zeros(26, 8), torch.zeros(8), 10.5, inside_visit=False)
    assert weights.dtype == torch.float64
    by_token = {token: weights[number].item() for token, number in SPECIALS.items()}
    assert by_token["[W_0]"] == 0.0
    assert by_token["[W_1]"] == 0.5
    assert by_token["[W_2]"] == by_token["[LT]"] == 1.0
    assert weights[22:].tolist() == [1.0] * 4


def test_waiting_inside_a_visit_is_told_by_the_head():
    config = tiny_config(time_edges=EDGES.tolist())
    head = EhrTimeHead(config)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.zero_()
        head.out.bias.copy_(PROBS.log())
    for elapsed, beyond in ((0.0, 0.9), (0.5, 0.8), (3.0, 0.3)):
        weights = waiting_weights(config, head, torch.randn(26, 8), torch.randn(8), elapsed, inside_visit=True)
        assert weights[25].item() == pytest.approx(beyond, abs=1e-7)
        # Where its end is not recorded, a visit is closed after the fact.
        assert weights[SPECIALS["[VE]"]].item() == pytest.approx(beyond + 0.1, abs=1e-7)
        between = waiting_weights(config, head, torch.randn(26, 8), torch.randn(8), elapsed, inside_visit=False)
        assert between[25].item() == 1.0


@pytest.mark.parametrize(
    ("changes", "elapsed", "message"),
    [
        ({"special_token_ids": None}, 1.0, "update_from_tokenizer"),
        ({}, -1.0, "elapsed_days got -1.0"),
        ({}, math.nan, "elapsed_days got nan"),
        ({}, math.inf, "elapsed_days got inf"),
    ],
)
def test_bad_waiting(changes, elapsed, message):
    with pytest.raises(ValueError, match=message):
        waiting_weights(tiny_config(**changes), None, torch.zeros(26, 8), torch.zeros(8), elapsed, inside_visit=False)


@pytest.mark.parametrize(
    "edges", [[0.0], [], [1.0, 2.0], [0.0, 2.0, 1.0], [0.0, 1.0, 1.0], [0.0, math.nan], [0.0, math.inf]]
)
def test_bad_edges(edges):
    with pytest.raises(ValueError, match="time_edges"):
        tiny_config(time_edges=edges)


def test_a_head_needs_edges():
    with pytest.raises(ValueError, match="time_edges is None"):
        EhrTimeHead(tiny_config())
