"""The codebook against a plain loop over images and codes."""

import pytest
import torch

from e2e_sae.errors import UserError
from e2e_sae.saes import ARCHITECTURES
from e2e_sae.saes.codebook import Codebook


def random_codebook(k: int) -> tuple[Codebook, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    codebook = Codebook(5, 9, k, generator=generator).double()
    return codebook, torch.randn(7, 5, dtype=torch.float64, generator=generator)


def plain_choice(codes: torch.Tensor, x: torch.Tensor, k: int) -> list[int]:
    cosines = [float(x @ code / (x.norm() * code.norm())) for code in codes]
    return sorted(range(len(codes)), key=lambda j: -cosines[j])[:k]


@pytest.mark.parametrize("k", [1, 3, 9])
def test_the_output_is_the_sum_of_the_most_similar_raw_codes(k: int):
    codebook, x = random_codebook(k)
    recon, latents = codebook(x)
    codes = codebook.codebook.detach()
    expected = torch.stack([sum((codes[j] for j in plain_choice(codes, row, k)), torch.zeros(5)) for row in x])
    torch.testing.assert_close(recon, expected)
    assert latents is None


def test_gradients_go_to_the_chosen_codes_and_not_to_the_input():
    codebook, x = random_codebook(2)
    x.requires_grad_()
    recon, _ = codebook(x)
    weights = torch.randn(7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (recon * weights).sum().backward()
    # d/dC_j of sum_b w_b . sum_{j chosen by b} C_j is the sum of w_b over the images that chose j.
    expected = torch.zeros(9, 5, dtype=torch.float64)
    for row, weight in zip(x.detach(), weights, strict=True):
        for j in plain_choice(codebook.codebook.detach(), row, 2):
            expected[j] += weight
    torch.testing.assert_close(codebook.codebook.grad, expected)
    assert x.grad is None


def test_the_scale_of_an_activation_changes_nothing():
    codebook, x = random_codebook(3)
    torch.testing.assert_close(codebook(7 * x)[0], codebook(x)[0])


def test_it_has_the_paper_librarys_parameter_and_is_no_architecture_of_saes():
    codebook = Codebook(4, 6, 2)
    assert {name: tuple(t.shape) for name, t in codebook.state_dict().items()} == {"codebook": (6, 4)}
    assert codebook.device == torch.device("cpu")
    assert "codebook" not in ARCHITECTURES


@pytest.mark.parametrize("k", [0, 7])
def test_a_k_that_does_not_fit_is_an_error(k: int):
    with pytest.raises(UserError, match=rf"1 <= k <= number of codes: got k={k} of 6 codes"):
        Codebook(4, 6, k)
