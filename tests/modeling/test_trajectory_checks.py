"""What a trajectory sampler refuses, and in which words; random numbers that depend on what they are for alone."""

import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ehrseq.modeling.ehr_trajectories import ForecastPrompt, OutcomeTokens, TrajectoryRequest
from ehrseq.modeling.trajectory_draws import pool_of, trajectory_keys, uniforms
from tests.modeling.test_ehrmamba_generation import ID, PROMPT, history, model

NETWORK = model()
LAB = OutcomeTokens("lab", np.array([ID["LAB"]]))


def prompt(tokens=PROMPT, elapsed=0.0, key=1, **channels):
    inputs = {name: values[None] for name, values in history(tokens).items()} | channels
    inputs = {name: channel.float() if channel.is_floating_point() else channel for name, channel in inputs.items()}
    return ForecastPrompt(inputs, elapsed, key)


def ask(prompts=None, **changes):
    request = TrajectoryRequest(**({"horizon_days": 30.0, "num": 2, "outcomes": (LAB,)} | changes))
    return list(NETWORK.trajectories([prompt()] if prompts is None else prompts, request))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"horizon_days": 0}, "horizon_days got 0; expected days above 0"),
        ({"horizon_days": -1.0}, "horizon_days got -1.0"),
        ({"horizon_days": float("nan")}, "horizon_days got nan"),
        ({"horizon_days": float("inf")}, "horizon_days got inf"),
        ({"horizon_days": "30d"}, "horizon_days got '30d'"),
        ({"num": 0}, "num got 0; expected an integer of at least 1"),
        ({"num": 2.5}, "num got 2.5"),
        ({"first": -1}, "first got -1; expected an integer of at least 0"),
        ({"max_tokens": 0}, "max_tokens got 0"),
        ({"seed": "a"}, "seed got 'a'"),
        ({"grid_days": (10.0, 5.0, 30.0)}, "grid_days got .* ascending days above 0, the last one the horizon"),
        ({"grid_days": (0.0, 30.0)}, "ascending days above 0"),
        ({"grid_days": (10.0, 40.0)}, "the last one the horizon"),
        ({"estimator": "counting"}, "estimator got 'counting'; expected one of"),
        ({"estimator": "reach", "outcomes": ()}, "'reach' needs an outcome"),
        ({"outcomes": (OutcomeTokens("none", np.array([], dtype=np.int64)),)}, "'none' has no token"),
        ({"outcomes": (LAB, LAB)}, "'lab' stands twice"),
        ({"outcomes": (OutcomeTokens("far", np.array([10_000])),)}, r"'far' holds the ids 10000 to 10000.*0 \.\."),
        ({"outcomes": (OutcomeTokens("below", np.array([-1])),)}, "'below' holds the ids -1"),
        ({"outcomes": (OutcomeTokens("word", np.array(["LAB"])),)}, "'word' must be a flat list of token ids"),
        ({"outcomes": (OutcomeTokens("back", np.array([9 + 20, 26])),)}, "'back' .*"),
        ({"outcomes": (OutcomeTokens("gap", np.array([ID["[W_1]"]])),)}, r"'gap' holds \['\[W_1\]'\], which stand for"),
        ({"death_ids": (10_000,)}, "death_ids holds the ids 10000"),
        ({"until_ids": (-3,)}, "until_ids holds the ids -3"),
        ({"temperature": 0}, "temperature got 0"),
        ({"top_k": 0}, "top_k got 0"),
        ({"top_p": 1.5}, "top_p got 1.5"),
    ],
)
def test_requests_that_are_refused_at_once(changes, message):
    request = TrajectoryRequest(**({"horizon_days": 30.0, "num": 2, "outcomes": (LAB,)} | changes))
    with pytest.raises(ValueError, match=message):
        NETWORK.trajectories([], request)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (ForecastPrompt({}, 0.0, 1), "has no input_ids; expected one record"),
        (ForecastPrompt({"input_ids": torch.ones(2, 3, dtype=torch.long)}, 0.0, 1), r"has input_ids \[2, 3\]"),
        (ForecastPrompt({"input_ids": torch.ones(1, 0, dtype=torch.long)}, 0.0, 1), r"has input_ids \[1, 0\]"),
        (prompt(segment_ids=torch.ones(1, 6, dtype=torch.long)), "is packed"),
        (prompt(attention_mask=torch.tensor([[0, 1, 1, 1, 1, 1]])), "is padded"),
        (prompt(values=torch.zeros(1, 6)), r"unknown channels \['values'\]"),
        (prompt(ages=torch.zeros(1, 5)), r"ages has shape \[1, 5\]"),
        (prompt(input_ids=torch.full((1, 6), 99)), "input_ids holds values from 99 to 99"),
        (prompt(times=torch.full((1, 6), float("nan"))), "times holds NaN"),
        (prompt(elapsed=-0.5), "elapsed_days -0.5; expected days of at least 0"),
        (prompt(elapsed=float("nan")), "elapsed_days nan"),
        (prompt(key="a"), "a prompt's key is 'a'"),
        (prompt([*PROMPT, "[M_3]"]), r"ends on the interval token \[M_3\]"),
        (prompt(["[CLS]", "[VS]", "[MASK]", "[VE]"]), "holds the patient's death"),
    ],
)
def test_prompts_that_are_refused_when_their_turn_comes(made, message):
    with pytest.raises(ValueError, match=message):
        ask([made], death_ids=(ID["[MASK]"],))


@pytest.mark.parametrize("slots", [0, -1, 1.5, True])
def test_slots_must_be_some(slots):
    with pytest.raises(ValueError, match="slots got"):
        NETWORK.trajectories([], TrajectoryRequest(30.0), slots=slots)


def test_models_that_cannot_tell_the_time_or_forget_at_random_are_refused():
    network = model()
    with pytest.raises(ValueError, match="training mode"):
        network.train().trajectories([], TrajectoryRequest(30.0))
    network.eval().config.special_token_ids = None
    with pytest.raises(ValueError, match="special_token_ids lacks"):
        network.trajectories([], TrajectoryRequest(30.0))
    network.config.special_token_ids = {"[VS]": 4, "[VE]": 5}
    with pytest.raises(ValueError, match=r"lacks .*interval tokens"):
        network.trajectories([], TrajectoryRequest(30.0))


@pytest.mark.parametrize(
    ("inputs", "options", "message"),
    [
        ({}, {}, "the inputs need input_ids"),
        ({"input_ids": torch.ones(1, 3, dtype=torch.long), "segment_ids": torch.ones(1, 3)}, {}, "are packed"),
        ({"input_ids": torch.ones(1, 3, dtype=torch.long), "ages": torch.ones(1, 2)}, {}, r"ages has shape \[1, 2\]"),
        ({"input_ids": torch.ones(2, 3, dtype=torch.long)}, {"keys": [1]}, "keys has 1 entries for 2 rows"),
        ({"input_ids": torch.ones(2, 3, dtype=torch.long)}, {"elapsed_days": [1.0]}, "elapsed_days has 1 entries"),
        (
            {"input_ids": torch.ones(1, 3, dtype=torch.long), "attention_mask": torch.zeros(1, 3)},
            {},
            "row 0 holds padding only",
        ),
        ([], {"keys": [1]}, "those of a batch's rows"),
    ],
)
def test_batches_that_are_refused(inputs, options, message):
    with pytest.raises(ValueError, match=message):
        list(NETWORK.forecast(inputs, outcomes={"lab": [ID["LAB"]]}, horizon_days=30.0, **options))


def test_another_distribution_is_told(caplog):
    logger = logging.getLogger("ehrseq.modeling.trajectory_checks")
    logger.addHandler(caplog.handler)
    try:
        ask(temperature=0.7)
    finally:
        logger.removeHandler(caplog.handler)
    assert "what is estimated is that of another model" in caplog.text


# -- random numbers ----------------------------------------------------------------------------------------------------
def splitmix(x):
    """SplitMix64's finaliser in Python's own integers."""
    word = (1 << 64) - 1
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & word
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & word
    return x ^ (x >> 31)


def test_random_numbers_by_hand():
    """The first number of SplitMix64 from seed 0 is 0xE220A8397B1DCDAF (Vigna's reference); ours mixes twice."""
    golden, word = 0x9E3779B97F4A7C15, (1 << 64) - 1
    assert splitmix(golden) == 0xE220A8397B1DCDAF
    keys = [0, golden]
    for part in (-3 & word, 12, pool_of(np.array([4])), 5):
        keys = [splitmix(((key ^ part) + golden) & word) for key in keys]
    found = trajectory_keys(-3, 12, np.array([5]), pool_of(np.array([4])))
    assert found.tolist() == [keys]
    for counter in (0, 9):
        mixed = splitmix((splitmix((keys[0] + (counter + 1) * golden) & word) + keys[1]) & word)
        assert uniforms(found, np.array([counter])).tolist() == [(mixed >> 11) * 2.0**-53]


def test_random_numbers_are_even_and_their_own():
    keys = trajectory_keys(0, 1, np.arange(2000), 0)
    numbers = np.stack([uniforms(keys, np.full(2000, counter)) for counter in range(20)])
    assert 0 <= numbers.min() < numbers.max() < 1
    assert np.histogram(numbers, 16, (0, 1))[0].std() < 4 * np.sqrt(40_000 / 16)
    assert abs(np.corrcoef(numbers[0], numbers[1])[0, 1]) < 0.1
    assert abs(np.corrcoef(numbers[0, 1:], numbers[0, :-1])[0, 1]) < 0.1
    several = [trajectory_keys(s, k, np.arange(50), p) for s in (0, 1) for k in (0, 1) for p in (0, 1)]
    assert len(np.unique(np.concatenate(several), axis=0)) == 400


DEAD = SimpleNamespace(inputs={}, elapsed_days=0.0, key=1, reason="died_before_prediction")
KNOWN = {"horizon_days": 30.0, "outcomes": {"lab": [ID["LAB"]]}}


@pytest.mark.parametrize(
    ("records", "changes", "message"),
    [
        (None, {}, "records got None; expected a list"),
        ("abc", {}, "records got 'abc'"),
        ([{"subject_id": 1, "events": []}], {}, "a record got dict"),
        ([DEAD], {}, r"no forecast \(died_before_prediction\)"),
        ([], {"outcomes": ["death"]}, "outcomes holds 'death'"),
        ([], {"outcomes": 5}, "outcomes got 5"),
        ([], {"grid_days": 5}, "grid_days got 5"),
        ([], {"death_ids": None}, "death_ids got None"),
        ([], {"until_ids": None}, "until_ids got None"),
    ],
)
def test_forecasts_that_are_refused(records, changes, message):
    with pytest.raises(ValueError, match=message):
        list(NETWORK.forecast(records, **(KNOWN | changes)))


@pytest.mark.parametrize("request_", [None, {}])
def test_a_request_is_one(request_):
    with pytest.raises(ValueError, match="expected a TrajectoryRequest"):
        NETWORK.trajectories([prompt()], request_)
    with pytest.raises(ValueError, match="prompts got None"):
        NETWORK.trajectories(None, TrajectoryRequest(horizon_days=30.0))
