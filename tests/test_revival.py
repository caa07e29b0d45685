"""AuxK and resampling against plain twins and by hand: values, gradients, draws, and what they leave alone."""

import math
from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from e2e_sae.acts import SAEPass, TokenBatch
from e2e_sae.models.runner import apply_sae
from e2e_sae.revival import auxk_loss, resample_
from e2e_sae.saes.base import SAE, SAEConfig
from e2e_sae.saes.gated import GatedSAE
from e2e_sae.saes.jumprelu import JumpReluConfig, JumpReluSAE
from e2e_sae.saes.relu import ReluSAE
from e2e_sae.saes.topk import TopKConfig, TopKSAE

D_IN, D_SAE = 6, 20
SHAPES = [(3, 4, D_IN), (3, 4, 2, D_IN)]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batch_of(n_rows: int = 3, n_ctx: int = 4, excluded: list[int] | None = None) -> TokenBatch:
    return TokenBatch.of(torch.arange(n_rows * n_ctx).reshape(n_rows, n_ctx), excluded)


def sae_of(**options: Any) -> SAE:
    return TopKSAE(D_IN, D_SAE, TopKConfig(k=3, **options), generator()).double()


def pass_of(sae: SAE, shape: tuple[int, ...] = SHAPES[0], seed: int = 1) -> SAEPass:
    return apply_sae(sae, torch.randn(shape, dtype=torch.float64, generator=generator(seed)) + 0.3)


def mask(*latents: int, d_sae: int = D_SAE) -> Tensor:
    return torch.isin(torch.arange(d_sae), torch.tensor(latents))


# --- AuxK ---


def auxk_twin(sae: SAE, acts: SAEPass, batch: TokenBatch, dead: list[int], k: int) -> Tensor:
    """The loss token by token, from all dead latents."""
    counted = torch.ones_like(batch.tokens, dtype=torch.bool) if batch.counted is None else batch.counted
    xs, outputs = acts.input.detach()[counted].reshape(-1, D_IN), acts.output.detach()[counted].reshape(-1, D_IN)
    errors = xs - outputs
    b_pre = sae.b_dec.detach() if sae.config.subtract_b_dec else torch.zeros(D_IN, dtype=torch.float64)
    total = torch.zeros((), dtype=torch.float64)
    for x, e in zip(xs, errors, strict=True):
        z = {j: (x - b_pre) @ sae.W_enc[:, j] + sae.b_enc[j] for j in dead}
        e_hat = torch.zeros(D_IN, dtype=torch.float64)
        for j in sorted(dead, key=lambda j: -z[j].item())[:k]:
            row = sae.W_dec[j]
            e_hat = e_hat + z[j] * (row if sae.config.decoder_norm == "free" else row / row.norm())
        total = total + (e - e_hat).square().sum()
    return total / (errors - errors.mean(0)).square().sum()


@pytest.mark.parametrize("shape", SHAPES, ids=["residual stream", "heads"])
@pytest.mark.parametrize("excluded", [None, [0, 5, 6]])
@pytest.mark.parametrize("k", [2, 100])
@pytest.mark.parametrize(
    "options", [{}, {"subtract_b_dec": True}, {"decoder_norm": "free"}, {"decoder_norm": "projected"}]
)
def test_auxk_equals_its_plain_twin_in_value_and_in_every_gradient(
    shape: tuple[int, ...], excluded: list[int] | None, k: int, options: dict[str, Any]
) -> None:
    sae, dead = sae_of(**options), [1, 4, 7, 11, 19]
    with torch.no_grad():
        sae.W_dec.mul_(torch.rand(D_SAE, 1, generator=generator(2)) + 0.5)
    acts, batch = pass_of(sae, shape), batch_of(excluded=excluded)
    candidates = torch.tensor([19, 3, 4, 11, 0, 1, 7])
    mean = auxk_loss(acts, batch, candidates, torch.isin(candidates, torch.tensor(dead)), k)
    assert mean.count == 12 - len(excluded or [])
    expected = auxk_twin(sae, acts, batch, dead, k)
    torch.testing.assert_close(mean.value, expected)

    parameters = dict(sae.named_parameters())
    ours = dict(zip(parameters, gradients(3 * mean.value, sae), strict=True))
    theirs = dict(zip(parameters, gradients(3 * expected, sae), strict=True))
    for name in parameters:
        torch.testing.assert_close(ours[name], theirs[name])
    # It reaches the encoder, of the dead ones alone, each of which some token takes; nothing else moves.
    alive = ~mask(*dead)
    for gradient in (ours["W_enc"].T, ours["b_enc"][:, None], ours["W_dec"]):
        assert (gradient[~alive] != 0).any(1).sum() >= (5 if k > 5 else 3)
    assert not ours["W_enc"][:, alive].any()
    assert not ours["b_enc"][alive].any()
    assert not ours["W_dec"][alive].any()
    assert not ours["b_dec"].any()


def gradients(loss: Tensor, sae: SAE) -> list[Tensor]:
    found = torch.autograd.grad(loss, list(sae.parameters()), allow_unused=True, materialize_grads=True)
    return list(found)


def test_auxk_by_hand() -> None:
    sae = ReluSAE(2, 3)
    with torch.no_grad():
        sae.W_enc.copy_(torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]]))
        sae.b_enc.copy_(torch.tensor([0.0, -9.0, 0.0]))
        sae.W_dec.copy_(torch.tensor([[2.0, 0.0], [0.0, 5.0], [1.0, 0.0]]))
        sae.b_dec.zero_()
    x = torch.tensor([[[4.0, 8.0], [2.0, 10.0]]])
    acts = SAEPass(x, torch.zeros(1, 2, 3), torch.tensor([[[4.0, 0.0], [2.0, 0.0]]]), sae=sae)
    # e = (0, 8), (0, 10) with variance 1 + 1; latent 1 has z = -1 and 1, along (0, 1): e - e_hat = (0, 9), (0, 9).
    loss = auxk_loss(acts, batch_of(1, 2), torch.tensor([1, 0]), torch.tensor([True, False]), 1)
    torch.testing.assert_close(loss.value, torch.tensor((81 + 81) / 2.0))


def test_a_silent_relu_latent_with_no_positive_pre_activation_has_a_gradient_too() -> None:
    sae = ReluSAE(D_IN, D_SAE, generator=generator()).double()
    with torch.no_grad():
        sae.b_enc[:5] = -100
    acts = pass_of(sae)
    assert not acts.latents[..., :5].any()
    # All that its bias is to do is to become larger.
    (d_b_enc,) = torch.autograd.grad(
        auxk_loss(acts, batch_of(), torch.arange(5), mask(0, 1, d_sae=5), 5).value, [sae.b_enc]
    )
    assert (d_b_enc[:2] < 0).all()
    assert not d_b_enc[2:].any()


def test_auxk_does_not_depend_on_the_scale_of_the_activations() -> None:
    sae, scaled = sae_of(), sae_of()
    with torch.no_grad():
        scaled.b_enc.mul_(1000)
        scaled.b_dec.mul_(1000)
    acts = pass_of(sae)
    losses = [
        auxk_loss(a, batch_of(), torch.arange(5), mask(0, 1, 3, d_sae=5), 2).value
        for a in (acts, apply_sae(scaled, acts.input * 1000))
    ]
    torch.testing.assert_close(losses[0], losses[1])


@pytest.mark.parametrize("case", ["none dead", "nothing missing", "no counted token"])
def test_auxk_is_exactly_0_with_gradient_0_where_there_is_nothing_to_do(case: str) -> None:
    sae = sae_of()
    acts = pass_of(sae)
    if case == "nothing missing":
        acts = SAEPass(acts.input, acts.latents, acts.input, sae=sae)
    batch = batch_of(excluded=list(range(12)) if case == "no counted token" else None)
    is_dead = torch.zeros(4, dtype=torch.bool) if case == "none dead" else mask(1, 2, d_sae=4)
    loss = auxk_loss(acts, batch, torch.arange(4), is_dead, 2)
    assert loss.sum.item() == 0
    for gradient in gradients(loss.sum, sae):
        assert (gradient == 0).all()


def test_auxk_sends_nothing_upstream() -> None:
    sae = sae_of()
    x = torch.randn(SHAPES[0], dtype=torch.float64, generator=generator(1), requires_grad=True)
    loss = auxk_loss(apply_sae(sae, x), batch_of(), torch.arange(4), mask(1, 2, d_sae=4), 2)
    loss.sum.backward()
    assert x.grad is None


class Doubled(ReluSAE):
    """Pre-activations of its own."""

    def pre_activations(self, x: Tensor) -> Tensor:
        return 2 * super().pre_activations(x)


def test_auxk_takes_an_architectures_own_pre_activations() -> None:
    sae, twin = Doubled(D_IN, D_SAE, generator=generator()).double(), ReluSAE(D_IN, D_SAE).double()
    twin.load_state_dict(sae.state_dict())
    with torch.no_grad():
        twin.W_enc.mul_(2)
        twin.b_enc.mul_(2)
    acts = pass_of(sae)
    passes = [SAEPass(acts.input, acts.latents, acts.output, sae=one) for one in (sae, twin)]
    losses = [auxk_loss(each, batch_of(), torch.arange(9), mask(2, 8, d_sae=9), 3) for each in passes]
    torch.testing.assert_close(losses[0].value, losses[1].value)


# --- resampling ---


@pytest.mark.parametrize("shape", SHAPES, ids=["residual stream", "heads"])
@pytest.mark.parametrize("along", ["inputs", "residuals"])
@pytest.mark.parametrize("options", [{}, {"subtract_b_dec": True}, {"decoder_norm": "projected"}])
def test_new_directions_are_those_of_tokens_of_the_batch(
    shape: tuple[int, ...], along: Any, options: dict[str, Any]
) -> None:
    sae, dead = sae_of(**options), [0, 5, 6, 13]
    acts = pass_of(sae, shape)
    before = {name: parameter.detach().clone() for name, parameter in sae.named_parameters()}
    renewed = resample_(acts, batch_of(), mask(*dead), generator(3), along, 0.2)
    assert renewed.tolist() == mask(*dead).tolist()

    alive = ~renewed
    torch.testing.assert_close(sae.W_enc[:, alive], before["W_enc"][:, alive], rtol=0, atol=0)
    torch.testing.assert_close(sae.b_enc[alive], before["b_enc"][alive], rtol=0, atol=0)
    torch.testing.assert_close(sae.W_dec[alive], before["W_dec"][alive], rtol=0, atol=0)
    torch.testing.assert_close(sae.b_dec.detach(), before["b_dec"], rtol=0, atol=0)

    x = acts.input.reshape(-1, D_IN)
    sources = x - (acts.output.detach().reshape(-1, D_IN) if along == "residuals" else sae.b_dec.detach())
    cosines = F.normalize(sae.W_dec[renewed], dim=1) @ F.normalize(sources, dim=1).T
    best, tokens = cosines.max(1)
    torch.testing.assert_close(best, torch.ones_like(best))
    assert len(set(tokens.tolist())) == len(dead), "no two have the same token"

    alive_norm = before["W_enc"][:, alive].norm(dim=0).mean()
    directions = F.normalize(sources[tokens], dim=1)
    torch.testing.assert_close(sae.W_enc[:, renewed].T, 0.2 * alive_norm * directions)
    row_norm = before["W_dec"][alive].norm(dim=1).mean()
    torch.testing.assert_close(sae.W_dec[renewed].norm(dim=1), row_norm.expand(len(dead)))
    # Without a bias for x - b_dec, in both ways to write the encoder.
    centered = (x[tokens] - sae.b_dec) * directions
    pre_acts = sae.pre_activations(x)[tokens, torch.tensor(dead)]
    torch.testing.assert_close(pre_acts, 0.2 * alive_norm * centered.sum(1))


def test_a_token_is_drawn_with_a_probability_proportional_to_its_squared_error_squared() -> None:
    """Squared errors 1 and 2: the second is drawn 4 times as often."""
    sae, n = ReluSAE(2, 3), 500
    x = torch.tensor([[[1.0, 0.0], [0.0, 2**0.5]]])
    acts, drawn = SAEPass(x, torch.zeros(1, 2, 3), torch.zeros_like(x), sae=sae), Counter[int]()
    draws = generator(7)
    with torch.no_grad():
        sae.b_dec.zero_()
    for _ in range(n):
        resample_(acts, batch_of(1, 2), mask(1, d_sae=3), draws)
        drawn[int(sae.W_dec[1].argmax())] += 1
    # Five standard deviations.
    assert abs(drawn[1] / n - 0.8) < 5 * math.sqrt(0.8 * 0.2 / n)


def test_tokens_that_do_not_count_or_miss_nothing_are_never_drawn_and_the_last_ones_wait() -> None:
    sae = sae_of()
    acts = pass_of(sae)
    output = acts.output.detach().clone()
    output[2] = acts.input[2]
    acts = SAEPass(acts.input, acts.latents, output, sae=sae)
    before = sae.W_dec.detach().clone()
    # Of 12 tokens, 4 miss nothing and 3 do not count: 5 are left for 7 dead latents.
    renewed = resample_(acts, batch_of(excluded=[0, 3, 4]), mask(*range(4, 11)), generator())
    assert renewed.tolist() == mask(*range(4, 9)).tolist()
    changed = (sae.W_dec != before).any(1)
    assert changed.tolist() == renewed.tolist()
    allowed = F.normalize(acts.input.reshape(-1, D_IN)[[1, 2, 5, 6, 7]] - sae.b_dec, dim=1)
    cosines = F.normalize(sae.W_dec[renewed], dim=1) @ allowed.T
    assert sorted(cosines.argmax(1).tolist()) == [0, 1, 2, 3, 4]
    torch.testing.assert_close(cosines.max(1).values, torch.ones(5, dtype=torch.float64))


def test_where_all_are_dead_the_norms_are_those_of_all() -> None:
    sae = sae_of()
    norm = sae.W_enc.norm(dim=0).mean().item()
    resample_(pass_of(sae, (5, 8, D_IN)), batch_of(5, 8), mask(*range(D_SAE)), generator(), encoder_norm=0.5)
    torch.testing.assert_close(sae.W_enc.norm(dim=0), torch.full((D_SAE,), 0.5 * norm, dtype=torch.float64))


def test_nothing_changes_where_none_is_dead() -> None:
    sae = sae_of()
    before = [parameter.detach().clone() for parameter in sae.parameters()]
    assert not resample_(pass_of(sae), batch_of(), mask(), generator()).any()
    assert all(torch.equal(a, b) for a, b in zip(before, sae.parameters(), strict=True))


def test_what_else_decides_whether_a_latent_fires_starts_anew() -> None:
    """Of latents that nothing can open any more, those that are renewed fire at the token that they point along."""
    config = JumpReluConfig(initial_threshold=0.25)
    jumprelu, gated = JumpReluSAE(D_IN, D_SAE, config, generator()).double(), GatedSAE(D_IN, D_SAE).double()
    with torch.no_grad():
        jumprelu.threshold.fill_(100.0)
        gated.b_mag.fill_(-100.0)
        gated.r_mag.fill_(3.0)
    for sae in (jumprelu, gated):
        acts = pass_of(sae)
        assert not acts.latents.any()
        renewed = resample_(acts, batch_of(), mask(0, 5), generator(3), encoder_norm=20.0)
        assert ((pass_of(sae).latents > 0).flatten(0, 1).any(0) == renewed).all()
    assert jumprelu.threshold.tolist() == [0.25 if renewed[j] else 100.0 for j in range(D_SAE)]
    assert torch.equal(gated.b_mag[renewed], gated.b_enc[renewed])
    assert (gated.b_mag[~renewed] == -100).all()
    assert gated.r_mag.tolist() == [0.0 if renewed[j] else 3.0 for j in range(D_SAE)]


@pytest.mark.parametrize("along", ["inputs", "residuals"])
def test_a_transcoder_encodes_along_what_it_reads_and_decodes_along_what_it_replaces(along: Any) -> None:
    sae = ReluSAE(D_IN, D_SAE, SAEConfig(), generator(), 4).double()
    x = torch.randn(3, 4, D_IN, dtype=torch.float64, generator=generator(1))
    replaced = torch.randn(3, 4, 4, dtype=torch.float64, generator=generator(2))
    recon, latents = sae(x)
    acts = SAEPass(x, latents, recon, sae=sae, replaced=replaced)
    resample_(acts, batch_of(), mask(3), generator(), along)
    missing = replaced - (recon if along == "residuals" else sae.b_dec)
    enc, dec = F.normalize(sae.W_enc[:, 3], dim=0), F.normalize(sae.W_dec[3], dim=0)
    by_input, by_output = F.normalize(x, dim=-1) @ enc, F.normalize(missing, dim=-1) @ dec
    assert by_input.argmax() == by_output.argmax()
    torch.testing.assert_close(torch.stack([by_input.max(), by_output.max()]), torch.ones(2, dtype=torch.float64))
    assert sae.b_enc[3] == 0
