"""The streaming step: equal to the ordinary step and the whole pass, never stale, only where nothing is in between."""

import copy

import pytest
import torch

from ehrseq.kernels import cpu_library, cpu_step
from ehrseq.modeling import fast_step
from ehrseq.modeling.configuration_ehrmamba import EhrMambaConfig
from ehrseq.modeling.ehrmamba_cache import EhrMambaCache
from ehrseq.modeling.modeling_ehrmamba import EhrMambaForCausalLM, EhrMambaModel
from tests.modeling.common import assert_close, collate

pytestmark = pytest.mark.skipif(cpu_library.library() is None, reason="no compiled kernels here")
TOLERANCE = 1e-5


def make_model(width=40, layers=3, kind=EhrMambaModel, **changes):
    torch.manual_seed(0)
    config = EhrMambaConfig(
        vocab_size=50,
        hidden_size=width,
        num_hidden_layers=layers,
        time_embeddings_size=8,
        max_num_visits=32,
        **changes,
    )
    model = kind(config).eval()
    with torch.no_grad():  # biases and norms off their symmetric start
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def make_patient(length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    times = torch.rand(length, generator=generator).cumsum(0) * 5
    return {
        "input_ids": torch.randint(1, 50, (length,), generator=generator),
        "token_type_ids": torch.randint(0, 13, (length,), generator=generator),
        "times": times,
        "ages": 40 + times / 52,
        "visit_orders": torch.arange(length) // 4,
        "visit_segments": 1 + torch.arange(length) // 4 % 2,
    }


def column(batch, t):
    return {name: values[:, t : t + 1] for name, values in batch.items()}


def prefill(model, batch, length):
    with torch.no_grad():
        return model(**{name: values[:, :length] for name, values in batch.items()}, use_cache=True).cache_params


def step(model, batch, t, cache):
    with torch.no_grad():
        return model(**column(batch, t), cache_params=cache, use_cache=True)[0]


@pytest.fixture
def taken(monkeypatch):
    """A list that grows by one with every step that the kernels took."""
    calls, run = [], fast_step.run_step
    monkeypatch.setattr(fast_step, "run_step", lambda *args: calls.append(1) or run(*args))
    return calls


def ordinary_step(model, batch, t, cache):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fast_step, "run_step", None)
        return step(model, batch, t, cache)


# -- exactness ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"width": 64, "state_size": 8, "conv_kernel": 2, "use_bias": True},
        {"width": 33, "state_size": 19, "conv_kernel": 4, "use_conv_bias": False, "time_step_rank": 5},
        {"width": 24, "state_size": 1, "conv_kernel": 1, "expand": 3},
    ],
    ids=["plain", "bias", "odd", "smallest"],
)
@pytest.mark.parametrize("rows", [1, 2, 7, 13])
def test_steps_equal_the_ordinary_ones_and_the_whole_pass(sizes, rows, taken):
    model, length, start = make_model(**sizes), 14, 6
    batch = collate([make_patient(length, seed) for seed in range(rows)])
    with torch.no_grad():
        whole = model(**batch)
    cache = prefill(model, batch, start)
    ordinary = cache.clone()
    for t in range(start, length):
        hidden, expected = step(model, batch, t, cache), ordinary_step(model, batch, t, ordinary)
        assert_close(hidden, expected, TOLERANCE, f"hidden state {t}")
        assert_close(hidden[:, 0], whole.last_hidden_state[:, t], TOLERANCE, f"whole pass {t}")
    assert len(taken) == length - start
    assert_close(cache.ssm_states, whole.cache_params.ssm_states, TOLERANCE, "scan state")
    if cache.conv_states.numel():
        assert_close(cache.conv_states, whole.cache_params.conv_states, TOLERANCE, "convolution state")
    assert torch.equal(cache.last_times, ordinary.last_times)
    assert cache.seen_tokens == ordinary.seen_tokens == length


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_state(side, taken):
    model = make_model()
    patients = [make_patient(length, seed) for seed, length in enumerate((9, 14, 11))]
    start = 2
    batch = collate(patients, side)
    cache = EhrMambaCache(model.config, len(patients))
    hidden = []
    for t in range(batch["input_ids"].shape[1]):
        if t == start:
            kept = cache.clone()
        hidden.append(step(model, batch, t, cache))
    assert len(taken) == len(hidden)
    together = torch.cat(hidden, 1)
    assert torch.isfinite(together).all()
    for row, patient in enumerate(patients):
        with torch.no_grad():
            alone = model(**collate([patient]))
        assert_close(together[row][batch["attention_mask"][row] == 1], alone.last_hidden_state[0], TOLERANCE, side)
        assert_close(cache.ssm_states[:, row], alone.cache_params.ssm_states[:, 0], TOLERANCE, "scan state")
        assert_close(cache.conv_states[:, row], alone.cache_params.conv_states[:, 0], TOLERANCE, "convolution state")
        assert torch.equal(cache.last_times[row], alone.cache_params.last_times[0])
    if side == "left":  # a row without a token yet has the state of none
        assert float(kept.ssm_states[:, 0].abs().max()) == 0.0


def test_thousands_of_steps_stay_exact(taken):
    model, length = make_model(layers=2, width=16), 1500
    batch = collate([make_patient(length)])
    batch["visit_orders"] = batch["visit_orders"].clamp(max=31)
    with torch.no_grad():
        whole = model(**batch)
    cache = prefill(model, batch, 1)
    for t in range(1, length):
        hidden = step(model, batch, t, cache)
    assert len(taken) == length - 1
    assert_close(hidden[:, 0], whole.last_hidden_state[:, -1], TOLERANCE, "hidden state")
    assert_close(cache.ssm_states, whole.cache_params.ssm_states, TOLERANCE, "scan state")


def test_threads_do_not_change_a_result(monkeypatch):
    monkeypatch.setattr(cpu_step, "MIN_WORK_OF_A_TEAM", 0)
    model, rows = make_model(), 20
    batch = collate([make_patient(5, seed) for seed in range(rows)])
    cache, before = prefill(model, batch, 4), torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(step(model, batch, 4, cache.clone()))
    finally:
        torch.set_num_threads(before)
    assert_close(results[1], results[0], 1e-6, "2 threads")
    assert_close(results[2], results[0], 1e-6, "3 threads")


def test_generate_takes_the_step_and_gives_the_same(taken, monkeypatch):
    model = make_model(kind=EhrMambaForCausalLM)
    prompt = collate([make_patient(6, seed) for seed in range(2)], "left")
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    found = [model.generate(**prompt, **options, num_beams=beams) for beams in (1, 3)]
    assert len(taken) == 14
    monkeypatch.setattr(fast_step, "run_step", None)
    for ids, beams in zip(found, (1, 3), strict=True):
        assert torch.equal(ids, model.generate(**prompt, **options, num_beams=beams))


# -- never stale -------------------------------------------------------------------------------------------------------
def change_in_place(model):
    with torch.no_grad():
        model.layers[1].mixer.in_proj.weight.mul_(1.5)


def change_behind_the_version_counter(model):
    model.layers[0].mixer.A_log.data.add_(0.3)


def load_another_state(model):
    model.load_state_dict({name: 0.9 * value for name, value in model.state_dict().items()})


def assign_another_state(model):
    model.load_state_dict({name: 0.9 * value for name, value in model.state_dict().items()}, assign=True)


def replace_a_weight(model):
    model.layers[2].mixer.out_proj.weight = torch.nn.Parameter(model.layers[2].mixer.out_proj.weight.detach() * 2)


def replace_the_data(model):
    model.layers[2].norm.weight.data = torch.rand(model.config.hidden_size)


def replace_a_block(model):
    model.layers[1] = copy.deepcopy(model.layers[0])


def change_epsilon(model):
    model.layers[0].norm.eps = 0.5


def there_and_back(model):
    model.to(torch.bfloat16).float()


@pytest.mark.parametrize(
    "change",
    [
        change_in_place,
        change_behind_the_version_counter,
        load_another_state,
        assign_another_state,
        replace_a_weight,
        replace_the_data,
        replace_a_block,
        change_epsilon,
        there_and_back,
    ],
    ids=lambda change: change.__name__,
)
def test_a_changed_model_is_never_stale(change, taken):
    model, batch = make_model(), collate([make_patient(8)])
    cache = prefill(model, batch, 6)
    before = step(model, batch, 6, cache)
    change(model)
    ordinary = cache.clone()
    assert_close(step(model, batch, 7, cache), ordinary_step(model, batch, 7, ordinary), TOLERANCE, change.__name__)
    assert len(taken) == 2
    assert not torch.equal(before, step(model, batch, 6, cache))


def test_a_copied_model_has_its_own_weights():
    model, batch = make_model(), collate([make_patient(8)])
    cache = prefill(model, batch, 6)
    step(model, batch, 6, cache)
    twin = copy.deepcopy(model)
    change_in_place(twin)
    expected = ordinary_step(twin, batch, 7, cache.clone())
    assert_close(step(twin, batch, 7, cache), expected, TOLERANCE, "the copy")


# -- where the blocks run themselves -----------------------------------------------------------------------------------
def add_hook(model):
    model.layers[1].mixer.x_proj.register_forward_hook(lambda module, args, out: out * 2)


def add_pre_hook(model):
    model.layers[0].register_forward_pre_hook(lambda module, args: (args[0] * 2, *args[1:]))


def wrap_forward(model):
    layer = model.layers[0].mixer.out_proj
    plain = layer.forward
    layer.forward = lambda x: plain(x) * 3


def swap_for_an_adapter(model):
    class Adapter(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    old = model.layers[2].mixer.out_proj
    model.layers[2].mixer.out_proj = new = Adapter(old.in_features, old.out_features, bias=False)
    new.weight = old.weight


def parametrize(model):
    torch.nn.utils.parametrizations.weight_norm(model.layers[0].mixer.in_proj)


@pytest.mark.parametrize(
    "change", [add_hook, add_pre_hook, wrap_forward, swap_for_an_adapter, parametrize], ids=lambda c: c.__name__
)
def test_what_stands_in_between_is_called(change, taken):
    model, batch = make_model(), collate([make_patient(8)])
    cache = prefill(model, batch, 6)
    step(model, batch, 6, cache)  # a plan exists already
    change(model)
    ordinary = cache.clone()
    assert torch.equal(step(model, batch, 7, cache), ordinary_step(model, batch, 7, ordinary))
    assert len(taken) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_other_dtypes_take_the_ordinary_step(dtype, taken):
    model, batch = make_model().to(dtype), collate([make_patient(8)])
    hidden = step(model, batch, 7, prefill(model, batch, 7))
    assert hidden.dtype == dtype
    assert not taken


def test_calls_that_need_more_take_the_ordinary_step(taken, monkeypatch):
    model, batch = make_model(), collate([make_patient(8)])
    cache = prefill(model, batch, 6)
    assert model(**column(batch, 6), cache_params=cache.clone(), use_cache=True)[0].requires_grad
    with torch.no_grad():
        model(**column(batch, 6), cache_params=cache, use_cache=True, output_hidden_states=True)
        model.train()(**column(batch, 7), cache_params=cache, use_cache=True)
        model.eval()
        held = cache.ssm_states.clone()
        model(**column(batch, 7), cache_params=cache, use_cache=False)
        assert torch.equal(cache.ssm_states, held)
        with torch.autocast("cpu", torch.bfloat16):
            model(**column(batch, 7), cache_params=cache, use_cache=True)
    for backend in ("torch", "naive"):
        monkeypatch.setenv("EHRSEQ_BACKEND", backend)
        step(model, batch, 7, cache)
    assert not taken
    monkeypatch.setenv("EHRSEQ_BACKEND", "cpp")
    step(model, batch, 7, cache)
    assert len(taken) == 1


# -- the cache in place ------------------------------------------------------------------------------------------------
def test_what_was_taken_from_a_cache_before_keeps_its_values(taken):
    model, batch = make_model(), collate([make_patient(9)])
    cache = prefill(model, batch, 6)
    held, values = cache.ssm_states, cache.ssm_states.clone()
    step(model, batch, 6, cache)
    assert torch.equal(held, values)
    others = [cache.clone(), copy.copy(cache), copy.deepcopy(cache), cache.to("cpu"), cache.select([0])]
    others.append(EhrMambaCache.batch([cache]))
    expected = [(c.conv_states.clone(), c.ssm_states.clone()) for c in others]
    first = step(model, batch, 7, cache)
    for other, (conv_states, ssm_states) in zip(others, expected, strict=True):
        assert torch.equal(other.conv_states, conv_states)
        assert torch.equal(other.ssm_states, ssm_states)
        assert torch.equal(step(model, batch, 7, other), first)
    states = cache.ssm_states.data_ptr()
    step(model, batch, 8, cache)
    assert cache.ssm_states.data_ptr() == states, "the state is changed in place from the second step on"
    assert len(taken) == 3 + len(others)


def test_autograd_notices_a_state_that_was_changed_in_place():
    model, batch = make_model(), collate([make_patient(9)])
    cache = prefill(model, batch, 6)
    step(model, batch, 6, cache)
    loss = model(**column(batch, 7), cache_params=cache, use_cache=False)[0].sum()
    step(model, batch, 7, cache)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_inference_mode_steps_too(taken):
    model, batch = make_model(), collate([make_patient(9)])
    with torch.inference_mode():
        cache = prefill(model, batch, 6)
        inside = step(model, batch, 6, cache)
    ordinary = prefill(model, batch, 6)
    assert_close(inside, ordinary_step(model, batch, 6, ordinary), TOLERANCE, "inference mode")
    assert_close(step(model, batch, 7, cache), ordinary_step(model, batch, 7, ordinary), TOLERANCE, "after it")
    assert len(taken) == 2
