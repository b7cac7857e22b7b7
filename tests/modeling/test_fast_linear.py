"""The measured linear layer: the values of F.linear by whatever way, and exactly F.linear where nothing is faster."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ehrseq.modeling import fast_linear as module
from ehrseq.modeling.fast_linear import LinearChoice, ProductChoice, fast_linear, halves, linear, linear_choice

ONEDNN = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


@pytest.fixture
def choose(monkeypatch):
    """Start without a choice, under a value of EHRSEQ_LINEAR; or with a choice made by hand."""

    def start(mode="auto", way=None, dtype=torch.float32, min_rows=0):
        monkeypatch.setattr(module, "_choices", {})
        monkeypatch.setenv("EHRSEQ_LINEAR", mode)
        if way is not None:
            products = {operation: ProductChoice(way, min_rows) for operation in module.OPERATIONS}
            module._choices[dtype] = LinearChoice(dtype, mode, products)

    start()
    return start


def layer_inputs(shape, outputs, bias, dtype=torch.float32):
    x = torch.randn(*shape, dtype=dtype, requires_grad=True)
    weight = nn.Parameter(torch.randn(outputs, shape[-1], dtype=dtype))
    return x, weight, nn.Parameter(torch.randn(outputs, dtype=dtype)) if bias else None


def results(function, x, weight, bias, grad):
    """Output, and the gradients of everything."""
    leaves = [leaf for leaf in (x, weight, bias) if leaf is not None]
    out = function(x, weight, bias)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def assert_same_to(tolerance, actual, expected):
    for label, a, b in zip(("output", "grad x", "grad weight", "grad bias"), actual, expected, strict=False):
        assert a.shape == b.shape, label
        error = (a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30)
        assert error <= tolerance, f"{label}: relative error {error:.1e}"


SHAPES = [(300, 300), (1, 1, 512), (2, 37, 259), (5, 257), (0, 300), (3, 0, 300), (512,), (2, 3, 4, 301)]


@ONEDNN
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("way", ["onednn", "onednn_conv"])
@pytest.mark.parametrize("bias", [False, True])
def test_onednn_gives_the_values_and_gradients_of_f_linear(choose, shape, way, bias):
    choose(way=way)
    x, weight, bias = layer_inputs(shape, 263, bias)
    grad = torch.randn(*shape[:-1], 263)
    actual, expected = (results(function, x, weight, bias, grad) for function in (fast_linear, F.linear))
    assert_same_to(1e-6, actual, expected)
    with torch.no_grad():
        assert_same_to(1e-6, [fast_linear(x, weight, bias)], expected)


@ONEDNN
@pytest.mark.parametrize("way", ["onednn", "onednn_conv"])
def test_views_that_are_not_contiguous(choose, way):
    choose(way=way)
    wide = torch.randn(2, 40, 700)
    for x in (
        wide[..., 100:400],
        wide[:, ::3, 50:350],
        wide[..., :300].transpose(0, 1),
        wide[:1, :, :300].expand(3, -1, -1),
    ):
        leaf = x.detach().requires_grad_()
        weight = torch.randn(300, 260).t().requires_grad_()
        grad = torch.randn(260, *x.shape[:-1]).movedim(0, -1)
        results_of = [results(function, leaf, weight, None, grad) for function in (fast_linear, F.linear)]
        assert_same_to(1e-6, *results_of)


@ONEDNN
def test_any_number_of_threads_gives_the_same_values(choose):
    choose(way="onednn")
    x, weight, bias = layer_inputs((65, 300), 263, bias=True)
    grad, threads = torch.randn(65, 263), torch.get_num_threads()
    expected = results(F.linear, *(t.detach().double().requires_grad_() for t in (x, weight, bias)), grad.double())
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            assert_same_to(1e-6, results(fast_linear, x, weight, bias, grad), expected)
    finally:
        torch.set_num_threads(threads)


@ONEDNN
@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_frozen_parts_get_no_gradient(choose, frozen):
    choose(way="onednn")
    leaves = layer_inputs((9, 300), 263, bias=True)
    leaves[frozen].requires_grad_(False)
    fast_linear(*leaves).sum().backward()
    assert [leaf.grad is None for leaf in leaves] == [number == frozen for number in range(3)]


@ONEDNN
def test_second_derivatives(choose):
    choose(way="onednn")
    x, weight, _ = layer_inputs((4, 300), 263, bias=False)
    seconds = []
    for function in (fast_linear, F.linear):
        (first,) = torch.autograd.grad(function(x, weight).pow(3).sum(), x, create_graph=True)
        seconds.append(torch.autograd.grad(first.pow(2).sum(), weight))
    assert_same_to(1e-5, *seconds)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_by_way_of_float32_is_at_least_as_exact(choose, dtype):
    choose(way="float32", dtype=dtype)
    x, weight, bias = layer_inputs((2, 33, 300), 263, bias=True, dtype=dtype)
    grad = torch.randn(2, 33, 263, dtype=dtype)
    exact = results(F.linear, *(t.detach().double().requires_grad_() for t in (x, weight, bias)), grad.double())
    actual = results(fast_linear, x, weight, bias, grad)
    assert {tensor.dtype for tensor in actual} == {dtype}
    assert_same_to(2**-7 if dtype == torch.bfloat16 else 2**-10, actual, exact)


# -- exactly F.linear --------------------------------------------------------------------------------------------------


def assert_bitwise(function, *arguments):
    actual, expected = function(*arguments), F.linear(*arguments)
    assert torch.equal(actual, expected)
    assert actual.dtype == expected.dtype


def test_default_mode_is_f_linear_bit_for_bit(choose):
    choose("default")
    x, weight, bias = layer_inputs((2, 64, 300), 263, bias=True)
    grad = torch.randn(2, 64, 263)
    for actual, expected in zip(*(results(f, x, weight, bias, grad) for f in (fast_linear, F.linear)), strict=True):
        assert torch.equal(actual, expected)
    assert fast_linear(x, weight, bias).grad_fn.name() == F.linear(x, weight, bias).grad_fn.name()


@pytest.fixture
def broken(choose, monkeypatch):
    """A chosen way that may not be taken."""
    choose(way="broken")

    def refuse(a, b):
        raise AssertionError("the fast way was taken")

    monkeypatch.setitem(module.WAYS, "broken", module.Way(refuse, refuse, refuse))
    module._choices[torch.bfloat16] = module._choices[torch.float32]
    return choose


def test_the_fast_way_is_taken_for_plain_tensors(broken):
    with pytest.raises(AssertionError, match="the fast way was taken"):
        fast_linear(torch.randn(4, 300), torch.randn(263, 300))


def test_what_always_takes_f_linear(broken):
    x, weight, bias = (t.detach() for t in layer_inputs((2, 8, 300), 263, bias=True))
    assert_bitwise(fast_linear, x.double(), weight.double(), bias.double())
    assert_bitwise(fast_linear, x[..., :100], weight[:, :100], bias)  # a small weight
    assert fast_linear(x.to("meta"), weight.to("meta")).device.type == "meta"
    assert torch.equal(
        torch.func.vmap(fast_linear, (0, None))(x, weight), torch.func.vmap(F.linear, (0, None))(x, weight)
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_bitwise(fast_linear, x, weight, bias)
    torch.use_deterministic_algorithms(True)
    try:
        assert_bitwise(fast_linear, x, weight, bias)
    finally:
        torch.use_deterministic_algorithms(False)


def test_rows_below_the_measured_number_take_f_linear(broken):
    broken(way="broken", min_rows=9)
    weight = torch.randn(263, 300)
    assert_bitwise(fast_linear, torch.randn(2, 4, 300), weight)
    with pytest.raises(AssertionError, match="the fast way was taken"):
        fast_linear(torch.randn(3, 3, 300), weight)


def test_compiles_as_one_graph_and_exports_with_a_dynamic_length(broken):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(300, 263)

        def forward(self, x):
            return linear(self.layer, x)

    model = Model()
    layer = model.layer
    x = torch.randn(2, 8, 300)
    expected = F.linear(x, layer.weight, layer.bias)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), expected)
    length = torch.export.Dim("length", min=2, max=64)
    program = torch.export.export(model, (x,), dynamic_shapes=({1: length},))
    longer = torch.randn(2, 21, 300)
    torch.testing.assert_close(program.module()(longer), F.linear(longer, layer.weight, layer.bias))
    traced = torch.jit.trace(model, x, check_trace=False)
    torch.testing.assert_close(traced(longer), F.linear(longer, layer.weight, layer.bias))


@pytest.mark.parametrize(
    ("x", "weight", "bias"),
    [
        (torch.randn(4, 299), torch.randn(263, 300), None),
        (torch.randn(4, 300), torch.randn(263, 300), torch.randn(262)),
        (torch.randn(4, 300), torch.randn(263, 300, dtype=torch.float64), None),
    ],
)
def test_what_does_not_fit_is_said_by_torch(choose, x, weight, bias):
    choose(way="onednn")
    with pytest.raises(RuntimeError) as ours:
        fast_linear(x, weight, bias)
    with pytest.raises(RuntimeError) as theirs:
        F.linear(x, weight, bias)
    assert str(ours.value) == str(theirs.value)


def test_a_bare_layer_takes_the_fast_way_and_any_other_is_called(broken):
    broken(way="broken")
    layer, x = nn.Linear(300, 263), torch.randn(4, 300)
    with pytest.raises(AssertionError, match="the fast way was taken"):
        linear(layer, x)

    class Other(nn.Linear):
        def forward(self, input):
            return 2 * super().forward(input)

    other = Other(300, 263)
    other.load_state_dict(layer.state_dict())
    for around in (wrapped(layer), other, offloaded(copy.deepcopy(layer)), hooked(copy.deepcopy(layer))):
        torch.testing.assert_close(linear(around, x), 2 * layer(x))
    doubled = nn.modules.module.register_module_forward_hook(lambda module, inputs, output: 2 * output)
    try:
        torch.testing.assert_close(linear(layer, x), 2 * F.linear(x, layer.weight, layer.bias))
    finally:
        doubled.remove()


# -- two halves --------------------------------------------------------------------------------------------------------


def use_halves(layer, x, split):
    """A use of both halves: output and gradients of input, weight and bias."""
    first, second = split(layer, x)
    out = first.sigmoid() * second
    leaves = [x, layer.weight, *([] if layer.bias is None else [layer.bias])]
    return [out.detach(), *torch.autograd.grad(out.pow(2).sum(), leaves)]


def plain_halves(layer, x):
    return F.linear(x, layer.weight, layer.bias).chunk(2, dim=-1)


@pytest.mark.parametrize("way", ["default", pytest.param("onednn", marks=ONEDNN)])
@pytest.mark.parametrize("bias", [False, True])
def test_halves_equal_the_chunks_of_the_output(choose, way, bias):
    choose(way=way)
    layer, x = nn.Linear(300, 520, bias=bias), torch.randn(2, 33, 300, requires_grad=True)
    assert halves(layer, x)[0].grad_fn.name() == "_FastHalvesBackward"
    assert_same_to(1e-6, use_halves(layer, x, halves), use_halves(layer, x, plain_halves))
    with torch.no_grad():
        assert_same_to(1e-6, halves(layer, x), plain_halves(layer, x))


def test_one_half_alone_and_second_derivatives(choose):
    choose(way="default")
    layer, x = nn.Linear(300, 520), torch.randn(9, 300, requires_grad=True)
    for half in (0, 1):
        seconds = []
        for split in (halves, plain_halves):
            (first,) = torch.autograd.grad(split(layer, x)[half].pow(3).sum(), x, create_graph=True)
            seconds.append([first.detach(), *torch.autograd.grad(first.pow(2).sum(), layer.weight)])
        assert_same_to(1e-5, *seconds)


def wrapped(layer):
    class Adapter(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = layer

        def forward(self, x):
            return 2 * self.inner(x)

    return Adapter()


def offloaded(layer):
    plain = layer.forward
    layer.forward = lambda x: 2 * plain(x)  # as accelerate does
    return layer


def hooked(layer):
    layer.register_forward_hook(lambda module, inputs, output: 2 * output)
    return layer


@pytest.mark.parametrize("around", [wrapped, offloaded, hooked])
def test_what_is_put_around_the_layer_is_not_left_out(choose, around):
    layer, x = nn.Linear(300, 520), torch.randn(4, 300, requires_grad=True)
    expected = plain_halves(layer, x)
    for half, plain in zip(halves(around(layer), x), expected, strict=True):
        torch.testing.assert_close(half, 2 * plain)


def test_halves_under_autocast_compile_and_of_small_layers(choose):
    layer, x = nn.Linear(300, 520), torch.randn(4, 300)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert halves(layer, x)[0].dtype == torch.bfloat16
    compiled = torch.compile(lambda x: halves(layer, x), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x)[1], plain_halves(layer, x)[1])
    small = nn.Linear(30, 6)
    assert torch.equal(halves(small, x[:, :30])[0], small(x[:, :30])[:, :3])


# -- the choice --------------------------------------------------------------------------------------------------------


def timed(monkeypatch, speeds):
    """Let the measurement of (rows, way) be these seconds instead."""
    calls = []

    def seconds(operation, rows, names, dtype):
        calls.append((operation, rows))
        return {name: speeds(operation, rows, name) for name in names}

    monkeypatch.setattr(module, "_seconds", seconds)
    return calls


@ONEDNN
def test_a_clear_winner_is_taken_from_the_rows_on_where_it_wins(choose, monkeypatch):
    def speeds(operation, rows, name):
        if operation == "grad_weight" or rows < 64:
            return 1.0
        return {"default": 1.0, "onednn": 0.5, "onednn_conv": 0.6}[name]

    calls = timed(monkeypatch, speeds)
    products = linear_choice().products
    assert (products["forward"].way, products["forward"].min_rows) == ("onednn", 64)
    assert products["grad_weight"].way == "default"
    assert not linear_choice().is_default
    assert len(calls) == 7  # 3 and 3 sizes of the winners, 1 of the other; the second question measures nothing


def test_a_small_gain_stays_with_the_default(choose, monkeypatch):
    timed(monkeypatch, lambda operation, rows, name: 1.0 if name == "default" else 0.85)
    assert linear_choice().is_default
    assert linear_choice(torch.bfloat16).is_default


@pytest.mark.parametrize("fault", ["wrong", "raises", "nan"])
def test_a_way_that_is_wrong_or_fails_is_never_taken(choose, monkeypatch, fault):
    def product(a, b):
        if fault == "raises":
            raise RuntimeError("could not create a primitive")
        out = module.WAYS["default"].forward(a, b)
        return out * float("nan") if fault == "nan" else out + 0.1

    for name in ("onednn", "onednn_conv"):
        monkeypatch.setitem(module.WAYS, name, module._by_inner_product(product))
    choice = linear_choice()
    assert choice.is_default
    assert set(choice.unavailable) == {"onednn", "onednn_conv"}
    reason = {"wrong": "forward is wrong by", "raises": "could not create a primitive", "nan": "wrong by nan"}[fault]
    assert reason in str(choice)
    choose("onednn")
    with pytest.raises(ValueError, match="oneDNN cannot be used here"):
        linear_choice()


def test_an_unknown_mode_is_refused(choose):
    choose("mkl")
    with pytest.raises(ValueError, match=r"EHRSEQ_LINEAR is 'mkl', expected one of \['auto', 'default', 'onednn'\]"):
        linear_choice()


@ONEDNN
def test_forced_onednn_is_not_measured(choose, monkeypatch):
    choose("onednn")
    assert not timed(monkeypatch, lambda *_: 1.0)
    assert {product.way for product in linear_choice().products.values()} == {"onednn"}
    assert linear_choice(torch.bfloat16).is_default


def test_measuring_leaves_random_state_threads_and_settings_alone(choose):
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    with torch.inference_mode():
        choice = linear_choice()
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads
    assert linear_choice() is choice
    assert set(choice.products) == {"forward", "grad_input", "grad_weight"}
    for product in choice.products.values():
        assert all(speed > 0 for speed in product.gflops.values())
    assert "float32, EHRSEQ_LINEAR=auto: forward: " in str(choice)


def test_the_choice_is_logged_once(choose, monkeypatch):
    lines = []
    monkeypatch.setattr(module.logger, "info", lines.append)
    for _ in range(2):
        fast_linear(torch.randn(4, 300), torch.randn(263, 300))
    assert len(lines) == 1


def test_double_precision_has_no_choice(choose):
    assert linear_choice(torch.float64).is_default
