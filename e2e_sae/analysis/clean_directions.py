"""Principal directions of clean activations, from sums over one pass of the rows.

    mean = sum_t a_t / n,   C = sum_t a_t a_t^T / n - mean mean^T,   C v_i = lambda_i v_i,  lambda_0 >= lambda_1 >= ...

over all counted tokens, position 0 included; share of direction i: lambda_i / trace C (arXiv 2405.12241, appendix on
the first principal direction; there from 5 sequences). Sums and eigenvectors in float64. The sign of a direction is
free: here the mean activation at the first position lies on its positive side.

Shapes: d width of the activation; at a per-head hook point every head's vector counts by itself.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from e2e_sae.acts import TokenBatch
from e2e_sae.analysis.compared import facts_of
from e2e_sae.analysis.study import Study
from e2e_sae.models.runner import run_clean

N_DIRECTIONS = 25
"""The paper's (figs. 22 and 23)."""


@dataclass(frozen=True)
class Directions:
    """Principal directions of the clean activations at one hook point; all on the CPU, in float64."""

    mean: Float[Tensor, " d"]
    """Mean activation."""
    axes: Float[Tensor, "n_directions d"]
    """Unit vectors, the one of largest variance first."""
    shares: Float[Tensor, " n_directions"]
    """Share of the variance along each."""
    by_position: Float[Tensor, "n_pos d"]
    """Mean activation at each position; NaN where no token counted."""
    counts: Float[Tensor, " n_pos"]
    """Vectors at each position."""

    def components(self, x: Float[Tensor, "*tokens d"]) -> Float[Tensor, "*tokens n_directions"]:
        """Returns (x - mean) . v_i in float64, on x's device."""
        return (x.double() - self.mean.to(x.device)) @ self.axes.to(x.device).T


class Moments:
    """Sums over clean activations at one hook point."""

    def __init__(self) -> None:
        self._by_position: Tensor | None = None
        self._counts = torch.zeros(0)
        self._outer = torch.zeros(0)

    def update(self, x: Float[Tensor, "batch pos heads d"], counted: Bool[Tensor, "batch pos"]) -> None:
        """Adds a batch."""
        kept = torch.where(counted[..., None, None], x.double(), 0.0)
        by_position = kept.sum((0, 2))
        if self._by_position is None:
            self._by_position, self._counts = torch.zeros_like(by_position), by_position.new_zeros(len(by_position))
            self._outer = by_position.new_zeros(x.shape[-1], x.shape[-1])
        self._by_position += by_position
        self._counts += counted.sum(0) * x.shape[2]
        rows = kept.flatten(0, 2)
        self._outer += rows.T @ rows

    def directions(self, n_directions: int = N_DIRECTIONS) -> Directions:
        """Returns the first `n_directions`, or as many as the activation is wide.

        Raises:
            ValueError: there were fewer than two tokens.
        """
        n = self._counts.sum()
        if self._by_position is None or n < 2:
            raise ValueError(f"principal directions want two counted tokens or more, got {int(n)}")
        mean = self._by_position.sum(0) / n
        covariance = self._outer / n - torch.outer(mean, mean)
        values, vectors = torch.linalg.eigh(covariance.cpu())
        axes = vectors.T.flip(0)[:n_directions]
        by_position = (self._by_position / self._counts[:, None]).cpu()
        first = by_position[self._counts.cpu() > 0][0]
        axes = torch.where((axes @ first < 0)[:, None], -axes, axes)
        shares = values.flip(0)[:n_directions].clamp_min(0) / values.clamp_min(0).sum()
        return Directions(mean.cpu(), axes.contiguous(), shares, by_position, self._counts.cpu())


def vectors_of(x: Float[Tensor, "batch pos *heads d"]) -> Float[Tensor, "batch pos n_heads d"]:
    """Returns activations with one axis of heads; of length 1 where there are none."""
    return x.reshape(*x.shape[:2], -1, x.shape[-1])


def counted_of(batch: TokenBatch) -> Bool[Tensor, "batch pos"]:
    """Returns which tokens count; all of them where the batch says nothing."""
    return torch.ones_like(batch.tokens, dtype=torch.bool) if batch.counted is None else batch.counted


@torch.no_grad()
def directions_at(lm: nn.Module, batches: Iterable[TokenBatch], points: Sequence[str]) -> dict[str, Directions]:
    """Returns the principal directions at each hook point, from one clean pass over the batches."""
    moments = {point: Moments() for point in points}
    for batch in batches:
        clean = run_clean(lm, batch, points, want_logits=False)
        for point in points:
            moments[point].update(vectors_of(clean.at(point)), counted_of(batch))
    return {point: moments[point].directions() for point in points}


def clean_directions(study: Study, run_id: str, points: Sequence[str]) -> dict[str, Directions]:
    """Returns the principal directions at hook points of a run's language model, from its rows of evaluation data; kept
    in the study's cache for all runs of that model and data.

    Raises:
        UserError: the run names no evaluation data, or its language model is not to be had.
    """

    def compute() -> dict[str, Tensor]:
        lm = study.lm(study.stored(run_id))
        found = directions_at(lm, study.batches(run_id, desc="principal directions"), points)
        return {f"{point}/{name}": value for point, one in found.items() for name, value in vars(one).items()}

    key = {**facts_of(study, run_id), "points": list(points), "n_samples": study.n_samples}
    tensors = study.cached("clean_directions", key, compute)
    return {
        point: Directions(**{name: tensors[f"{point}/{name}"] for name in Directions.__dataclass_fields__})
        for point in points
    }
