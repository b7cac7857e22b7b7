"""The RMS norm in few passes: the values, gradients and second derivatives of the formula."""

import pytest
import torch

from ehrseq.modeling.fast_norm import rms_norm


def formula(x, weight, eps):
    return weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps))


@pytest.mark.parametrize("shape", [(2, 7, 33), (1, 1, 1), (5, 64), (33,), (0, 4)], ids=str)
@pytest.mark.parametrize("eps", [1e-5, 0.3])
def test_equals_the_formula(shape, eps):
    x = torch.randn(shape, requires_grad=True)
    weight, grad = torch.randn(shape[-1], requires_grad=True), torch.randn(shape)
    expected_out = formula(x.double(), weight.double(), eps)
    expected = [expected_out, *torch.autograd.grad(expected_out, [x, weight], grad.double())]
    out = rms_norm(x, weight, eps)
    actual = [out, *torch.autograd.grad(out, [x, weight], grad)]
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-5, atol=2e-6)
    with torch.no_grad():
        assert torch.equal(rms_norm(x, weight, eps), out)


def test_gradients_and_second_derivatives():
    x, weight = torch.randn(3, 2, 5, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    arguments = (x.requires_grad_(), weight.requires_grad_())
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, 0.1), arguments)
    assert torch.autograd.gradgradcheck(lambda x, w: rms_norm(x, w, 0.1), arguments)
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x.transpose(0, 1), w, 0.1), arguments)


def test_a_row_of_zeros_has_finite_gradients():
    x = torch.zeros(2, 8, requires_grad=True)
    rms_norm(x, torch.ones(8), 1e-5).sum().backward()
    torch.testing.assert_close(x.grad, torch.full((2, 8), 1e-5**-0.5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_model_norms_its_float32_residual_stream(dtype):
    x, weight = torch.randn(3, 50, requires_grad=True), torch.randn(50, dtype=dtype).requires_grad_()
    grad = torch.randn(3, 50, dtype=dtype)
    results = []
    for norm, w in ((rms_norm, weight), (formula, weight.detach().float().requires_grad_())):
        out = norm(x, w, 1e-5)
        results.append([out, *torch.autograd.grad(out, [x, w], grad.to(out.dtype))])
    assert [t.dtype for t in results[0]] == [dtype, torch.float32, dtype]
    for actual, expected in zip(*results, strict=True):
        assert (actual.float() - expected).norm() <= 2 * torch.finfo(dtype).eps * expected.norm()
    half = rms_norm(x.to(dtype), weight, 1e-5)  # a stream of half precision is computed in float32 as well
    assert half.dtype == dtype
    torch.testing.assert_close(half, results[0][0], rtol=0.02, atol=0.02)


@pytest.mark.parametrize("kind", ["compiled", "vmapped", "meta"])
def test_elsewhere_it_is_the_formula(kind):
    x, weight = torch.randn(2, 3, 8), torch.randn(8)
    expected = formula(x, weight, 1e-5)
    if kind == "compiled":
        out = torch.compile(rms_norm, fullgraph=True, backend="aot_eager")(x.requires_grad_(), weight, 1e-5)
    elif kind == "vmapped":
        out = torch.func.vmap(rms_norm, (0, None, None))(x, weight, 1e-5)
    else:
        assert rms_norm(x.to("meta"), weight.to("meta"), 1e-5).shape == x.shape
        return
    torch.testing.assert_close(out, expected)
