"""`evaluate` of the paper's library's training script."""

from collections.abc import Sequence

import torch

from e2e_sae.config import Config
from e2e_sae.errors import UserError
from e2e_sae.evaluate import evaluate as evaluate_batches
from e2e_sae.evaluate import token_batches
from e2e_sae.models.sae_transformer import SAETransformer
from e2e_sae.setup import load_eval_batches


def evaluate(
    config: Config,
    model: SAETransformer,
    device: torch.device | str | None = None,
    cache_positions: Sequence[str] | None = None,
    log_resid_reconstruction: bool = True,
) -> dict[str, float]:
    """Returns every evaluation metric by log key, measured on the config's evaluation data.

    Args:
        device: accepted; the model's own is used.
        cache_positions: accepted; the points of `config.loss.in_to_orig` are used.
        log_resid_reconstruction: without `in_to_orig` in the loss, report it after every block.

    Raises:
        UserError: the config names no evaluation data.
    """
    lm = model.tlens_model
    batches = load_eval_batches(config, lm)
    if batches is None:
        raise UserError("the config has nothing to evaluate on: give eval_data, or set train_data.holdout_fraction")
    n_samples = config.eval_n_samples or batches.n_samples
    data = config.eval_data or config.train_data
    here = next(lm.parameters()).device
    tokens = token_batches(batches, config.batch_size, n_samples, data.exclude_token_ids, here)
    metrics = evaluate_batches(model, tokens, config.loss).metrics
    if log_resid_reconstruction or config.loss.in_to_orig is not None:
        return metrics
    return {key: value for key, value in metrics.items() if not key.startswith("loss/eval/in_to_orig/")}
