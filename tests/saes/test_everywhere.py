"""Every architecture in every mix of losses: it trains, goes on bit for bit where it was killed, loads, evaluates."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from e2e_sae.checkpoint.run_dir import RunDir
from e2e_sae.evaluate_run import evaluate_run_dir
from e2e_sae.models.sae_transformer import SAETransformer
from e2e_sae.saes import ARCHITECTURES
from e2e_sae.train import resume_training, train
from tests.killed_runs import assert_ended_alike, killed
from tests.tiny_models import random_tokens
from tests.tiny_runs import E2E, E2E_DS, LOCAL, N_CTX, assert_same, lines_of, run_config, weights, write_rows

OPTIONS: dict[str, dict[str, Any]] = {
    "relu": {"subtract_b_dec": True, "decoder_norm": "free", "encoder_init": "transposed"},
    "topk": {"k": 4, "decoder_norm": "projected"},
    "batch_topk": {"k": 4, "k_start": 9, "k_anneal_samples": 10},
    "matryoshka": {"k": 4, "k_anneal_samples": 10},
    "hierarchical_topk": {"ks": [2, 4, 8], "k": 4, "k_start": 12, "k_anneal_samples": 10, "subtract_b_dec": True},
    "jumprelu": {"initial_threshold": 0.05, "bandwidth": 0.5, "pre_act_coeff": 0.01},
    "gated": {"subtract_b_dec": True, "decoder_norm": "free"},
    "codebook": {"k": 3},
}
"""By architecture."""
MIX = {"sparsity": {"coeff": 0.1, "p_norm": 0.8}, "out_to_in": {"coeff": 0.5}, "out_to_orig": {"coeff": 0.5}, **E2E_DS}
LOSSES = {"local": LOCAL, "e2e": E2E, "e2e+ds": E2E_DS, "mix": MIX}
DEAD_LATENTS = {"after_n_tokens": 16, "auxk": {}, "resample": {"every_n_samples": 6}}
"""Revived in every mix; a codebook's latents do not come from weights of their own."""
A = "blocks.1.hook_resid_pre"


def test_every_architecture_is_here() -> None:
    assert OPTIONS.keys() == ARCHITECTURES.keys()


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("architecture", OPTIONS)
def test_it_trains_resumes_loads_and_evaluates(
    architecture: str, loss: str, tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    config = run_config(
        tiny_folder("gpt2"),
        write_rows(tmp_path / "rows.parquet", 12),
        tmp_path / "out",
        saes={"sae": {"architecture": architecture, **OPTIONS[architecture]}},
        loss=LOSSES[loss],
        n_samples=10,
        save_every_n_samples=4,
        eval_every_n_samples=0,
        train_data={"holdout_fraction": 0.16},
        dead_latents=None if architecture == "codebook" else DEAD_LATENTS,
    )
    run = train(config)
    assert run is not None

    first, last = lines_of(run)[0], lines_of(run)[-1]
    assert all(math.isfinite(line["loss"]) for line in lines_of(run))
    assert last["loss"] != first["loss"]
    saved = RunDir(run).checkpoints()
    assert weights(saved[-1]).keys() == weights(saved[0]).keys()
    assert any(not torch.equal(weights(saved[-1])[key], weights(saved[0])[key]) for key in weights(saved[0]))

    again = killed(run, tmp_path / "killed", keep=-1)
    resume_training(again)
    assert_ended_alike(again, run)

    model = SAETransformer.from_local_path(run, device="cpu")
    (sae,) = model.saes_at().values()
    assert sae.config == config.saes.sae
    assert not sae.training
    assert_same({f"{A}/{name}": tensor for name, tensor in sae.stored_tensors.items()}, weights(run))
    tokens = random_tokens(2, N_CTX)
    together: Any = model.forward(tokens)[0]
    alone: list[Any] = [model.forward(row[None])[0] for row in tokens]
    torch.testing.assert_close(together, torch.cat(alone), msg="in use, no row depends on the others")

    metrics = evaluate_run_dir(run)
    assert metrics["loss/eval/logits_kl"] == pytest.approx(last["loss/eval/logits_kl"], rel=1e-5)
