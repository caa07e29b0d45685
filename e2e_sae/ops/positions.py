"""Which tokens of a batch stand for all of them, where a loss is computed at a share of them only."""

import torch
from jaxtyping import Int
from torch import Tensor

from e2e_sae.acts import TokenBatch
from e2e_sae.seeds import seed_for


def draw_positions(batch: TokenBatch, fraction: float) -> Int[Tensor, " n_drawn"]:
    """Returns max(1, round(fraction N)) of the batch's N counted tokens, uniformly without replacement.

    N / n_drawn times a sum over them has the expectation of the sum over all. They depend on the batch's place in the
    data alone: not on the loss, the device or what was drawn before. Does not wait for the device.

    Returns:
        Places in the flattened batch, on its device.
    """
    n_tokens, device = batch.tokens.numel(), batch.tokens.device
    n_drawn = min(batch.n_counted, max(1, round(fraction * batch.n_counted)))
    generator = torch.Generator().manual_seed(seed_for(0, "positions", batch.start))
    order = torch.randperm(n_tokens, generator=generator)
    if batch.counted is None:
        return _to(order[:n_drawn], device)
    order = _to(order, device)
    # The first n_drawn counted ones: all others go behind them.
    turns = torch.arange(n_tokens, device=device)
    turns = torch.where(batch.counted.flatten()[order], turns, n_tokens)
    return order[turns.topk(n_drawn, largest=False).indices]


def _to(x: Int[Tensor, " n"], device: torch.device) -> Int[Tensor, " n"]:
    """Returns `x` on `device`, without waiting for it."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)
