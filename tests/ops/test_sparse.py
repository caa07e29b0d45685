"""Sparse products against dense ones."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from e2e_sae.ops.sparse import Entries, is_sparse_faster

R, C, D = 5, 8, 3


def matrix() -> Tensor:
    """Half zeros; the second row and the third column are empty."""
    dense = torch.randn(R, C, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    dense[dense.abs() < 0.6] = 0
    dense[1], dense[:, 2] = 0, 0
    return dense


def table(n: int) -> Tensor:
    return torch.randn(n, D, generator=torch.Generator().manual_seed(n), dtype=torch.float64)


@pytest.fixture
def nan_in_fresh_memory() -> Iterator[None]:
    """Memory that nothing was written to holds NaN, as it may after a broken batch."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("nan_in_fresh_memory")
@pytest.mark.parametrize("dense", [matrix(), torch.zeros(R, C, dtype=torch.float64)], ids=["some", "no entries"])
def test_products_over_entries_equal_dense_products(dense: Tensor):
    entries = Entries.of(dense)
    values = entries.values(dense)
    assert values.numel() == dense.count_nonzero()
    torch.testing.assert_close(entries.weighted_sums(values, table(C)), dense @ table(C))
    torch.testing.assert_close(entries.row_sums(values), dense.sum(1))
    torch.testing.assert_close(entries.dots(table(R), table(C)), (table(R) @ table(C).T)[dense != 0])


def test_transposed_entries_are_those_of_the_transposed_matrix():
    dense = matrix()
    entries = Entries.of(dense)
    by_column, order = entries.transposed(C)
    for ours, expected in zip(by_column, Entries.of(dense.T), strict=True):
        assert torch.equal(ours, expected)
    assert torch.equal(entries.values(dense)[order], by_column.values(dense.T))


def test_the_sparse_way_is_chosen_for_large_and_nearly_empty_float32_latents_only():
    latents = torch.zeros(512, 1024)
    latents[:, :20] = 1.0
    assert is_sparse_faster(latents, 128)
    assert not is_sparse_faster(latents, 16), "narrow products have little to skip"
    assert not is_sparse_faster(latents[:16], 128), "too few tokens for the fixed cost"
    assert not is_sparse_faster(latents.bfloat16(), 128)
    latents[:, :512] = 1.0
    assert not is_sparse_faster(latents, 768)
