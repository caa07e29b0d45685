"""Sums over the counted tokens of a batch, in at least float32."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def at_least_float32(x: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
    """Returns `x` in float32 if it is narrower; float64 stays."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def per_token(x: Float[Tensor, "batch pos *rest"]) -> Float[Tensor, "batch pos"]:
    """Returns the mean over everything but batch and position (heads of a per-head hook point)."""
    return x if x.ndim == 2 else x.flatten(2).mean(-1)


def counted_sum(x: Float[Tensor, "batch pos *rest"], counted: Bool[Tensor, "batch pos"] | None) -> Float[Tensor, ""]:
    """Returns the sum over the counted tokens of `per_token(x)`."""
    values = per_token(x)
    if counted is None:
        return values.sum()
    # Not a product: an uncounted position may hold inf or NaN.
    return torch.where(counted, values, torch.zeros((), dtype=values.dtype, device=values.device)).sum()


def counted_rows(
    x: Float[Tensor, "batch pos *rest d"], counted: Bool[Tensor, "batch pos"] | None
) -> Float[Tensor, "rows d"]:
    """Returns the vectors at the counted tokens as rows (one row per head at a per-head hook point)."""
    kept = x.flatten(0, 1) if counted is None else x[counted]
    return kept.reshape(-1, x.shape[-1])
