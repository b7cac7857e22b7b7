"""Trajectories: the naive sampler draws the same ones, whatever is drawn beside them; ends, clocks and estimators."""

import copy

import numpy as np
import pytest
import torch

from ehrseq.modeling import trajectory_engine
from ehrseq.modeling.ehr_time_head import DEFAULT_TIME_EDGES
from ehrseq.modeling.ehr_trajectories import ForecastPrompt, OutcomeTokens, TrajectoryEnd, TrajectoryRequest
from ehrseq.modeling.fast_forecast import why_not_fast
from ehrseq.modeling.modeling_ehrmamba import EhrMambaForCausalLM
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
    asked = request(num=5, keep_tokens=True, estimator="scope", seed=3, grid_days=(15.0, 60.0), max_tokens=25)
    (found,) = draw(model, [prompt(tokens, elapsed)], asked)
    record = {name: values[0].tolist() for name, values in prompt(tokens, elapsed).inputs.items()}
    for k in range(5):
        drawn, days, told, end = naive.draw(
            record, elapsed, keys_of(3, 7, k), 60.0, outcome=(LAB,), ending=(DEATH,), grid=(15.0, 60.0)
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
    asked = request(num=4, keep_tokens=True, estimator="reach", seed=5, grid_days=(20.0, 60.0), max_tokens=40)
    (found,) = draw(model, [prompt()], asked)
    record = {name: values[0].tolist() for name, values in prompt().inputs.items()}
    for k in range(4):
        drawn, _, told, _ = naive.draw(
            record, 0.5, keys_of(5, 7, k, (LAB,)), 60.0, (LAB,), avoid=True, ending=(DEATH,), grid=(20.0, 60.0)
        )
        assert found.tokens[k].tolist() == drawn[:40]
        left, incidence = 1.0, np.zeros(2)
        for h in told[:40]:
            incidence, left = incidence + left * np.array(h), left * (1 - h[-1])
        np.testing.assert_allclose(found.incidence[k, 0], incidence, atol=2e-4)
        assert LAB not in drawn
