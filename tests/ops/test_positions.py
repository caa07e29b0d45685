"""The drawn tokens: how many, of which, depending on what, and how evenly."""

from collections import Counter
from itertools import combinations

import pytest
import torch
from torch import Tensor

from e2e_sae.acts import TokenBatch
from e2e_sae.ops.positions import draw_positions


def batch_of(n_rows: int, n_pos: int, excluded: list[int] | None = None, start: int = 0) -> TokenBatch:
    """Tokens 0, 1, 2, ...: a token's id is its place."""
    return TokenBatch.of(torch.arange(n_rows * n_pos).view(n_rows, n_pos), excluded, start=start)


@pytest.mark.parametrize(
    ("n_counted", "fraction", "expected"), [(6, 0.5, 3), (6, 1e-9, 1), (6, 1.0, 6), (5, 0.7, 4), (0, 0.5, 0)]
)
def test_the_share_is_rounded_and_never_nothing(n_counted: int, fraction: float, expected: int):
    drawn = draw_positions(batch_of(2, 3, list(range(n_counted, 6))), fraction)
    assert len(drawn) == len(set(drawn.tolist())) == expected


def test_excluded_tokens_are_never_drawn():
    excluded = [0, 3, 4, 10]
    seen = [set(draw_positions(batch_of(3, 4, excluded, start), 0.5).tolist()) for start in range(200)]
    assert set[int]().union(*seen) == set(range(12)) - set(excluded)


@pytest.mark.parametrize("excluded", [None, [1]])
def test_every_set_of_tokens_is_as_likely_as_every_other(excluded: list[int] | None):
    n_starts, counted = 3_000, [i for i in range(5) if i not in (excluded or [])]
    counts = Counter(frozenset(draw_positions(batch_of(1, 5, excluded, i), 0.5).tolist()) for i in range(n_starts))
    sets = {frozenset(chosen) for chosen in combinations(counted, 2)}
    assert counts.keys() == sets
    expected = n_starts / len(sets)
    # Chi squared, whose mean is the number of degrees of freedom: 9 or 5. Above 28 once in a thousand draws.
    assert sum((n - expected) ** 2 / expected for n in counts.values()) < 28


def test_the_draw_depends_on_the_place_in_the_data_alone():
    def drawn(start: int, tokens: Tensor) -> list[int]:
        return draw_positions(TokenBatch.of(tokens, start=start), 0.25).tolist()

    zeros, ones = torch.zeros(4, 8, dtype=torch.long), torch.ones(4, 8, dtype=torch.long)
    state = torch.get_rng_state()
    first = drawn(24, zeros)
    torch.rand(3)
    assert drawn(24, ones) == first
    assert drawn(28, zeros) != first
    torch.set_rng_state(state)
    drawn(24, zeros)
    assert torch.get_rng_state().equal(state)


def test_a_mask_that_keeps_all_draws_as_no_mask_does():
    tokens = torch.zeros(4, 8, dtype=torch.long)
    masked = TokenBatch(tokens, torch.ones(4, 8, dtype=torch.bool), 32, 8)
    assert draw_positions(masked, 0.3).equal(draw_positions(TokenBatch.of(tokens, start=8), 0.3))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("excluded", [None, [1, 7]])
def test_a_gpu_draws_what_a_cpu_draws_without_being_waited_for(excluded: list[int] | None):
    tokens = torch.arange(32).view(4, 8)
    batch = TokenBatch.of(tokens, excluded, "cuda", 8)
    draw_positions(batch, 0.3)
    torch.cuda.set_sync_debug_mode("error")
    try:
        drawn = draw_positions(batch, 0.3)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert drawn.cpu().equal(draw_positions(TokenBatch.of(tokens, excluded, start=8), 0.3))
