"""The step of a forecast in the kernels: what the model's own forward gives, and the same bits in any company."""

import numpy as np
import pytest
import torch

from ehrseq.kernels import cpu_library
from ehrseq.modeling.configuration_ehrmamba import EhrMambaConfig
from ehrseq.modeling.fast_forecast import FastSlots, why_not_fast
from ehrseq.modeling.modeling_ehrmamba import EhrMambaForCausalLM
from ehrseq.modeling.trajectory_slots import NewTokens, Sampling, TorchSlots
from ehrseq.modeling.trajectory_tokens import TokenSets, inverse_cdf
from tests.modeling.common import assert_close

pytestmark = pytest.mark.skipif(cpu_library.library() is None, reason="no compiled kernels here")

ROWS = 64
FIELDS = ("ids", "types", "times", "ages", "orders", "segments", "before")


def make_model(width, layers, vocabulary, state=8):
    torch.manual_seed(0)
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "vocab_size": vocabulary, "state_size": state}
    model = EhrMambaForCausalLM(EhrMambaConfig(**sizes, time_embeddings_size=5, max_num_visits=9)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def make_tokens(model, rows):
    draw = np.random.default_rng(0)
    sizes = (model.config.vocab_size, 13, 9, 3)
    ids, types, orders, segments = (draw.integers(0, size, ROWS)[rows] for size in sizes)
    times, before, ages = (draw.random(ROWS).astype(np.float32)[rows] * 90 for _ in range(3))
    return NewTokens(ids, types, times, ages, orders, segments, before)


class State:
    """A state of 64 rows, of which some are put into slots."""

    def __init__(self, model, rows):
        config, draw = model.config, torch.Generator().manual_seed(1)
        sizes = (config.num_hidden_layers, ROWS, config.intermediate_size)
        self.conv_states = torch.randn(*sizes, config.conv_kernel - 1, generator=draw)[:, rows]
        self.ssm_states = torch.randn(*sizes, config.state_size, generator=draw)[:, rows]


@torch.no_grad()
def read(slots, model, rows, places):
    slots.put(places, State(model, rows))
    following = slots.step(places, make_tokens(model, rows))
    return following.hidden.numpy().copy(), following.probabilities.copy()


def fast(model, rows, places=None, *, size=128, threads=1):
    sets = TokenSets.of([np.arange(model.config.vocab_size)])
    slots = FastSlots(model, size, sets, threads)
    places = np.arange(len(rows)) if places is None else places
    outputs = read(slots, model, rows, places)
    states = (slots._kernel.conv_states[:, places], slots._kernel.ssm_states[:, places])
    return (*outputs, *(state.numpy().copy() for state in states))


SIZES = [(24, 2, 24), (40, 3, 50), (64, 1, 1652), (768, 1, 301)]


@pytest.mark.parametrize(("width", "layers", "vocabulary"), SIZES)
def test_a_row_has_the_same_bits_in_any_company(width, layers, vocabulary):
    model = make_model(width, layers, vocabulary)
    whole = fast(model, np.arange(ROWS))
    shuffled = np.random.default_rng(2).permutation(ROWS)
    cases = [([5], 1), ([5, 9], 1), ([5, 9, 60], 1), (np.arange(17), 1), (np.arange(17), 2), (shuffled, 2)]
    for rows, threads in cases:
        rows = np.array(rows)
        places = np.sort(np.random.default_rng(3).permutation(128)[: len(rows)])
        hidden, probabilities, conv_states, ssm_states = fast(model, rows, places, threads=threads)
        assert hidden.tobytes() == whole[0][rows].tobytes(), (len(rows), threads)
        assert probabilities.tobytes() == whole[1][rows].tobytes(), (len(rows), threads)
        assert conv_states.tobytes() == whole[2][:, rows].tobytes()
        assert ssm_states.tobytes() == whole[3][:, rows].tobytes()


def test_many_threads_are_really_taken(monkeypatch):
    """Where the work is worth a team: the same bits still."""
    model = make_model(64, 2, 301)
    alone = fast(model, np.arange(ROWS))
    monkeypatch.setattr("ehrseq.kernels.cpu_forecast.MIN_WORK_OF_A_TEAM", 0)
    for threads in (2, 3):
        together = fast(model, np.arange(ROWS), threads=threads)
        assert all(a.tobytes() == b.tobytes() for a, b in zip(alone, together, strict=True))


@pytest.mark.parametrize(("width", "layers", "vocabulary"), SIZES)
def test_it_is_the_models_own_forward(width, layers, vocabulary):
    model = make_model(width, layers, vocabulary)
    rows = np.arange(37)
    hidden, probabilities, *_ = fast(model, rows)
    sets = TokenSets.of([np.arange(vocabulary)])
    expected = read(TorchSlots(model, 64, sets, Sampling()), model, rows, rows)
    assert_close(torch.from_numpy(hidden), torch.from_numpy(expected[0]), 2e-5, "hidden")
    assert_close(torch.from_numpy(probabilities), torch.from_numpy(expected[1]), 2e-5, "probabilities")
    np.testing.assert_allclose(probabilities.sum(1), 1.0, rtol=1e-6)


@pytest.mark.parametrize("vocabulary", [50, 301])
def test_draws_are_those_of_the_naive_inverse(vocabulary):
    model = make_model(24, 1, vocabulary)
    sets = TokenSets.of([np.array([3, 7, 8]), np.array([40])])
    slots = FastSlots(model, ROWS, sets, 1)
    rows, uniforms = np.arange(ROWS), np.random.default_rng(5).random(ROWS)
    uniforms[:2] = 0.0, 1.0 - 2.0**-53
    read(slots, model, rows, rows)
    weights = slots._kernel.weights.astype(np.float64)
    following = slots.step(rows, make_tokens(model, rows))
    weights = slots._kernel.weights.astype(np.float64)
    np.testing.assert_array_equal(following.draw(uniforms, None, None), inverse_cdf(weights, uniforms))
    # tokens of a set are less likely, or cannot come at all
    avoided, kept = np.arange(ROWS) % 2, np.random.default_rng(6).random((ROWS, 3))
    kept[::4] = 0.0
    for row in range(ROWS):
        part = sets.part(avoided[row])
        weights[row, sets.ids[part]] *= kept[row, : part.stop - part.start]
    drawn = following.draw(uniforms, avoided, kept)
    np.testing.assert_array_equal(drawn, inverse_cdf(weights, uniforms))
    assert not np.isin(drawn[::4], [3, 7, 8]).any()


def test_nothing_is_drawn_where_nothing_is_left():
    assert inverse_cdf(np.zeros((2, 5)), np.array([0.0, 0.5])).tolist() == [-1, -1]
    model = make_model(24, 1, 5)
    sets = TokenSets.of([np.arange(5)])
    slots = FastSlots(model, 2, sets, 1)
    rows = np.arange(2)
    slots.put(rows, State(model, rows))
    following = slots.step(rows, make_tokens(model, rows))
    assert following.draw(np.array([0.0, 0.9]), np.zeros(2, dtype=np.int64), np.zeros((2, 5))).tolist() == [-1, -1]


def test_logits_that_are_not_finite_are_told():
    model = make_model(24, 1, 50)
    with torch.no_grad():
        model.lm_head.weight[7] = float("nan")
    with pytest.raises(ValueError, match="logits are not finite"):
        fast(model, np.arange(3))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda model, patch: model.double(), "float32"),
        (lambda model, patch: model.train(), "training mode"),
        (lambda model, patch: patch.setenv("EHRSEQ_BACKEND", "torch"), "EHRSEQ_BACKEND"),
        (lambda model, patch: model.lm_head.register_forward_hook(lambda *_: None), "lm_head has hooks"),
        (lambda model, patch: setattr(model, "lm_head", torch.nn.Identity()), "lm_head is a Identity"),
        (lambda model, patch: setattr(model.model.layers[0].mixer, "in_proj", torch.nn.Identity()), "a block"),
        (lambda model, patch: patch.setattr(cpu_library, "_loaded", (None, "no compiler")), "no compiler"),
    ],
)
def test_it_says_why_it_cannot_serve(monkeypatch, change, reason):
    model = make_model(24, 1, 50)
    assert why_not_fast(model) is None
    change(model, monkeypatch)
    assert reason in why_not_fast(model)
