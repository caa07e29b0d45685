"""What one pass collects, against the same counted by hand over the whole data at once."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from e2e_sae.acts import Position, TokenBatch
from e2e_sae.analysis.feature_data import (
    BINS_PER_DECADE,
    LOG10_MIN,
    N_BINS,
    N_GROUPS,
    N_PER_GROUP,
    ActivityCounter,
    RunningTop,
    collect_activity,
    per_token,
    random_keys,
)
from e2e_sae.saes import ReluSAE
from tests.tiny_models import D_MODEL, random_tokens

N_ROWS, N_CTX, D_SAE = 30, 8, 5


def some_latents(seed: int = 0, share: float = 0.4) -> Tensor:
    """Latents [N_ROWS, N_CTX, D_SAE] over several orders of magnitude; the last is never active."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randn(N_ROWS, N_CTX, D_SAE, generator=generator).mul(2).exp()
    latents = sizes * (torch.rand(N_ROWS, N_CTX, D_SAE, generator=generator) < share)
    latents[..., -1] = 0
    return latents


def counted(latents: Tensor, batch_size: int, mask: Tensor | None = None, seed: int = 0, n_top: int = 4) -> Any:
    counter = ActivityCounter(D_SAE, torch.device("cpu"), seed, n_top)
    for first in range(0, N_ROWS, batch_size):
        rows = slice(first, first + batch_size)
        counter.update(latents[rows], None if mask is None else mask[rows], first)
    return counter.result()


def splitmix(place: int, latent: int, seed: int) -> float:
    """The key, in Python's whole numbers."""
    m = 2**64
    x = (place * 0x9E3779B97F4A7C15 + latent * 0xD1B54A32D192ED03 + seed * 0x2545F4914F6CDD1D) % m
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % m
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % m
    return ((x ^ (x >> 31)) >> 11) / 2**53


@pytest.mark.parametrize("batch_size", [1, 7, N_ROWS])
@pytest.mark.parametrize("is_masked", [False, True])
def test_counts_and_places_equal_those_over_the_whole_data(batch_size: int, is_masked: bool):
    latents = some_latents()
    mask = torch.rand(N_ROWS, N_CTX, generator=torch.Generator().manual_seed(9)) < 0.7 if is_masked else None
    activity = counted(latents, batch_size, mask, seed=3)
    seen = latents if mask is None else latents * mask[..., None]
    assert activity.n_tokens == (N_ROWS * N_CTX if mask is None else int(mask.sum()))
    for i in range(D_SAE):
        values = {r * N_CTX + t: float(seen[r, t, i]) for r in range(N_ROWS) for t in range(N_CTX) if seen[r, t, i] > 0}
        assert int(activity.n_active[i]) == len(values)
        assert float(activity.total[i]) == pytest.approx(sum(values.values()))
        assert float(activity.largest[i]) == max(values.values(), default=0.0)
        edges = 10.0 ** (LOG10_MIN + np.arange(N_BINS + 1) / BINS_PER_DECADE)
        assert activity.histogram[i].tolist() == np.histogram(list(values.values()), edges)[0].tolist()
        peaks = [max((v, -p) for p, v in values.items() if p // N_CTX == r) for r in {p // N_CTX for p in values}]
        top = [-p for _, p in sorted(peaks, reverse=True)][:4]
        assert activity.top[i].tolist() == top + [-1] * (4 - len(top))
        drawn = sorted(values, key=lambda place: splitmix(place, i, 3), reverse=True)[: N_GROUPS * N_PER_GROUP]
        strongest_first = sorted(drawn, key=lambda place: values[place], reverse=True)
        assert [p for p in activity.sample[i].tolist() if p >= 0] == strongest_first
    assert activity.frequency.tolist() == pytest.approx((activity.n_active / activity.n_tokens).tolist())
    assert activity.l0 == pytest.approx(float((seen > 0).sum()) / activity.n_tokens)


def test_values_outside_the_bins_are_in_the_first_and_last():
    latents = torch.zeros(N_ROWS, N_CTX, D_SAE)
    latents[0, :4, 0] = torch.tensor([1e-30, 1e-5, 1e5, 1e30])
    histogram = counted(latents, N_ROWS).histogram[0]
    assert (int(histogram[0]), int(histogram[-1]), int(histogram.sum())) == (2, 2, 4)


def test_another_seed_draws_others_and_counts_the_same():
    a, b = (counted(some_latents(), 5, seed=seed) for seed in (0, 1))
    assert not torch.equal(a.sample, b.sample)
    assert torch.equal(a.top, b.top)


def test_keys_are_spread_evenly_and_do_not_depend_on_each_other():
    places = torch.arange(20_000)
    a, b = (random_keys(places, torch.full_like(places, latent), 0) for latent in (0, 1))
    # Kolmogorov-Smirnov's distance from the uniform distribution: below 1.95 / sqrt(n) in 999 of 1,000 cases.
    distance = (a.sort().values - (places + 0.5) / len(places)).abs().max()
    assert float(distance) < 1.95 / len(places) ** 0.5
    correlations = [torch.corrcoef(torch.stack(pair))[0, 1].abs() for pair in ((a, b), (a[1:], a[:-1]))]
    assert max(correlations) < 4 / len(places) ** 0.5


@pytest.mark.parametrize("n_at_once", [1, 13, 500])
def test_running_top_keeps_the_greatest_and_of_equal_ones_the_earliest(n_at_once: int):
    generator = torch.Generator().manual_seed(0)
    whose, keys = torch.randint(0, 7, (500,), generator=generator), torch.randint(0, 20, (500,), generator=generator)
    top = RunningTop(7, 6, torch.device("cpu"))
    for first in range(0, 500, n_at_once):
        some = slice(first, first + n_at_once)
        top.add(whose[some], keys[some].double(), keys[some].float(), torch.arange(500)[some])
    expected = [
        sorted((n for n in range(500) if whose[n] == i), key=lambda n: (-int(keys[n]), n))[:6] for i in range(7)
    ]
    assert top.places_by_value().tolist() == expected


def test_most_active_latents_are_those_with_the_largest_sums():
    latents = torch.zeros(N_ROWS, N_CTX, D_SAE)
    latents[0, :, 1], latents[0, 0, 3], latents[0, 0, 2] = 1.0, 5.0, 9.0
    activity = counted(latents, N_ROWS)
    assert activity.most_active(2) == [1, 2]
    assert activity.most_active(100) == [1, 2, 3]


def test_of_several_heads_the_activation_of_the_largest_size_counts():
    latents = torch.tensor([[[[1.0, 0.0], [-3.0, 0.0]]]])
    assert per_token(latents).tolist() == [[[-3.0, 0.0]]]


def test_a_pass_sees_the_latents_of_the_clean_activation(lm_of: Callable[..., Any]):
    lm, tokens = lm_of("gpt2", "float64"), random_tokens(6, N_CTX)
    position = Position("blocks.1.hook_resid_pre", "blocks.1.hook_resid_pre")
    sae = ReluSAE(D_MODEL, D_SAE, generator=torch.Generator().manual_seed(0)).double()
    batches = [TokenBatch.of(tokens[:4]), TokenBatch.of(tokens[4:])]
    activities, rows = collect_activity(lm, {position: sae}, batches)
    _, cache = lm.run_with_cache(tokens)
    latents = torch.relu(cache[position.read] @ sae.W_enc + sae.b_enc).detach()
    activity = activities[position.name]
    assert torch.equal(rows.tokens.long(), tokens)
    assert torch.equal(activity.n_active, (latents > 0).sum((0, 1)))
    torch.testing.assert_close(activity.total, latents.sum((0, 1)))
    peaks = latents.amax(1).argsort(dim=0, descending=True)
    assert torch.equal((activity.top // N_CTX)[:, 0], peaks[0])
