import pytest
import torch

from ehrseq.modeling.fast_dropout import FastDropout, dropout_mask


@pytest.mark.parametrize("p", [0.05, 0.2, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_drops_the_share_and_keeps_the_mean(p, dtype):
    mask = dropout_mask(torch.empty(1001, 999, dtype=dtype), p)
    assert mask.shape == (1001, 999)
    assert mask.dtype == dtype
    kept = mask > 0
    spread = (p * (1 - p) / mask.numel()) ** 0.5
    assert kept.float().mean().item() == pytest.approx(1 - p, abs=5 * spread)
    torch.testing.assert_close(mask[kept].float(), torch.full((int(kept.sum()),), 1 / (1 - p)), rtol=5e-3, atol=0)


def test_values_are_dropped_independently_of_their_neighbours():
    kept = (dropout_mask(torch.empty(4_000_000), 0.2) > 0).float().view(-1, 4)  # four values share one draw
    correlation = torch.corrcoef(kept.T) - torch.eye(4)
    assert correlation.abs().max().item() < 5e-3
    torch.testing.assert_close(kept.mean(0), torch.full((4,), 0.8), rtol=0, atol=3e-3)


def test_the_gradient_has_the_mask_of_the_forward_and_the_seed_repeats_it():
    layer, x = FastDropout(0.3), torch.randn(7, 5, 3, requires_grad=True)
    torch.manual_seed(3)
    out = layer(x)
    out.sum().backward()
    torch.testing.assert_close(out, x.detach() * x.grad)
    torch.manual_seed(3)
    assert torch.equal(layer(x), out)
    assert not torch.equal(layer(x), out)


def test_does_nothing_outside_of_training_or_without_a_probability():
    x = torch.randn(5)
    assert FastDropout(0.3).eval()(x) is x
    assert FastDropout(0.0)(x) is x
    assert not FastDropout(1.0)(x).any()


def test_double_precision_and_transforms_are_left_to_torch():
    x = torch.randn(100, dtype=torch.float64)
    torch.manual_seed(0)
    expected = torch.nn.functional.dropout(x, 0.3)
    torch.manual_seed(0)
    assert torch.equal(FastDropout(0.3)(x), expected)
    out = torch.func.vmap(FastDropout(0.5), randomness="different")(torch.ones(8, 64))
    assert 0.5 < out.mean().item() < 1.5


@pytest.mark.parametrize("size", [0, 1, 3, 4, 5])
def test_any_number_of_values_will_do(size):
    assert FastDropout(0.5)(torch.ones(size)).shape == (size,)
