"""The evaluation against numbers computed plainly over the whole set at once."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from jaxtyping import Int
from torch import Tensor

from e2e_sae import SAETransformer
from e2e_sae.acts import Position, TokenBatch
from e2e_sae.data.batches import TokenBatches
from e2e_sae.evaluate import evaluate, quality_positions, token_batches
from e2e_sae.losses import LossConfigs
from e2e_sae.models.lm import load_lm
from e2e_sae.models.lm_config import LMConfig
from tests.tiny_models import random_tokens

PRE = "blocks.1.hook_resid_pre"
LOSS = LossConfigs.from_dict({"sparsity": {"coeff": 1.0}, "out_to_in": {"coeff": 1.0}})


@pytest.fixture(scope="module")
def model(tiny_folder: Callable[[str], Path]) -> SAETransformer:
    lm = load_lm(LMConfig(tlens_model_path=tiny_folder("gpt2"), dtype="float64"))
    model = SAETransformer(lm, [PRE], 4.0, seed=0)
    model.saes.double()
    return model


def test_every_quantity_over_unequal_batches_equals_one_plain_pass(model: SAETransformer):
    tokens, excluded = random_tokens(5, 8), 3
    batches = [TokenBatch.of(rows, [excluded]) for rows in (tokens[:2], tokens[2:3], tokens[3:])]
    metrics, firing = evaluate(model, batches, LOSS)
    kept = tokens != excluded
    assert 0 < kept.sum() < kept.numel()
    post = "blocks.2.hook_resid_post"
    with torch.inference_mode():
        clean, raw = model.forward_raw(tokens, run_entire_model=True, cache_positions=[post])
        spliced, acts = model(tokens, cache_positions=[post])
    log_p, log_q = clean.log_softmax(-1), spliced.log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)[kept].mean()
    targets, predicted = tokens[:, 1:, None], kept[:, :-1]
    ce_p = -log_p[:, :-1].gather(-1, targets)[..., 0][predicted].mean()
    ce_q = -log_q[:, :-1].gather(-1, targets)[..., 0][predicted].mean()
    active = (acts[PRE].latents != 0)[kept]

    def fvu(prediction: Tensor, target: Tensor) -> Tensor:
        x, a = prediction[kept], target[kept]
        return (x - a).square().sum() / (a - a.mean(0)).square().sum()

    expected = {
        "loss/eval/logits_kl": kl,
        "performance/eval/orig_model_ce_loss": ce_p,
        "performance/eval/sae_model_ce_loss": ce_q,
        "performance/eval/ce_increase": ce_q - ce_p,
        f"sparsity/eval/L_0/{PRE}": active.double().sum(-1).mean(),
        f"loss/eval/out_to_in/{PRE}": (acts[PRE].output - acts[PRE].input).square()[kept].mean(),
        f"loss/eval/in_to_orig/{post}": (acts[post].input - raw[post]).square()[kept].mean(),
        f"quality/eval/fvu/{PRE}": fvu(acts[PRE].output, raw[PRE]),
        f"quality/eval/explained_variance/{post}": 1 - fvu(acts[post].input, raw[post]),
    }
    for key, value in expected.items():
        assert metrics[key] == pytest.approx(value.item(), rel=1e-9), key
    assert firing.counts[PRE].tolist() == active.sum(0).tolist()
    assert firing.n_tokens == int(kept.sum())


def test_recovered_cross_entropy_is_one_for_a_perfect_sae_and_zero_for_one_that_writes_zeros(model: SAETransformer):
    batches = [TokenBatch.of(random_tokens(3, 8))]
    d = model.hook_shapes[PRE][-1]
    (sae,) = model.saes_at([PRE]).values()
    saved = {name: p.detach().clone() for name, p in sae.named_parameters()}
    eye = torch.eye(d, dtype=torch.float64)
    with torch.no_grad():
        for p in sae.parameters():
            p.zero_()
        zeros = evaluate(model, batches, LOSS).metrics
        # latents (x, -x) clipped at zero, decoder (I, -I): the identity
        sae.W_enc[:, :d], sae.W_enc[:, d : 2 * d] = eye, -eye
        sae.W_dec[:d], sae.W_dec[d : 2 * d] = eye, -eye
        perfect = evaluate(model, batches, LOSS).metrics
        for name, p in sae.named_parameters():
            p.copy_(saved[name])
    assert zeros["performance/eval/ce_recovered_zero"] == pytest.approx(0, abs=1e-9)
    assert perfect["performance/eval/ce_recovered_zero"] == pytest.approx(1)
    assert perfect["performance/eval/ce_recovered_mean"] == pytest.approx(1)
    assert perfect["performance/eval/ce_increase"] == pytest.approx(0, abs=1e-9)
    assert perfect[f"quality/eval/fvu/{PRE}"] == pytest.approx(0, abs=1e-9)


def test_the_evaluation_takes_every_token_whatever_share_the_training_takes(model: SAETransformer):
    batches = [TokenBatch.of(random_tokens(3, 8))]
    values = [
        evaluate(model, batches, LossConfigs.from_dict({**LOSS.to_dict(), "logits_kl": kl})).metrics
        for kl in ({"coeff": 1.0}, {"coeff": 1.0, "position_fraction": 0.2})
    ]
    assert values[0] == values[1]


def test_batches_know_their_place_in_the_data():
    class Rows(TokenBatches):
        n_ctx = 4

        def iterate(self, batch_size: int, start: int = 0) -> Iterator[Int[Tensor, "batch n_ctx"]]:
            yield from torch.arange(40).view(10, 4)[start:].split(batch_size)

    batches = token_batches(Rows(), 3, None, [5], torch.device("cpu"), 2)
    assert [(batch.start, int(batch.tokens[0, 0])) for batch in batches] == [(2, 8), (5, 20), (8, 32)]


def test_the_local_error_and_the_kl_are_measured_whatever_is_trained_on(model: SAETransformer):
    batches = [TokenBatch.of(random_tokens(3, 8))]
    local, e2e = (
        evaluate(model, batches, LossConfigs.from_dict({"sparsity": {"coeff": 1.0}, term: {"coeff": 1.0}})).metrics
        for term in ("out_to_in", "logits_kl")
    )
    assert local == e2e


def test_evaluating_changes_nothing(model: SAETransformer):
    before = {name: p.detach().clone() for name, p in model.saes.named_parameters()}
    random_state, mode = torch.get_rng_state(), model.saes.training
    evaluate(model, [TokenBatch.of(random_tokens(2, 8))], LOSS)
    assert all(torch.equal(before[name], p) and p.grad is None for name, p in model.saes.named_parameters())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert model.saes.training == mode


def test_keys_cover_every_block_without_in_to_orig_and_the_listed_ones_with_it(model: SAETransformer):
    batch = [TokenBatch.of(random_tokens(2, 8))]
    keys = evaluate(model, batch, LOSS).metrics
    assert [key for key in keys if key.startswith("loss/eval/in_to_orig/blocks")] == [
        f"loss/eval/in_to_orig/blocks.{i}.hook_resid_post" for i in range(3)
    ]
    listed = LOSS.to_dict() | {"in_to_orig": {"total_coeff": 1.0, "hook_positions": ["blocks.2.hook_mlp_out"]}}
    keys = evaluate(model, batch, LossConfigs.from_dict(listed)).metrics
    assert [key for key in keys if key.startswith("loss/eval/in_to_orig/blocks")] == [
        "loss/eval/in_to_orig/blocks.2.hook_mlp_out"
    ]
    assert f"loss/eval/out_to_in/{PRE}" in keys
    quality = [key for key in keys if key.startswith("quality/eval/fvu/")]
    assert quality == [f"quality/eval/fvu/{n}" for n in (PRE, "blocks.1.hook_resid_post", "blocks.2.hook_resid_post")]


def test_quality_starts_at_the_first_saes_block():
    def at(*names: str) -> list[str]:
        return quality_positions([Position(name, name) for name in names], 3)

    assert at("blocks.2.hook_mlp_out") == ["blocks.2.hook_mlp_out", "blocks.2.hook_resid_post"]
    assert at("blocks.2.hook_resid_post") == ["blocks.2.hook_resid_post"]
    assert at("hook_embed") == ["hook_embed", *(f"blocks.{i}.hook_resid_post" for i in range(3))]
    assert at("ln_final.hook_normalized") == ["ln_final.hook_normalized"]


def test_whole_batches_are_taken_until_enough_samples_were_seen():
    class Counted(TokenBatches):
        n_ctx, n_samples = 2, 10

        def iterate(self, batch_size: int, start: int = 0) -> Iterator[Int[Tensor, "batch n_ctx"]]:
            for first in range(start, 10, batch_size):
                yield torch.arange(first, min(first + batch_size, 10))[:, None].expand(-1, 2).clone()

    def rows(batch_size: int, n_samples: int | None, start: int = 0) -> list[list[int]]:
        found = token_batches(Counted(), batch_size, n_samples, [], torch.device("cpu"), start)
        return [batch.tokens[:, 0].tolist() for batch in found]

    assert rows(4, 5) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert rows(4, None) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert rows(4, None, 6) == [[6, 7, 8, 9]]


def test_nothing_to_evaluate_on_is_an_error(model: SAETransformer):
    with pytest.raises(ValueError, match="there is no batch to evaluate on"):
        evaluate(model, [], LOSS)
