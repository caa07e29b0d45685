"""Two ways to bring dead latents back: a loss that reaches them, and new directions. Which are dead is given.

AuxK (Gao et al. 2024, arXiv 2406.04093, appendix A.2): dead latents predict what the reconstruction misses,

    e = target - recon,    e_hat = sum over j in A of z_j D_j,    L = sum ||e - e_hat||^2 / sum ||e - mean e||^2

with sums and the mean over a batch's counted tokens. A are a token's k largest dead pre-activations z, D_j the
directions that the decoder uses. e and the activation are constants: W_enc, b_enc and W_dec of dead latents have a
gradient, nothing else has.
  - The paper writes L without the division; its code (github.com/openai/sparse_autoencoder, `normalized_mse`) divides
    by the variance of e, as here. A weight then means the same for activations of every scale, and beside a KL.
  - The paper takes ReLU(z), which under TopK is mostly z. But z < 0 is what makes a latent of a ReLU SAE dead, and
    there ReLU has no gradient.

Resampling (Bricken et al. 2023, transformer-circuits.pub/2023/monosemantic-features, appendix "Neuron Resampling"):
each dead latent gets a token, drawn with a probability proportional to the square of its squared error,
||target - recon||^4. With u the unit vector along x - b_dec there (`inputs`) or along e (`residuals`),

    D_j = u,    W_enc_j = encoder_norm u x mean norm of the alive columns,    bias 0 in z = (x - b_dec) W_enc + bias

and rows of W_dec get the mean norm of the alive ones (1 where they are normalised). What else an architecture has for
each latent (thresholds, scales) starts anew (`SAE.latent_parameters`). The recipe draws from 819,200
inputs, with replacement, by the whole loss. Here tokens are those of one batch, no two latents get the same one (they
would stay equal for ever), and where there are more dead latents than tokens the last ones get none.

Shapes: S = d_sae, C candidates. A per-head hook point has heads after batch and position.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from e2e_sae.acts import Mean, SAEPass, TokenBatch
from e2e_sae.ops.decode import MIN_NORM
from e2e_sae.ops.tokens import at_least_float32, counted_sum
from e2e_sae.saes.base import SAE

Directions = Literal["inputs", "residuals"]
"""What new directions point along."""


def auxk_loss(
    acts: SAEPass, batch: TokenBatch, candidates: Int[Tensor, " C"], is_dead: Bool[Tensor, " C"], k: int
) -> Mean:
    """Returns L as a mean over the counted tokens; 0 if none of the candidates is dead.

    Args:
        acts: what the SAE saw and made.
        batch: says which tokens count.
        candidates: different latents; products are computed for these alone.
        is_dead: which of them are dead.
        k: how many of the dead ones predict at each token.
    """
    sae: SAE = acts.sae
    z = _pre_acts(sae, acts.input.detach(), candidates)
    dead_z = torch.where(is_dead, z, -torch.inf)
    # -inf where fewer than k are dead: every dead one is then taken.
    kth_largest = dead_z.detach().topk(min(k, len(candidates)), dim=-1).values[..., -1:]
    z = torch.where(is_dead & (dead_z >= kth_largest), z, 0)
    predicted = sae.decode_with(z, sae.W_dec.index_select(0, candidates), torch.zeros_like(sae.b_dec))
    error = at_least_float32((acts.target - acts.output).detach())
    variance = _variance(error, batch)
    scale = torch.where(is_dead.any() & (variance > 0), 1 / variance, 0)
    squares = (at_least_float32(predicted) - error).square().sum(-1)
    return Mean(counted_sum(squares * scale, batch.counted), batch.n_counted)


@torch.no_grad()
def resample_(
    acts: SAEPass,
    batch: TokenBatch,
    is_dead: Bool[Tensor, " S"],
    generator: torch.Generator,
    along: Directions = "inputs",
    encoder_norm: float = 0.2,
) -> Bool[Tensor, " S"]:
    """Gives dead latents of `acts.sae` new directions, and returns which ones got one.

    Args:
        acts: what the SAE saw and made.
        batch: says which tokens count; no other is drawn.
        is_dead: which latents are dead.
        generator: of the draws, on the SAE's device.
        along: what the directions point along; a transcoder's encoder columns always along inputs.
        encoder_norm: a new encoder column's norm, in mean norms of the alive ones.
    """
    sae: SAE = acts.sae
    is_transcoder = acts.replaced is not None
    token, renewed = _draw(acts, batch, is_dead, generator)
    center = torch.zeros_like(acts.input[0, 0]) if is_transcoder else sae.b_dec
    x, target, output = (rows.flatten(0, -2)[token] for rows in (acts.input, acts.target, acts.output))
    missing = target - (output if along == "residuals" else sae.b_dec)
    seen = x - center if is_transcoder or along == "inputs" else missing

    is_alive = ~is_dead | is_dead.all()  # all dead: their norms are all there is to go by
    columns = _unit(seen).T * (encoder_norm * _mean_norm(sae.W_enc.T, is_alive))
    rows = _unit(missing) * _mean_norm(sae.W_dec, is_alive)
    biases = torch.zeros_like(sae.b_enc) if sae.config.subtract_b_dec else -(center @ columns)
    sae.W_enc.copy_(torch.where(renewed, columns, sae.W_enc))
    sae.b_enc.copy_(torch.where(renewed, biases, sae.b_enc))
    sae.W_dec.copy_(torch.where(renewed[:, None], rows, sae.W_dec))
    for name, start in sae.latent_parameters().items():
        parameter = sae.get_parameter(name)
        parameter.copy_(torch.where(renewed, start, parameter))
    return renewed


def counted_mask(batch: TokenBatch, x: Shaped[Tensor, "batch pos *rest"]) -> Bool[Tensor, "..."]:
    """Returns which entries of `x` belong to counted tokens, to be broadcast over it."""
    if batch.counted is None:
        return torch.ones((1,) * x.ndim, dtype=torch.bool, device=x.device)
    return batch.counted.reshape(*batch.counted.shape, *(1,) * (x.ndim - 2)).to(x.device)


def _pre_acts(sae: SAE, x: Float[Tensor, "*tokens d_in"], latents: Int[Tensor, " C"]) -> Float[Tensor, "*tokens C"]:
    """Returns the pre-activations of some latents."""
    if type(sae).pre_activations is not SAE.pre_activations:
        return sae.pre_activations(x).index_select(-1, latents)
    x = x - sae.b_dec.detach() if sae.config.subtract_b_dec else x
    return F.linear(x, sae.W_enc.index_select(1, latents).T, sae.b_enc.index_select(0, latents))


def _variance(error: Float[Tensor, "batch pos *rest d"], batch: TokenBatch) -> Float[Tensor, ""]:
    """Returns the mean of ||e - mean e||^2 over the counted tokens."""
    n_tokens = max(1, batch.n_counted)
    n_vectors = n_tokens * (error[0, 0].numel() // error.shape[-1])
    mean = torch.where(counted_mask(batch, error), error, 0).flatten(0, -2).sum(0) / n_vectors
    return counted_sum((error - mean).square().sum(-1), batch.counted) / n_tokens


def _draw(
    acts: SAEPass, batch: TokenBatch, is_dead: Bool[Tensor, " S"], generator: torch.Generator
) -> tuple[Int[Tensor, " S"], Bool[Tensor, " S"]]:
    """Returns a token for each latent, in the flattened batch, and whether it is to have it."""
    squares = at_least_float32(acts.target - acts.output).square().sum(-1)
    squares = torch.where(counted_mask(batch, squares), squares, 0).flatten()
    # The n largest of log p - log E, with E from an exponential distribution, are n draws without replacement
    # (Efraimidis and Spirakis 2006).
    keys = 2 * squares.log() - torch.empty_like(squares).exponential_(generator=generator).log()
    keys, drawn = keys.topk(min(len(keys), len(is_dead)))
    turn = is_dead.cumsum(0) - 1  # 0 for the first dead latent
    place = turn.clamp(0, len(drawn) - 1)
    return drawn[place], is_dead & (turn < len(drawn)) & (keys[place] > -torch.inf)


def _unit(rows: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    return F.normalize(rows, dim=1, eps=MIN_NORM)


def _mean_norm(rows: Float[Tensor, "S d"], where: Bool[Tensor, " S"]) -> Float[Tensor, ""]:
    return (rows.norm(dim=1) * where).sum() / where.sum()
