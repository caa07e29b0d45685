"""The plain twin computes the loss that ours trains on, and its gradient."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from benchmarks.plain import PlainSAE, _explained_variances, _loss
from benchmarks.shapes import Kind, downstream, gpt2_style, model_folder, random_rows, run_config
from e2e_sae.acts import TokenBatch
from e2e_sae.models.runner import run_clean
from e2e_sae.setup import set_up

SHAPE = gpt2_style("tiny", 3, 32, 2, d_vocab=64, n_ctx=8, batch_size=2, layer=1, d_sae=64)


@pytest.mark.parametrize("kind", ["local", "e2e", "e2e+ds"])
def test_the_twin_has_our_loss_and_gradient(kind: Kind, tmp_path: Path):
    tokens = random_rows(SHAPE, SHAPE.batch_size)
    pq.write_table(pa.table({"input_ids": list(tokens.numpy())}), tmp_path / "rows.parquet")
    with model_folder(SHAPE) as shape:
        config = run_config(shape, kind, tmp_path / "rows.parquet", "cpu", overrides=("dtype=float64",))
        parts = set_up(config)
    (sae,) = parts.member.model.saes_at().values()
    plain = PlainSAE(SHAPE.d_model, SHAPE.d_sae).double()
    with torch.no_grad():
        sae.b_enc.normal_()
        sae.b_dec.normal_()
        plain.encoder.weight.copy_(sae.W_enc.T)
        plain.encoder.bias.copy_(sae.b_enc)
        plain.decoder.weight.copy_(sae.W_dec.T)
        plain.decoder.bias.copy_(sae.b_dec)
    batch = TokenBatch.of(tokens)
    clean = run_clean(parts.lm, batch, parts.member.clean_names, want_logits=kind != "local")
    ours = parts.member.backward(clean, 1.0, 0).total
    theirs, pairs = _loss(parts.lm, SHAPE, kind, plain, downstream(SHAPE) if kind == "e2e+ds" else [], tokens)
    theirs.backward()
    torch.testing.assert_close(ours, theirs.detach())
    gradients = (plain.encoder.weight.grad, plain.decoder.weight.grad)
    for mine, grad in zip((sae.W_enc.grad, sae.W_dec.grad), gradients, strict=True):
        assert mine is not None
        assert grad is not None
        torch.testing.assert_close(mine, grad.T)
    # One reconstruction, and one later activation where those are compared.
    assert len(pairs) == (2 if kind == "e2e+ds" else 1)


def test_the_twins_explained_variance_is_ours():
    x, a = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    (mean, std), (mean_ln, _) = _explained_variances(x, a)
    ratio = 1 - ((x - a) ** 2).sum(-1) / ((a - a.mean((0, 1))) ** 2).sum(-1)
    torch.testing.assert_close(mean, ratio.mean())
    torch.testing.assert_close(std, ratio.std())
    scaled = [(3 * y + 5) for y in (x, a)]
    torch.testing.assert_close(_explained_variances(*scaled)[1][0], mean_ln, atol=1e-4, rtol=0)
