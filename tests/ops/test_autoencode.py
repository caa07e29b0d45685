"""An SAE's forward pass as one function against torch's graph of the same, over active latents and whole."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from e2e_sae.ops import autoencode as module
from e2e_sae.ops.autoencode import autoencode, autoencode_plain

S, D = 9, 4


def top_2(pre_acts: Tensor) -> Tensor:
    """Keeps the two largest positive pre-activations of each token."""
    top = pre_acts.relu().topk(2, dim=-1)
    return torch.zeros_like(pre_acts).scatter(-1, top.indices, top.values)


@pytest.fixture(params=[False, True], ids=["whole", "active only"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Makes every product take one way."""
    monkeypatch.setattr(module, "is_sparse_faster", lambda *_: request.param)
    return request.param


def tensors(dtype: torch.dtype = torch.float64, bias: float = 0.0) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x, W_enc, b_enc, W_dec, b_dec; two decoder rows lie below the bound of the norm."""
    generator = torch.Generator().manual_seed(1)
    made = [torch.randn(*shape, generator=generator) for shape in ((2, 3, D), (D, S), (S,), (S, D), (D,))]
    made[2] += bias
    made[3][2], made[3][5] = 0.0, 1e-14
    x, W_enc, b_enc, W_dec, b_dec = (t.to(dtype).requires_grad_() for t in made)
    return x, W_enc, b_enc, W_dec, b_dec


def loss(outputs: tuple[Tensor, Tensor]) -> Tensor:
    """Differs from entry to entry in both outputs."""
    recon, latents = outputs
    weights = torch.linspace(-1, 2, recon.numel(), dtype=recon.dtype, device=recon.device).view(recon.shape)
    return 2.5 * (weights * recon).sum() + 0.7 * latents.square().sum() + 0.3 * latents.abs().sum()


@pytest.mark.parametrize("activate", [torch.relu, top_2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_values_and_gradients_equal_the_plain_twins(way: bool, activate: Callable[..., Tensor], dtype: torch.dtype):
    ours, plain = tensors(dtype), tensors(dtype)
    outputs, expected = autoencode(*ours, activate), autoencode_plain(*plain, activate)
    grad_fn: Any = outputs[0].grad_fn
    assert (grad_fn.entries is not None) == way
    assert 0 < expected[1].count_nonzero() < expected[1].numel()
    torch.testing.assert_close(outputs, expected)
    gradients = torch.autograd.grad(loss(outputs), ours)
    for gradient, theirs in zip(gradients, torch.autograd.grad(loss(expected), plain), strict=True):
        torch.testing.assert_close(gradient, theirs)


@pytest.mark.parametrize("wanted", range(5))
def test_a_tensor_without_gradient_changes_no_other_gradient(way: bool, wanted: int):
    inputs = tensors()
    every = torch.autograd.grad(loss(autoencode(*inputs, torch.relu)), inputs)
    for i, tensor in enumerate(inputs):
        tensor.requires_grad_(i == wanted)
    (alone,) = torch.autograd.grad(loss(autoencode(*inputs, torch.relu)), inputs[wanted])
    assert torch.equal(alone, every[wanted])


def test_either_output_alone_has_its_gradient(way: bool):
    for pick in (0, 1):
        ours, plain = tensors(), tensors()
        autoencode(*ours, torch.relu)[pick].square().sum().backward()
        autoencode_plain(*plain, torch.relu)[pick].square().sum().backward()
        for i, (t, theirs) in enumerate(zip(ours, plain, strict=True)):
            expected = torch.zeros_like(t) if theirs.grad is None else theirs.grad
            torch.testing.assert_close(t.grad, expected, msg=f"output {pick}, input {i}")


def test_without_an_active_latent_the_bias_remains(way: bool):
    inputs = tensors(bias=-1000.0)
    recon, latents = autoencode(*inputs, torch.relu)
    assert not latents.any()
    torch.testing.assert_close(recon, inputs[4].expand_as(recon))
    gradients = torch.autograd.grad(loss((recon, latents)), inputs)
    assert not any(gradient.any() for gradient in gradients[:4])
    assert gradients[4].any()


def test_latents_that_are_mostly_0_take_the_short_way_by_themselves():
    generator = torch.Generator().manual_seed(0)
    x, W_enc, W_dec = (torch.randn(n, m, generator=generator) for n, m in ((256, 64), (64, 2048), (2048, 64)))
    for bias, is_sparse in ((-20.0, True), (0.0, False)):
        b_enc = torch.full((2048,), bias, requires_grad=True)
        outputs = autoencode(x, W_enc, b_enc, W_dec, torch.zeros(64), torch.relu)
        grad_fn: Any = outputs[0].grad_fn
        assert (grad_fn.entries is not None) == is_sparse
        plain = autoencode_plain(x, W_enc, b_enc, W_dec, torch.zeros(64), torch.relu)
        torch.testing.assert_close(outputs, plain, rtol=1e-4, atol=1e-3)


def test_under_autocast_products_are_bfloat16_and_gradients_float32():
    ours, plain = tensors(torch.float32), tensors(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs, expected = autoencode(*ours, torch.relu), autoencode_plain(*plain, torch.relu)
    assert [t.dtype for t in outputs] == [torch.bfloat16] * 2 == [t.dtype for t in expected]
    torch.testing.assert_close(outputs, expected, rtol=0.02, atol=0.02)
    gradients = torch.autograd.grad(loss((outputs[0].float(), outputs[1].float())), ours)
    assert [gradient.dtype for gradient in gradients] == [torch.float32] * 5
    theirs = torch.autograd.grad(loss((expected[0].float(), expected[1].float())), plain)
    for gradient, other in zip(gradients, theirs, strict=True):
        torch.testing.assert_close(gradient, other, rtol=0.05, atol=0.2)


def test_a_second_derivative_is_refused(way: bool):
    inputs = tensors()
    (gradient,) = torch.autograd.grad(loss(autoencode(*inputs, torch.relu)), inputs[1], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.gpu
def test_a_gpu_gives_what_a_cpu_gives():
    on_cpu = tensors()
    x, W_enc, b_enc, W_dec, b_dec = (t.detach().cuda().requires_grad_() for t in on_cpu)
    on_gpu = x, W_enc, b_enc, W_dec, b_dec
    outputs, expected = autoencode(*on_gpu, torch.relu), autoencode(*on_cpu, torch.relu)
    torch.testing.assert_close(tuple(t.cpu() for t in outputs), expected)
    gradients = torch.autograd.grad(loss(outputs), on_gpu)
    for gradient, theirs in zip(gradients, torch.autograd.grad(loss(expected), on_cpu), strict=True):
        torch.testing.assert_close(gradient.cpu(), theirs)
