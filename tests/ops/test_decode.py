"""The normalising decoder against torch's own functions."""

import pytest
import torch
from torch import Tensor

from e2e_sae.ops.decode import decode, decode_plain

N, S, D = 6, 7, 4
ROW_NORMS = (1.0, 3.0, 0.2, 1e-13, 0.0, 1e-6, 50.0)
"""Two rows lie below the bound of 1e-12, one is 0."""


def tensors(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, N // 2, S, generator=generator, dtype=torch.float64).relu()
    W_dec = torch.randn(S, D, generator=generator, dtype=torch.float64)
    W_dec *= torch.tensor(ROW_NORMS)[:, None].double() / W_dec.norm(dim=1, keepdim=True)
    b_dec = torch.randn(D, generator=generator, dtype=torch.float64)
    return latents.to(dtype).requires_grad_(), W_dec.to(dtype).requires_grad_(), b_dec.to(dtype).requires_grad_()


def weighted(recon: Tensor) -> Tensor:
    """A loss whose gradient differs from entry to entry."""
    weights = torch.linspace(-1, 2, recon.numel(), dtype=recon.dtype, device=recon.device).view(recon.shape)
    return 2.5 * (weights * recon + recon.square()).sum()


def test_decode_by_hand():
    # ||(3, 4)|| = 5: the direction is (0.6, 0.8); 10 of it and the bias (1, -1) make (7, 7).
    recon = decode(torch.tensor([[10.0]]), torch.tensor([[3.0, 4.0]]), torch.tensor([1.0, -1.0]))
    torch.testing.assert_close(recon, torch.tensor([[7.0, 7.0]]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_value_and_gradients_equal_the_plain_twins(dtype: torch.dtype):
    ours, plain = tensors(dtype), tensors(dtype)
    recon, expected = decode(*ours), decode_plain(*plain)
    torch.testing.assert_close(recon, expected)
    gradients = torch.autograd.grad(weighted(recon), ours)
    for gradient, theirs in zip(gradients, torch.autograd.grad(weighted(expected), plain), strict=True):
        torch.testing.assert_close(gradient, theirs)


def test_gradients_equal_finite_differences():
    latents, W_dec, b_dec = tensors()
    ordinary = torch.tensor(ROW_NORMS) > 1e-3
    inputs = [t.detach().requires_grad_() for t in (latents[..., ordinary], W_dec[ordinary], b_dec)]
    assert torch.autograd.gradcheck(decode, inputs)


@pytest.mark.parametrize("wanted", range(3))
def test_a_tensor_without_gradient_changes_no_other_gradient(wanted: int):
    inputs = tensors()
    every = torch.autograd.grad(weighted(decode(*inputs)), inputs)
    one = [t if i == wanted else t.detach() for i, t in enumerate(inputs)]
    (alone,) = torch.autograd.grad(weighted(decode(*one)), one[wanted])
    assert torch.equal(alone, every[wanted])


def test_no_normalised_copy_waits_for_the_backward_pass():
    latents, W_dec, b_dec = tensors()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        decode(latents, W_dec, b_dec)
    assert [t.data_ptr() for t in kept if t.shape == W_dec.shape] == [W_dec.data_ptr()]


def test_under_autocast_products_are_bfloat16_and_gradients_float32():
    ours, exact = tensors(torch.float32), tensors()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        recon = decode(*ours)
    assert recon.dtype == torch.bfloat16
    expected = decode_plain(*exact)
    torch.testing.assert_close(recon.double(), expected, rtol=0.03, atol=0.1)
    gradients = torch.autograd.grad(recon.float().sum(), ours)
    assert [gradient.dtype for gradient in gradients] == [torch.float32] * 3
    # The row of norm 1e-13 has a gradient of 1e12, the zero row likewise.
    for gradient, theirs in zip(gradients, torch.autograd.grad(expected.sum(), exact), strict=True):
        torch.testing.assert_close(
            gradient.double(), theirs, rtol=0.03, atol=0.03 * theirs.median().abs().item() + 0.05
        )


def test_a_second_derivative_is_refused():
    latents, W_dec, b_dec = tensors()
    (gradient,) = torch.autograd.grad(weighted(decode(latents, W_dec, b_dec)), W_dec, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
