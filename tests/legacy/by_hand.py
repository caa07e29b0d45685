"""Activations small enough to compute with by hand, and random ones."""

import torch
from torch import Tensor

from e2e_sae.acts import CacheActs, SAEActs

P, Q = "blocks.1.hook_resid_pre", "blocks.2.hook_mlp_out"


def draw(*shape: int, seed: int = 0) -> Tensor:
    """Returns standard normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def by_hand() -> tuple[dict[str, Tensor], dict[str, SAEActs | CacheActs]]:
    """Two tokens, width 2. a = (1, 0), (0, 1); x = (2, 0), (0, 2); x_hat = (1, 1), (0, 1); c = (3, 0, 1), (0, 0, 2)."""
    a = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    c = torch.tensor([[[3.0, 0.0, 1.0], [0.0, 0.0, 2.0]]])
    x_hat = torch.tensor([[[1.0, 1.0], [0.0, 1.0]]])
    return {P: a, Q: a}, {P: SAEActs(2 * a, c, x_hat), Q: CacheActs(3 * a)}
