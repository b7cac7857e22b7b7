"""The CPU operators as citizens of torch: opcheck, compile, export, autocast, checkpointing, inference mode."""

import pytest
import torch
from torch.export import Dim

from ehrseq.modeling.causal_conv import causal_conv1d
from ehrseq.modeling.selective_scan import selective_scan
from tests.kernels.inputs import SCAN_NAMES, conv_inputs, max_error, needs_cpu_library, scan_inputs

pytestmark = needs_cpu_library


def scan_arguments(**options):
    inputs = scan_inputs(length=37, dtype=torch.float32)
    inputs |= options
    order = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "delta_softplus", "initial_state")
    return [inputs.get(name) for name in order]


@pytest.mark.parametrize("left_out", [(), ("D", "z", "delta_bias", "initial_state")])
@pytest.mark.parametrize("with_resets", [False, True])
def test_opcheck_of_the_scan(left_out, with_resets):
    arguments = scan_arguments(**dict.fromkeys(left_out))
    leaves = [t.requires_grad_() if torch.is_tensor(t) else t for t in arguments]
    resets = torch.rand(2, 37) < 0.2 if with_resets else None
    torch.library.opcheck(torch.ops.ehrseq.selective_scan.default, (*leaves, resets, True))
    plain = [t.detach() if torch.is_tensor(t) else t for t in leaves]
    torch.library.opcheck(torch.ops.ehrseq.selective_scan.default, (*plain, resets, False))


@pytest.mark.parametrize("left_out", [(), ("bias", "initial_state")])
def test_opcheck_of_the_convolution(left_out):
    inputs = conv_inputs(dtype=torch.float32) | dict.fromkeys(left_out)
    leaves = [t.requires_grad_() if torch.is_tensor(t) else t for t in inputs.values()]
    resets = torch.rand(2, 13) < 0.2
    torch.library.opcheck(torch.ops.ehrseq.causal_conv1d.default, (*leaves, resets, True))


def mixer(u, delta, A, B, C, z, weight):
    """Both operators as a block uses them."""
    u = causal_conv1d(u, weight)
    return selective_scan(u, delta, A, B, C, z=z, delta_softplus=True)


def mixer_arguments(length=37):
    inputs = scan_inputs(length=length, dtype=torch.float32)
    return [inputs[name] for name in ("u", "delta", "A", "B", "C", "z")] + [torch.randn(inputs["u"].shape[-1], 4)]


def test_compiles_to_one_graph_with_gradients():
    leaves = [t.requires_grad_() for t in mixer_arguments()]
    compiled = torch.compile(mixer, fullgraph=True, backend="aot_eager")
    results = []
    for function in (mixer, compiled):
        y = function(*leaves)
        results.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    for got, want in zip(*results, strict=True):
        assert max_error(got, want) < 1e-6
    with torch.no_grad():
        assert max_error(compiled(*leaves), mixer(*leaves)) < 1e-6


@pytest.mark.slow
def test_compiles_with_inductor():
    leaves = [t.requires_grad_() for t in mixer_arguments()]
    y = torch.compile(mixer, fullgraph=True)(*leaves)
    assert max_error(y, mixer(*leaves)) < 1e-6


def test_exports_with_a_dynamic_length():
    class Mixer(torch.nn.Module):
        def forward(self, u, delta, A, B, C, z, weight):
            return mixer(u, delta, A, B, C, z, weight)

    length = Dim("length", min=2, max=4096)
    by_length = {1: length}
    shapes = (by_length, by_length, None, by_length, by_length, by_length, None)
    with torch.no_grad():
        program = torch.export.export(Mixer(), tuple(mixer_arguments()), dynamic_shapes=shapes)
        assert any("ehrseq.selective_scan" in str(node.target) for node in program.graph.nodes)
        for other in (5, 100):
            arguments = mixer_arguments(other)
            assert torch.equal(program.module()(*arguments), mixer(*arguments))


def test_autocast_leaves_the_operators_alone():
    arguments = mixer_arguments()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = mixer(*arguments)
    assert y.dtype == torch.float32
    assert torch.equal(y, mixer(*arguments))


def test_under_autocast_half_precision_meets_float32():
    """As in a block: projections come in bfloat16, A and the biases stay float32."""
    inputs = scan_inputs(dtype=torch.float32)
    half = {k: v.bfloat16() if k in ("u", "delta", "B", "C", "z") else v for k, v in inputs.items()}
    leaves = {k: v.requires_grad_() if torch.is_tensor(v) else v for k, v in half.items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = selective_scan(**leaves)
    grads = torch.autograd.grad(y.float().square().sum(), [leaves[name] for name in SCAN_NAMES])
    assert y.dtype == torch.bfloat16
    assert [g.dtype for g in grads] == [leaves[name].dtype for name in SCAN_NAMES]


def test_gradient_checkpointing_gives_the_same_gradients():
    leaves = [t.requires_grad_() for t in mixer_arguments()]
    plain = torch.autograd.grad(mixer(*leaves).square().sum(), leaves)
    y = torch.utils.checkpoint.checkpoint(mixer, *leaves, use_reentrant=False)
    for got, want in zip(torch.autograd.grad(y.square().sum(), leaves), plain, strict=True):
        assert torch.equal(got, want)


def test_inference_mode_and_no_grad_give_the_same():
    arguments = mixer_arguments()
    want = mixer(*[t.clone().requires_grad_() for t in arguments]).detach()
    with torch.inference_mode():
        assert torch.equal(mixer(*arguments), want)
    with torch.no_grad():
        assert torch.equal(mixer(*arguments), want)


def test_fake_tensors_get_shapes_without_a_call():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), torch.no_grad():
        u, z = torch.empty(2, 9, 6), torch.empty(2, 9, 6)
        A, B = torch.empty(6, 4), torch.empty(2, 9, 4)
        y, state = selective_scan(u, u, A, B, B, z=z, return_final_state=True)
    assert y.shape == (2, 9, 6)
    assert state.shape == (2, 6, 4)


def test_a_second_derivative_is_refused_clearly():
    inputs = conv_inputs()
    x = inputs["x"].requires_grad_()
    with pytest.raises(RuntimeError, match=r"no second derivative.*backend='naive'"):
        torch.autograd.grad(causal_conv1d(**inputs, backend="cpp").sum(), x, create_graph=True)
