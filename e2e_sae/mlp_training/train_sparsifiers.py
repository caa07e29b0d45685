"""Trains sparsifiers on all hidden layers of a frozen MLP at once, so that the MLP's layers keep their outputs.

Letters, for layer i: a_i its output in the MLP, x_i its output with sparsifiers before it, x_hat_i and c_i what
its sparsifier makes of x_i. The loss is

    sum_i mean (x_hat_i - a_i)^2 + sum_i mean (x_i - a_i)^2 + scale * sum_i mean (x_hat_i - x_i)^2
        + lambda * sum_i mean_images ||c_i||_p

over hidden layers, the second sum over the last layer too; for codebooks there is no c, and x_i is detached in
the third sum. These are the terms of the paper's library's MLP script.
"""

from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from e2e_sae.data.images import Images
from e2e_sae.errors import UserError
from e2e_sae.log import logger
from e2e_sae.losses import SparsityLoss
from e2e_sae.mlp_training.config import MLPSAEsConfig, SparsifierTrainConfig
from e2e_sae.mlp_training.run import Step, accuracy, fit, new_run, open_data
from e2e_sae.mlp_training.stored import check_fits, load_mlp, make_mlp_mod
from e2e_sae.models.mlp import MLPModOutput
from e2e_sae.seeds import seed_for


class Term(NamedTuple):
    """One part of the loss."""

    coeff: float
    """Weight in the total."""
    value: Float[Tensor, ""]
    """Before weighting."""


def train_sparsifiers(config: MLPSAEsConfig) -> Path:
    """Trains the sparsifiers and returns the run folder: `final_config.yaml`, `metrics.jsonl`, `epoch_<n>.pt`.

    Logs the loss and its parts every ten steps, `valid/accuracy` with sparsifiers after every epoch, and at the
    end `test/accuracy` with and `test/accuracy-original` without them.

    Raises:
        UserError: the MLP or the data cannot be read, or do not fit together.
        RunFailed: the loss is no finite number.
    """
    if config.saved_model_dir is None:
        raise UserError("saved_model_dir is not set: name the run folder of an MLP")
    mlp, mlp_data = load_mlp(config.saved_model_dir)
    config = config.model_copy(update={"data": config.data or mlp_data})
    source, train = config.data or mlp_data, config.train
    data = open_data(source)
    check_fits(mlp, data, source)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_for(config.seed, "sparsifier_init"))
        mod = make_mlp_mod(mlp, config)

    def step_on(batch: Images) -> Step:
        output = mod(batch.pixels)
        terms = loss_terms(mlp.layer_outputs(batch.pixels), output, train)
        return Step(total_loss(terms), lambda: _details(batch, output, terms))

    def logits_of(x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch n_classes"]:
        return mod(x).logits

    with new_run(config) as run:
        fit(run, data, train, mod.sparsifiers.parameters(), step_on, logits_of, seed=config.seed)
        test = {
            "test/accuracy": accuracy(logits_of, data.test),
            "test/accuracy-original": accuracy(mlp, data.test),
        }
        run.log(train.n_epochs * len(data.train.labels), train.n_epochs, test)
        path = run.save_weights(train.n_epochs, mod.sparsifiers.state_dict())
    with_, without = test.values()
    logger.info(f"test accuracy with sparsifiers {with_:.4f}, without {without:.4f} -> {path}")
    return run.path


def loss_terms(
    clean: dict[str, Float[Tensor, "batch d_layer"]], output: MLPModOutput, train: SparsifierTrainConfig
) -> dict[str, Term]:
    """Returns the parts of the loss by their log names (without `train/loss-`).

    Args:
        clean: every layer's output in the MLP without sparsifiers.
    """
    terms: dict[str, Term] = {}
    sparsity = SparsityLoss(coeff=train.sparsity_lambda, p_norm=train.p_norm)
    for i, x in output.outs.items():
        terms[f"new-orig-{i}"] = Term(1.0, F.mse_loss(x, clean[i]))
        if i not in output.sparsifier_outs:
            continue
        x_hat, c = output.sparsifier_outs[i], output.cs[i]
        terms[f"sae-orig-{i}"] = Term(1.0, F.mse_loss(x_hat, clean[i]))
        own_input = x.detach() if c is None else x
        terms[f"sae-new-{i}"] = Term(train.sparsifier_in_out_recon_loss_scale, F.mse_loss(x_hat, own_input))
        if c is not None:
            terms[f"sparsity-loss-{i}"] = Term(train.sparsity_lambda, sparsity.norm(c).mean())
    return terms


def total_loss(terms: dict[str, Term]) -> Float[Tensor, ""]:
    """Returns the weighted sum."""
    return torch.stack([term.coeff * term.value for term in terms.values()]).sum()


def _details(batch: Images, output: MLPModOutput, terms: dict[str, Term]) -> dict[str, float]:
    """Returns the parts of the loss, the batch's accuracy, and how many latents are zero, by log name."""
    hits = output.logits.argmax(-1) == batch.labels
    values = {"train/accuracy": hits.float().mean().item()}
    values |= {f"train/loss-{name}": term.value.item() for name, term in terms.items()}
    for i, c in output.cs.items():
        if c is not None:
            n_zeros = int((c == 0).sum())
            values |= {f"train/zero-counts-{i}": n_zeros, f"train/fraction-zeros-{i}": n_zeros / c.numel()}
    return values
