"""Sums over counted tokens."""

import torch

from e2e_sae.ops.tokens import at_least_float32, counted_rows, counted_sum


def test_sum_counts_each_token_once_and_averages_heads():
    x = torch.tensor([[[1.0, 3.0], [10.0, 20.0]]])  # one row, two tokens, two heads
    assert counted_sum(x, None) == 2 + 15
    assert counted_sum(x, torch.tensor([[True, False]])) == 2


def test_an_uncounted_nan_does_not_reach_the_sum():
    x = torch.tensor([[1.0, float("nan")]])
    assert counted_sum(x, torch.tensor([[True, False]])) == 1


def test_rows_are_the_counted_vectors_in_order():
    x = torch.arange(12.0).reshape(1, 3, 2, 2)  # three tokens, two heads of width two
    counted = torch.tensor([[True, False, True]])
    assert counted_rows(x, counted).tolist() == [[0, 1], [2, 3], [8, 9], [10, 11]]
    assert counted_rows(x, None).shape == (6, 2)


def test_narrow_types_become_float32_and_float64_stays():
    assert at_least_float32(torch.zeros(1, dtype=torch.bfloat16)).dtype == torch.float32
    assert at_least_float32(torch.zeros(1, dtype=torch.float64)).dtype == torch.float64
