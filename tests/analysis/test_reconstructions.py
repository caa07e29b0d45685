"""What SAEs make of clean activations, from running sums: a plain twin with all activations at once."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from e2e_sae.acts import TokenBatch
from e2e_sae.analysis.clean_directions import Directions, directions_at
from e2e_sae.analysis.reconstructions import (
    N_DECODER_BINS,
    N_SAMPLED,
    Pairs,
    Reconstruction,
    Sample,
    bins_of,
    look_at,
)
from e2e_sae.models.runner import run_clean
from e2e_sae.saes import SAE, ReluSAE
from tests.analysis.test_clean_directions import EXCLUDED, HEADS, PRE, batches

END = 13


def sae_of(d_in: int, seed: int = 0) -> ReluSAE:
    return ReluSAE(d_in, 2 * d_in, generator=torch.Generator().manual_seed(seed)).double()


def gathered(model: Any, rows: list[TokenBatch], point: str, sae: SAE) -> dict[str, np.ndarray]:
    """Returns a, a_hat, position and token id of every counted vector, and which latents were active."""
    parts: dict[str, list[Tensor]] = {"a": [], "a_hat": [], "position": [], "token": [], "latents": []}
    for batch in rows:
        a = run_clean(model, batch, [point]).acts[point]
        a_hat, latents = sae(a)
        kept = torch.ones_like(batch.tokens, dtype=torch.bool) if batch.counted is None else batch.counted
        n_heads = a[0, 0].numel() // a.shape[-1]
        for name, x in (("a", a), ("a_hat", a_hat), ("latents", latents)):
            parts[name].append(x[kept].reshape(-1, x.shape[-1]).detach())
        position = torch.arange(a.shape[1]).expand(batch.tokens.shape)
        for name, ids in (("position", position), ("token", batch.tokens)):
            parts[name].append(ids[kept].repeat_interleave(n_heads))
    return {name: torch.cat(values).numpy() for name, values in parts.items()}


def looked_at(model: Any, rows: list[TokenBatch], point: str, sae: SAE) -> tuple[Reconstruction, Directions]:
    directions = directions_at(model, rows, [point])
    (found,) = look_at(model, rows, [(point, sae)], directions, end_of_text=END)
    return found, directions[point]


@pytest.mark.parametrize("exclude", [None, EXCLUDED], ids=["all tokens", "some excluded"])
@pytest.mark.parametrize("point", [PRE, HEADS])
def test_every_measure_is_that_of_a_plain_twin(
    point: str, exclude: list[int] | None, lm_of: Callable[..., Any]
) -> None:
    model, rows = lm_of("gpt2", "float64"), batches(exclude=exclude)
    sae = sae_of(16 if point == PRE else 8)
    found, directions = looked_at(model, rows, point, sae)
    twin = gathered(model, rows, point, sae)
    a, a_hat, position = twin["a"], twin["a_hat"], twin["position"]
    norm_in, norm_out = np.linalg.norm(a, axis=1), np.linalg.norm(a_hat, axis=1)
    cos = (a * a_hat).sum(1) / (norm_in * norm_out)
    x, y = ((z - a.mean(0)) @ directions.axes.numpy().T for z in (a, a_hat))

    for name, values in (("norm_in", norm_in), ("norm_out", norm_out), ("ratio", norm_out / norm_in), ("cos", cos)):
        expected = [values[position == p].mean() for p in range(8)]
        np.testing.assert_allclose(getattr(found, name), expected, atol=1e-12)
    np.testing.assert_array_equal(found.counts, [(position == p).sum() for p in range(8)])
    np.testing.assert_array_equal(found.cos_bins, np.histogram(cos, bins=len(found.cos_bins), range=(-1, 1))[0])
    expected = [y[position == p, :3].mean(0) for p in range(8)]
    np.testing.assert_allclose(found.component, expected, atol=1e-12)
    for r, chosen in ((found.r_first, position == 0), (found.r_later, position > 0)):
        expected = [np.corrcoef(x[chosen, i], y[chosen, i])[0, 1] for i in range(x.shape[1])]
        np.testing.assert_allclose(r, expected, atol=1e-9)

    unit = sae.W_dec.detach().numpy() / np.linalg.norm(sae.W_dec.detach().numpy(), axis=1, keepdims=True)
    cosines = (unit @ directions.axes[0].numpy())[(twin["latents"] != 0).any(0)]
    bins = np.histogram(cosines, bins=N_DECODER_BINS, range=(-1, 1))[0]
    np.testing.assert_array_equal(found.decoder_bins, bins)

    place = np.where(position == 0, 0, np.where(twin["token"] == END, 1, 2))
    assert set(place) == {0, 1, 2}
    rows_of_twin = np.stack([place, norm_in, norm_out, x[:, 0], y[:, 0]], axis=1)
    assert len(rows_of_twin) < min(N_SAMPLED.values()), "all tokens are in the sample"
    np.testing.assert_allclose(
        sorted(found.sampled.tolist()), sorted(rows_of_twin.tolist()), atol=1e-12, err_msg="sampled tokens"
    )


def test_a_perfect_sae_has_ratio_cosine_and_correlation_1(lm_of: Callable[..., Any]) -> None:
    model, rows = lm_of("gpt2", "float64"), batches()
    sae = ReluSAE(16, 32).double()
    with torch.no_grad():
        sae.W_enc.copy_(torch.cat([torch.eye(16), -torch.eye(16)], dim=1))
        sae.W_dec.copy_(torch.cat([torch.eye(16), -torch.eye(16)]))
        sae.b_enc.zero_()
        sae.b_dec.zero_()
    found, directions = looked_at(model, rows, PRE, sae)
    ones = torch.ones(8, dtype=torch.float64)
    for name in ("ratio", "cos"):
        torch.testing.assert_close(getattr(found, name), ones)
    torch.testing.assert_close(found.r_later, torch.ones(16, dtype=torch.float64))
    torch.testing.assert_close(found.component, directions.components(directions.by_position)[:, :3])


def test_saes_that_share_a_pass_are_measured_as_alone(lm_of: Callable[..., Any]) -> None:
    model, rows = lm_of("gpt2", "float64"), batches()
    saes = [(PRE, sae_of(16)), (HEADS, sae_of(8)), (PRE, sae_of(16, seed=1))]
    directions = directions_at(model, rows, [PRE, HEADS])
    together = look_at(model, rows, saes, directions)
    for one, found in zip(saes, together, strict=True):
        (alone,) = look_at(model, rows, [one], directions)
        for name, ours, theirs in zip(Reconstruction._fields, found, alone, strict=True):
            torch.testing.assert_close(ours, theirs, msg=name, equal_nan=True)
    first, second = together[0].sampled, together[2].sampled
    assert torch.equal(first[:, :2], second[:, :2]), "the same tokens for both SAEs of a hook point"
    assert not torch.equal(first[:, 2], second[:, 2])


def test_activations_of_0_have_no_ratio_and_spoil_none() -> None:
    """The measures are those of the tokens whose activation is not 0."""
    from e2e_sae.analysis.clean_directions import Moments
    from e2e_sae.analysis.reconstructions import _Seen

    x = torch.randn(4, 6, 5, generator=torch.Generator().manual_seed(0)).double()
    x[1, 2] = 0
    counted = torch.ones(4, 6, dtype=torch.bool)
    moments = Moments()
    moments.update(x[:, :, None], counted)
    seen = _Seen(sae_of(5), moments.directions(), seed=0)
    seen.update(x, counted, torch.full((4, 6), 2))
    found = seen.result()
    assert found.counts.tolist() == [4, 4, 3, 4, 4, 4]
    assert all(torch.isfinite(value).all() for value in (found.ratio, found.cos))
    a = x[[0, 2, 3], 2]
    assert found.ratio[2].item() == pytest.approx((sae_of(5)(a)[0].norm(dim=1) / a.norm(dim=1)).mean().item())


def test_a_sample_keeps_each_row_with_the_same_chance() -> None:
    """Of 3 and then 7 rows 4 are kept; over 2,000 seeds each is there in 40 % (standard error 1.1 %)."""
    kept = torch.zeros(10)
    for seed in range(2000):
        sample = Sample(4, seed)
        sample.update(torch.arange(3.0)[:, None])
        sample.update(torch.arange(3.0, 10.0)[:, None])
        assert sample.rows.shape == (4, 1)
        kept[sample.rows[:, 0].long()] += 1
    assert (kept / 2000 - 0.4).abs().max() < 0.05


def test_a_component_that_does_not_vary_has_no_correlation() -> None:
    pairs = Pairs()
    x = torch.stack([torch.full((5,), 3000.0), torch.arange(5.0)], dim=1).double()
    pairs.update(x, x)
    assert pairs.r().isnan().tolist() == [True, False]


def test_bins_hold_both_ends() -> None:
    bins = bins_of(torch.tensor([-1.0, 0.0, 1.0, 1.0000001]), 4)
    assert bins.tolist() == [1, 0, 1, 2]
