"""Principal directions from running sums: numpy's, on all activations at once."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from e2e_sae.acts import TokenBatch
from e2e_sae.analysis.clean_directions import Moments, directions_at
from e2e_sae.models.runner import run_clean
from tests.tiny_models import D_MODEL, random_tokens

PRE, HEADS = "blocks.1.hook_resid_pre", "blocks.1.attn.hook_z"
EXCLUDED = [3, 4, 5]


def batches(n: int = 3, exclude: list[int] | None = None) -> list[TokenBatch]:
    return [TokenBatch.of(random_tokens(4, 8, seed), exclude) for seed in range(n)]


def all_vectors(model: Any, rows: list[TokenBatch], point: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns the activations of all counted tokens, and their positions; heads one after the other."""
    vectors: list[Tensor] = []
    positions: list[Tensor] = []
    for batch in rows:
        x = run_clean(model, batch, [point]).acts[point]
        kept = torch.ones_like(batch.tokens, dtype=torch.bool) if batch.counted is None else batch.counted
        vectors.append(x[kept].reshape(-1, x.shape[-1]))
        position = torch.arange(x.shape[1]).expand(batch.tokens.shape)[kept]
        positions.append(position.repeat_interleave(x[0, 0].numel() // x.shape[-1]))
    return torch.cat(vectors).numpy(), torch.cat(positions).numpy()


@pytest.mark.parametrize("exclude", [None, EXCLUDED], ids=["all tokens", "some excluded"])
@pytest.mark.parametrize("point", [PRE, HEADS])
def test_directions_are_numpys_on_all_activations_at_once(
    point: str, exclude: list[int] | None, lm_of: Callable[..., Any]
) -> None:
    model, rows = lm_of("gpt2", "float64"), batches(exclude=exclude)
    found = directions_at(model, rows, [point])[point]
    x, positions = all_vectors(model, rows, point)
    values, vectors = np.linalg.eigh(np.cov(x.T, bias=True))
    n = len(found.axes)
    assert n == x.shape[1] <= D_MODEL, "as many as the activation is wide, where that is fewer than 25"
    np.testing.assert_allclose(found.mean, x.mean(0), atol=1e-12)
    np.testing.assert_allclose(found.shares, values[::-1] / values.sum(), atol=1e-12)
    np.testing.assert_allclose(np.abs(np.sum(found.axes.numpy() * vectors.T[::-1], axis=1)), 1.0, atol=1e-9)
    for position in range(8):
        here = x[positions == position]
        assert found.counts[position] == len(here)
        np.testing.assert_allclose(found.by_position[position], here.mean(0), atol=1e-12)
    expected = (x - x.mean(0)) @ found.axes.numpy().T
    np.testing.assert_allclose(found.components(torch.tensor(x)), expected, atol=1e-12)


def test_the_first_position_is_on_the_positive_side_of_every_direction(lm_of: Callable[..., Any]) -> None:
    rows = batches()
    found = directions_at(lm_of("gpt2", "float64"), rows, [PRE])[PRE]
    assert ((found.axes @ found.by_position[0]) >= 0).all()


def test_several_points_come_from_one_pass(lm_of: Callable[..., Any]) -> None:
    model, rows = lm_of("gpt2", "float64"), batches()
    both = directions_at(model, rows, [PRE, HEADS])
    for point in (PRE, HEADS):
        assert torch.equal(both[point].axes, directions_at(model, rows, [point])[point].axes)


def test_an_outlier_at_the_first_position_is_direction_0() -> None:
    """As in GPT-2: norm 3,000 at position 0, unit variance elsewhere."""
    x = torch.randn(20, 8, 1, 5, generator=torch.Generator().manual_seed(0))
    x[:, 0, 0, 2] += 3000
    moments = Moments()
    moments.update(x, torch.ones(20, 8, dtype=torch.bool))
    found = moments.directions(2)
    assert found.axes.shape == (2, 5)
    assert found.axes[0, 2] > 0.9999, "and it points to the first position"
    assert found.shares[0] > 0.999


def test_directions_of_one_token_are_refused() -> None:
    moments = Moments()
    moments.update(torch.ones(1, 1, 1, 3), torch.ones(1, 1, dtype=torch.bool))
    with pytest.raises(ValueError, match="want two counted tokens or more, got 1"):
        moments.directions()
