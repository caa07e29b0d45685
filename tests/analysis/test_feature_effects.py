"""Contexts and ablations, against the model run by its own hooks, one latent and one row at a time."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from e2e_sae.acts import Position, TokenBatch
from e2e_sae.analysis.feature_data import Rows, TokenRows, per_token
from e2e_sae.analysis.feature_effects import N_AFTER, N_BEFORE, look_closely
from e2e_sae.analysis.feature_lens import has_lens, logit_lens, written_directions
from e2e_sae.models.lm import load_lm
from e2e_sae.models.lm_config import LMConfig, ProcessingConfig
from e2e_sae.models.splicing import splice
from e2e_sae.saes import SAE, architecture_of, sae_config
from tests.tiny_models import D_MODEL, D_VOCAB, FAMILIES, random_tokens

N_CTX, D_SAE = 8, 12
RESID = Position("blocks.1.hook_resid_pre", "blocks.1.hook_resid_pre")


def sae_of(d_in: int = D_MODEL, **options: Any) -> SAE:
    config = sae_config({"architecture": "relu", **options})
    generator = torch.Generator().manual_seed(1)
    return architecture_of(config.architecture).between(d_in, d_in, D_SAE, config, generator).double().eval()


def rows_of(tokens: Tensor, excluded: list[int] | None = None) -> Rows:
    rows = TokenRows()
    rows.add(TokenBatch.of(tokens, excluded))
    return rows.joined()


def log_probs(lm: Any, tokens: Tensor, position: Position, sae: SAE, latent: int | None) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the model with the SAE in it and a latent set to 0, and the latents: all by the SAE's own
    encode and decode."""
    seen: dict[str, Tensor] = {}

    def read(x: Tensor) -> None:
        seen["latents"] = sae.encode(x)
        seen["skipped"] = torch.as_tensor(sae.skipped(x))

    def write(_: Tensor) -> Tensor:
        latents = seen["latents"].clone()
        if latent is not None:
            latents[..., latent] = 0
        return sae.decode(latents) + seen["skipped"]

    functions = [(position.read, read), (position.write, write)]
    with splice(lm, functions), torch.no_grad():
        return lm(tokens, return_type="logits").log_softmax(-1), seen["latents"].detach()


def check_effects(lm: Any, position: Position, sae: SAE, excluded: list[int] | None = None) -> None:
    tokens = random_tokens(5, N_CTX, seed=2)
    rows = rows_of(tokens, excluded)
    latents = torch.tensor([2, 3, 7])
    places = torch.tensor([[3 * N_CTX + 4, 0 * N_CTX + 1, 4 * N_CTX + 7], [2, -1, -1], [3 * N_CTX, 1 * N_CTX + 6, 9]])
    contexts, effects = look_closely(lm, position, sae, rows, latents, places, batch_size=2, n_ablated=2)
    n_checked = 0
    for page, latent in enumerate(latents.tolist()):
        log_p, acts = log_probs(lm, tokens, position, sae, None)
        log_q, _ = log_probs(lm, tokens, position, sae, latent)
        acts = per_token(acts)[..., latent]
        for slot, place in enumerate(places[page].tolist()):
            if place < 0:
                assert (contexts.tokens[page, slot] == -1).all()
                assert slot == 2 or effects.kl[page, slot].isnan()
                continue
            row, at = divmod(place, N_CTX)
            for w, t in enumerate(range(at - N_BEFORE, at + N_AFTER + 1)):
                inside = 0 <= t < N_CTX
                assert int(contexts.tokens[page, slot, w]) == (int(tokens[row, t]) if inside else -1)
                wanted = float(acts[row, t]) if inside else 0.0
                assert float(contexts.acts[page, slot, w]) == pytest.approx(wanted, rel=1e-4, abs=1e-6)
            if slot >= 2:
                continue
            p, q, keep = log_p[row], log_q[row], rows.counted[row]
            kl = float((p.exp() * (p - q)).sum(-1)[keep].sum())
            following = tokens[row, 1:, None]
            ce = (p[:-1].gather(1, following) - q[:-1].gather(1, following))[:, 0]
            assert float(effects.kl[page, slot]) == pytest.approx(kl, rel=1e-4, abs=1e-7)
            assert float(effects.ce_increase[page, slot]) == pytest.approx(
                float(ce[keep[:-1]].sum()), rel=1e-4, abs=1e-7
            )
            assert int(effects.n_active[page, slot]) == int((acts[row] != 0)[keep].sum())
            n_checked += kl > 1e-6
    assert n_checked >= 2  # something was felt


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("point", ["hook_resid_pre", "hook_mlp_out", "hook_resid_post"])
def test_an_ablation_is_the_model_without_the_latent(family: str, point: str, lm_of: Callable[..., Any]):
    name = f"blocks.1.{point}"
    check_effects(lm_of(family, "float64"), Position(name, name), sae_of())


@pytest.mark.parametrize(
    "options",
    [
        {"decoder_norm": "free"},
        {"architecture": "topk", "k": 4, "subtract_b_dec": True},
        {"architecture": "codebook", "k": 4},
        {"architecture": "gated"},
    ],
)
def test_ablations_are_exact_for_other_architectures(options: dict[str, Any], lm_of: Callable[..., Any]):
    check_effects(lm_of("gpt2", "float64"), RESID, sae_of(**options))


def test_a_latent_that_heads_share_is_set_to_0_in_all_of_them(lm_of: Callable[..., Any]):
    name = "blocks.1.attn.hook_z"
    check_effects(lm_of("gpt2", "float64"), Position(name, name), sae_of(D_MODEL // 2))


def test_a_transcoder_is_ablated_where_it_writes(lm_of: Callable[..., Any]):
    position = Position("blocks.1.hook_resid_pre", "blocks.1.hook_mlp_out")
    check_effects(lm_of("gpt2", "float64"), position, sae_of(skip=True))


def test_tokens_that_do_not_count_are_left_out_of_the_effects(lm_of: Callable[..., Any]):
    excluded = random_tokens(5, N_CTX, seed=2).flatten()[::3].unique().tolist()
    check_effects(lm_of("gpt2", "float64"), RESID, sae_of(), excluded)


@pytest.mark.parametrize(
    "options",
    [{}, {"decoder_norm": "free"}, {"architecture": "codebook", "k": 2}, {"architecture": "batch_topk", "k": 2}],
)
def test_a_direction_is_what_one_unit_of_a_latent_adds(options: dict[str, Any]):
    sae = sae_of(**options)
    added = sae.decode(torch.eye(D_SAE, dtype=torch.float64)) - sae.decode(torch.zeros(1, D_SAE, dtype=torch.float64))
    torch.testing.assert_close(written_directions(sae), added.detach())


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("is_folded", [True, False])
def test_the_lens_is_the_final_norm_and_the_unembedding(
    family: str, is_folded: bool, tiny_folder: Callable[[str], Any]
):
    """The twin normalises by hand: LayerNorm centres, RMSNorm does not; unfolded, the norm has a weight."""
    processing = (
        ProcessingConfig() if is_folded else ProcessingConfig(**dict.fromkeys(ProcessingConfig.model_fields, False))
    )
    lm: Any = load_lm(LMConfig(tlens_model_path=tiny_folder(family), dtype="float64", processing=processing))
    d = torch.randn(4, D_MODEL, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    lens = logit_lens(lm, d, 6)
    x = d - d.mean(1, keepdim=True) if family == "gpt2" else d
    x = x / (x.square().mean(1, keepdim=True) + lm.cfg.eps).sqrt()
    if not is_folded:
        x = x * lm.ln_final.w
    logits = (x @ lm.W_U).detach()
    logits = logits - logits.mean(1, keepdim=True)
    order = logits.argsort(1, descending=True)
    assert torch.equal(lens.top, order[:, :6])
    assert torch.equal(lens.bottom, order.flip(1)[:, :6])
    # RMSNorm computes in float32.
    torch.testing.assert_close(lens.top_effects, logits.gather(1, lens.top), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lens.bottom_effects, logits.gather(1, lens.bottom), rtol=1e-5, atol=1e-6)


def test_with_folded_layer_norm_the_direction_goes_straight_to_the_unembedding(lm_of: Callable[..., Any]):
    lm = lm_of("gpt2", "float64")
    d = torch.randn(4, D_MODEL, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    lens = logit_lens(lm, d, D_VOCAB)
    straight = (d @ lm.W_U).detach()
    straight = straight - straight.mean(1, keepdim=True)
    assert torch.equal(lens.top, straight.argsort(1, descending=True))
    ratio = straight.gather(1, lens.top) / lens.top_effects
    torch.testing.assert_close(ratio, ratio.mean(1, keepdim=True).expand_as(ratio), rtol=1e-4, atol=0)


def test_there_is_a_lens_only_where_the_residual_stream_is_written():
    names = ["blocks.2.hook_resid_pre", "blocks.0.hook_mlp_out", "blocks.1.attn.hook_z", "blocks.1.mlp.hook_post"]
    assert [has_lens(name) for name in names] == [True, True, False, False]
