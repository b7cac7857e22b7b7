"""Trajectories: the naive sampler draws the same ones, whatever is drawn beside them; ends, clocks and estimators."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks.tables.markov_model import ID as MARKOV
from benchmarks.tables.markov_model import SPANS, TOKENS, markov_model, markov_prompt
from ehrseq.modeling import trajectory_engine
from ehrseq.modeling.ehr_time_head import DEFAULT_TIME_EDGES
from ehrseq.modeling.ehr_trajectories import ForecastPrompt, OutcomeTokens, TrajectoryEnd, TrajectoryRequest
from ehrseq.modeling.fast_forecast import why_not_fast
from ehrseq.modeling.modeling_ehrmamba import EhrMambaForCausalLM
from tests.modeling.common import collate
from tests.modeling.naive_trajectories import NaiveSampler, keys_of
from tests.modeling.test_ehrmamba_generation import ID, PROMPT, history
from tests.modeling.test_ehrmamba_generation import model as make_model

OPEN = PROMPT[:-2]  # a visit that goes on
LAB, DRUG, DEATH = ID["LAB"], ID["DRUG"], ID["[MASK]"]
OUTCOMES = (OutcomeTokens("lab", np.array([LAB])), OutcomeTokens("other", np.array([ID["PROCEDURE"], ID["DIAGNOSIS"]])))


def forecaster(seed=0, head=False, events=1.5):
    """A random model that finds events likelier than unknown tokens, so that its futures are worth a look."""
    model = make_model(seed)
    if head:
        config = copy.deepcopy(model.config)
        config.time_edges = list(DEFAULT_TIME_EDGES)
        torch.manual_seed(seed)
        with_head = EhrMambaForCausalLM(config).eval()
        with_head.load_state_dict(model.state_dict(), strict=False)
        with torch.no_grad():
            for parameter in with_head.time_head.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.3)
        model = with_head
    with torch.no_grad():
        model.lm_head.weight.mul_(events)
    return model


def prompt(tokens=PROMPT, elapsed=0.5, key=7, **start):
    inputs = {name: values[None] for name, values in history(tokens, **start).items()}
    return ForecastPrompt({n: v.float() if v.is_floating_point() else v for n, v in inputs.items()}, elapsed, key)


def request(**changes):
    return TrajectoryRequest(
        **({"horizon_days": 60.0, "num": 6, "outcomes": OUTCOMES, "death_ids": (DEATH,)} | changes)
    )


def draw(model, prompts, asked, **options):
    return list(model.trajectories(prompts, asked, **options))


def assert_same_bytes(first, second):
    for a, b in zip(first, second, strict=True):
        for name in ("incidence", "first_days", "ends", "end_days", "lengths"):
            assert getattr(a, name).tobytes() == getattr(b, name).tobytes(), name
        assert (a.tokens is None) == (b.tokens is None)
        for name in ("tokens", "days") if a.tokens is not None else ():
            assert all(x.tobytes() == y.tobytes() for x, y in zip(getattr(a, name), getattr(b, name), strict=True))


@pytest.fixture(params=["fast", "torch"])
def way(request, monkeypatch):
    """Both ways that rows are computed."""
    if request.param == "torch":
        monkeypatch.setattr(trajectory_engine, "why_not_fast", lambda model: "asked for by a test")
    elif why_not_fast(make_model()):
        pytest.skip("no compiled kernels here")
    return request.param


# -- the truth: the sampler that reads the whole record for every token ------------------------------------------------
@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize(("tokens", "elapsed"), [(PROMPT, 0.0), (PROMPT, 12.5), (OPEN, 0.0), (OPEN, 0.7)])
def test_the_naive_sampler_draws_the_same(way, head, tokens, elapsed):
    model = forecaster(head=head)
    naive = NaiveSampler(copy.deepcopy(model))
    asked = request(
        horizon_days=500.0, num=8, keep_tokens=True, estimator="scope", seed=3, grid_days=(60.0, 500.0), max_tokens=25
    )
    (found,) = draw(model, [prompt(tokens, elapsed)], asked)
    record = {name: values[0].tolist() for name, values in prompt(tokens, elapsed).inputs.items()}
    for k in range(8):
        drawn, days, told, end = naive.draw(
            record, elapsed, keys_of(3, 7, k), 500.0, outcome=(LAB,), ending=(DEATH,), grid=(60.0, 500.0)
        )
        kept = min(len(drawn), 25)
        assert found.tokens[k].tolist() == drawn[:kept]
        np.testing.assert_allclose(found.days[k], days[:kept], rtol=1e-4, atol=1e-4)
        until = drawn.index(LAB) + 1 if LAB in drawn[:kept] else len(told)
        np.testing.assert_allclose(found.incidence[k, 0], np.sum(told[: min(until, 25)], axis=0), atol=2e-4)
        if len(drawn) < 25:
            assert found.ends[k] == (TrajectoryEnd.DEATH if end == "end" else TrajectoryEnd.HORIZON)


@pytest.mark.parametrize("head", [False, True])
def test_the_naive_sampler_avoids_outcomes_alike(way, head):
    model = forecaster(head=head)
    naive = NaiveSampler(copy.deepcopy(model))
    asked = request(
        horizon_days=500.0, num=6, keep_tokens=True, estimator="reach", seed=5, grid_days=(90.0, 500.0), max_tokens=40
    )
    (found,) = draw(model, [prompt()], asked)
    record = {name: values[0].tolist() for name, values in prompt().inputs.items()}
    for k in range(6):
        drawn, _, told, _ = naive.draw(
            record, 0.5, keys_of(5, 7, k, (LAB,)), 500.0, (LAB,), avoid=True, ending=(DEATH,), grid=(90.0, 500.0)
        )
        assert found.tokens[k].tolist() == drawn[:40]
        left, incidence = 1.0, np.zeros(2)
        for h in told[:40]:
            incidence, left = incidence + left * np.array(h), left * (1 - h[-1])
        np.testing.assert_allclose(found.incidence[k, 0], incidence, atol=2e-4)
        assert LAB not in drawn


# -- the same bytes ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("estimator", ["monte_carlo", "scope", "reach"])
def test_nothing_depends_on_what_is_drawn_beside_it(way, estimator, head):
    model = forecaster(head=head)
    prompts = [prompt(key=k, week=10.0 + k, elapsed=0.3 * k) for k in range(5)]
    asked = request(estimator=estimator, keep_tokens=True, horizon_days=2000.0, grid_days=(30.0, 2000.0), num=7)
    whole = draw(model, prompts, asked)
    assert sum(patient.lengths.sum() for patient in whole) > 60
    # other numbers of slots, one of them alone
    for slots in (1, 3, 100):
        assert_same_bytes(draw(model, prompts[:3], asked, slots=slots), whole[:3])
    # another order, other company
    assert_same_bytes(draw(model, prompts[:0:-1], asked), whole[:0:-1])
    # more threads
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        assert_same_bytes(draw(model, prompts, asked), whole)
        assert torch.get_num_threads() == threads + 1
    finally:
        torch.set_num_threads(threads)
    # in two calls
    first, second = (draw(model, prompts, replace(asked, first=k, num=n)) for k, n in ((0, 3), (3, 4)))
    for patient, early, late in zip(whole, first, second, strict=True):
        for name in ("incidence", "first_days", "ends", "end_days", "lengths"):
            joined = np.concatenate([getattr(early, name), getattr(late, name)])
            assert joined.tobytes() == getattr(patient, name).tobytes(), name


def test_a_copied_state_goes_on_as_one_of_its_own(way):
    """Eight trajectories of one reading, and eight readings with one trajectory each."""
    model, asked = forecaster(), request(num=8, keep_tokens=True, horizon_days=300.0)
    (together,) = draw(model, [prompt()], asked)
    for k in range(8):
        (alone,) = draw(model, [prompt()], replace(asked, first=k, num=1))
        assert alone.tokens[0].tolist() == together.tokens[k].tolist()
        assert alone.days[0].tobytes() == together.days[k].tobytes()
    assert len({tuple(tokens) for tokens in together.tokens}) > 4  # not one future over and over


def test_seeds_and_keys_make_other_futures():
    model, asked = forecaster(), request(num=8, keep_tokens=True, horizon_days=300.0)
    (first,), (other_seed,) = draw(model, [prompt()], asked), draw(model, [prompt()], replace(asked, seed=1))
    (other_key,) = draw(model, [prompt(key=8)], asked)
    texts = [[tokens.tolist() for tokens in each.tokens] for each in (first, other_seed, other_key)]
    assert texts[0] != texts[1]
    assert texts[0] != texts[2]
    assert texts[1] != texts[2]


def test_an_outcome_is_the_same_whichever_others_are_asked_for():
    model, asked = forecaster(), request(estimator="reach", num=5)
    (both,), (alone,) = draw(model, [prompt()], asked), draw(model, [prompt()], replace(asked, outcomes=OUTCOMES[1:]))
    assert both.incidence[:, 1].tobytes() == alone.incidence[:, 0].tobytes()


@pytest.mark.parametrize("slots", [2, 8])
def test_prompts_are_read_as_they_are_needed(slots):
    """Neither the patients at work nor those that are done pile up."""
    read = []

    def many():
        for k in range(200):
            read.append(k)
            yield prompt(key=k)

    ahead = [len(read) - k for k, _ in enumerate(forecaster().trajectories(many(), request(num=2), slots=slots))]
    assert len(ahead) == 200
    assert max(ahead) <= trajectory_engine.WAITING_PATIENTS * slots + 1


# -- ends and clocks, on a model of six events by hand -----------------------------------------------------------------
CLOSED = ("[VS]", "A", "[VE]", "[REG]")


def events(*tokens):
    return tuple(MARKOV[token] for token in tokens)


def futures(tokens=CLOSED, elapsed=0.0, head=False, **changes):
    asked = {"horizon_days": 45.0, "num": 400, "keep_tokens": True, "death_ids": events("DEATH")} | changes
    (drawn,) = draw(markov_model(time_head=head), [markov_prompt(tokens, elapsed)], TrajectoryRequest(**asked))
    return drawn


@pytest.mark.parametrize("head", [False, True])
def test_trajectories_end_for_the_reason_that_they_tell(head):
    drawn = futures(head=head, until_ids=events("RARE", "LAB"), max_tokens=12)
    for tokens, days, end, day, length in zip(
        drawn.tokens, drawn.days, drawn.ends, drawn.end_days, drawn.lengths, strict=True
    ):
        assert len(tokens) == len(days) == length <= 12
        real = days[~np.isnan(days)]
        assert (np.diff(real) >= 0).all()
        assert (real >= 0).all()
        assert (real <= 45).all()
        assert all(np.isnan(d) == (TOKENS[t] in SPANS) for t, d in zip(tokens, days, strict=True))
        ending = [TOKENS[t] in ("DEATH", "RARE", "LAB") for t in tokens]
        assert not any(ending[:-1])
        last = TOKENS[tokens[-1]] if length else None
        expected = {"DEATH": TrajectoryEnd.DEATH, "RARE": TrajectoryEnd.UNTIL, "LAB": TrajectoryEnd.UNTIL}.get(last)
        if expected is None:
            expected = TrajectoryEnd.LENGTH if length == 12 else TrajectoryEnd.HORIZON
        assert end == expected
        assert day == (45.0 if end == TrajectoryEnd.HORIZON else real[-1])
    assert set(drawn.ends) == {TrajectoryEnd.HORIZON, TrajectoryEnd.DEATH, TrajectoryEnd.UNTIL, TrajectoryEnd.LENGTH}


def test_days_after_an_interval_lie_within_its_span():
    drawn = futures(num=2000, horizon_days=100.0)
    gaps = {token: [] for token in SPANS}
    for tokens, days in zip(drawn.tokens, drawn.days, strict=True):
        clock = 0.0
        for k, token in enumerate(tokens):
            if TOKENS[token] in SPANS and k + 1 < len(tokens):
                gaps[TOKENS[token]].append(days[k + 1] - clock)
            elif TOKENS[token] not in SPANS:
                clock = days[k]
    week, month = np.array(gaps["[W_0]"]), np.array(gaps["[M_1]"])
    assert 0 <= week.min() < 0.1
    assert 6.9 < week.max() < 7
    assert month.min() >= 30
    assert month.max() < 60
    assert gaps["[LT]"] == []  # a year begins beyond the horizon: such a trajectory ends at once
    assert week.mean() == pytest.approx(3.5, abs=0.2)


def test_a_horizon_inside_an_interval_takes_its_share():
    """[M_1] covers 30 to 60 days: a visit within 45 days of it has half the probability, nothing before 30 any."""
    drawn = futures(num=4000, outcomes=(OutcomeTokens("visit", np.array(events("[VS]"))),), grid_days=(29.0, 45.0))
    after_month = np.array([len(t) > 0 and TOKENS[t[0]] == "[M_1]" for t in drawn.tokens])
    assert after_month.mean() == pytest.approx(0.35, abs=0.03)
    assert drawn.incidence[after_month, 0, 0].max() == 0
    assert drawn.incidence[after_month, 0, 1].mean() == pytest.approx(0.5, abs=0.05)
    # SCOPE says it without noise: where the interval is [M_1], h of the step after it is (45 - 30) / 30.
    told = futures(num=500, estimator="scope", outcomes=(OutcomeTokens("visit", np.array(events("[VS]"))),))
    after_month = np.array([len(t) > 0 and TOKENS[t[0]] == "[M_1]" for t in told.tokens])
    np.testing.assert_allclose(told.incidence[after_month, 0, 0], 0.5, atol=1e-6)


def test_silence_rules_out_what_would_have_come():
    """After 40 silent days [W_0] is over and of [M_1] 20 of 30 days are left: 0.35 * 2 / 3 against 0.15 of [LT]."""
    drawn = futures(elapsed=40.0, num=4000, horizon_days=400.0)
    first = np.array([TOKENS[t[0]] if len(t) else "[LT]" for t in drawn.tokens])  # beyond: [LT] was drawn and ends it
    month = 0.35 * 2 / 3
    assert "[W_0]" not in first
    assert (first == "[M_1]").mean() == pytest.approx(month / (month + 0.15), abs=0.03)
    visits = np.array([d[1] for t, d in zip(drawn.tokens, drawn.days, strict=True) if TOKENS[t[0]] == "[M_1]"])
    assert visits.min() >= 0
    assert visits.max() < 20
    assert visits.mean() == pytest.approx(10, abs=0.7)


def test_a_trajectory_may_stop_once_all_is_known():
    asked = {"outcomes": (OutcomeTokens("visit", np.array(events("[VS]"))),), "keep_tokens": False, "max_tokens": 50}
    stopped, whole = futures(**asked), futures(**asked, stop_at_outcomes=False)
    assert stopped.incidence.tobytes() == whole.incidence.tobytes()
    assert stopped.first_days.tobytes() == whole.first_days.tobytes()
    assert stopped.lengths.sum() < whole.lengths.sum() / 2
    assert (stopped.ends == TrajectoryEnd.OUTCOME).sum() == np.isfinite(stopped.first_days).sum()


def test_a_complement_is_what_is_left():
    ids = np.array(events("[VS]"))
    asked = {"outcomes": (OutcomeTokens("visit", ids), OutcomeTokens("none", ids, complement=True)), "num": 50}
    for estimator in ("monte_carlo", "scope", "reach"):
        drawn = futures(estimator=estimator, **asked)
        np.testing.assert_allclose(drawn.incidence.sum(1), 1.0, atol=1e-12)


def test_reach_ends_where_its_outcome_is_certain():
    """After [VE] only [REG] can come: nothing is left to draw where it is to be avoided."""
    drawn = futures(("[VS]", "A", "[VE]"), estimator="reach", outcomes=(OutcomeTokens("x", np.array(events("[REG]"))),))
    assert (drawn.incidence == 1).all()
    assert (drawn.ends == TrajectoryEnd.OUTCOME).all()
    assert (drawn.lengths == 0).all()


@pytest.mark.parametrize(("changes", "tokens"), [({"top_k": 1}, {"[W_0]"}), ({"top_p": 0.6}, {"[W_0]", "[M_1]"})])
def test_other_distributions_are_drawn_from_only_when_asked(changes, tokens):
    drawn = futures(horizon_days=500.0, num=200, max_tokens=1, **changes)
    assert {TOKENS[t[0]] for t in drawn.tokens} == tokens


def test_a_low_temperature_takes_the_likeliest():
    drawn = futures(num=300, max_tokens=1, temperature=0.2)
    assert np.mean([TOKENS[t[0]] == "[W_0]" for t in drawn.tokens if len(t)]) > 0.8


# -- the model ---------------------------------------------------------------------------------------------------------
def test_adapters_hooks_and_half_precision_take_the_models_own_forward():
    model, asked = forecaster(), request(num=4)
    expected = draw(model, [prompt()], asked)[0]
    seen = []
    handle = model.model.register_forward_hook(lambda *_: seen.append(1))
    assert "hooks" in why_not_fast(model)
    hooked = draw(model, [prompt()], asked)[0]
    handle.remove()
    assert seen
    np.testing.assert_allclose(hooked.incidence, expected.incidence, atol=1e-6)
    half = copy.deepcopy(model).to(torch.bfloat16)
    assert "float32" in why_not_fast(half)
    first = draw(half, [prompt(key=k) for k in range(3)], asked)
    assert_same_bytes(draw(half, [prompt(key=k) for k in range(3)], asked, slots=5), first)


def test_a_model_that_changes_on_the_way_is_noticed():
    model = forecaster()
    if why_not_fast(model):
        pytest.skip("no compiled kernels here")
    drawn = model.trajectories([prompt(key=k) for k in range(300)], request(num=1), slots=1)
    next(drawn)
    model.to(torch.float64)
    with pytest.raises(RuntimeError, match="changed while trajectories were drawn"):
        list(drawn)


def test_a_forecast_of_a_padded_batch_is_that_of_its_rows():
    model = forecaster()
    patients = [history(PROMPT), history(OPEN, week=3.0, age=70.0), history([*PROMPT, "[M_3]", "[VS]", "LAB"])]
    asked = {"outcomes": {"lab": [LAB]}, "horizon_days": 60.0, "num": 6, "death_ids": (DEATH,)}
    expected = [
        next(model.forecast([prompt_of(patient, key)], **asked)).estimates for key, patient in enumerate(patients)
    ]
    for side in ("left", "right"):
        found = list(model.forecast(collate(patients, side), elapsed_days=0.5, **asked))
        assert [row.estimates for row in found] == expected


def prompt_of(patient, key):
    inputs = {n: v[None].float() if v.is_floating_point() else v[None] for n, v in patient.items()}
    return ForecastPrompt(inputs, 0.5, key)
