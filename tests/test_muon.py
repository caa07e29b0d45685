import pytest
import torch

from e2e_sae.muon import Muon, orthogonalize


@pytest.mark.parametrize("shape", [(2, 5, 5), (2, 4, 9), (2, 9, 4)])
def test_orthogonalizing_keeps_singular_vectors_and_brings_singular_values_near_one(shape: tuple[int, int, int]):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u, _, vh = torch.linalg.svd(matrices, full_matrices=False)
    in_their_basis = u.mT @ orthogonalize(matrices) @ vh.mT
    values = in_their_basis.diagonal(dim1=-2, dim2=-1)
    assert (in_their_basis - torch.diag_embed(values)).abs().max() < 1e-9
    # Jordan 2024: about 0.7 to 1.2; the least values of a random matrix may lag behind.
    assert values.min() > 0.3
    assert values.max() < 1.25


def test_the_update_has_the_root_mean_square_of_adam_and_decay_is_decoupled():
    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.ones(16, 64))
    weight.grad = torch.randn(16, 64, generator=generator) * 1e-6  # the gradient's scale does not matter
    Muon([weight], lr=0.5, weight_decay=0.1).step()
    update = weight.detach() - (1 - 0.5 * 0.1)
    assert update.pow(2).mean().sqrt().item() == pytest.approx(0.5 * 0.2, rel=0.2)


def test_equal_shapes_together_give_what_each_alone_gives():
    generator = torch.Generator().manual_seed(0)
    gradients = torch.randn(3, 4, 4, generator=generator)
    together = [torch.nn.Parameter(torch.zeros(4, 4)) for _ in gradients]
    for parameter, gradient in zip(together, gradients, strict=True):
        parameter.grad = gradient
    Muon(together, lr=0.1).step()
    for parameter, gradient in zip(together, gradients, strict=True):
        alone = torch.nn.Parameter(torch.zeros(4, 4))
        alone.grad = gradient
        Muon([alone], lr=0.1).step()
        torch.testing.assert_close(alone, parameter)


def test_a_parameter_without_gradient_stays():
    weight = torch.nn.Parameter(torch.ones(2, 2))
    Muon([weight], lr=0.1, weight_decay=0.5).step()
    assert torch.equal(weight, torch.ones(2, 2))


def test_vectors_are_refused():
    with pytest.raises(ValueError, match="matrices only"):
        Muon([torch.nn.Parameter(torch.ones(3))], lr=0.1)
