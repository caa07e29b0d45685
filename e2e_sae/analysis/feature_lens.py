"""What a latent writes, and what that alone would say: decoder directions, and their logit lens.

With d a latent's direction, N the model's final norm and W_U its unembedding, the effects on the logits are

    e = (N(d) - N(0)) W_U,  minus their mean over the vocabulary

those of a residual stream that holds the direction and nothing else; a constant that all logits share changes no
prediction. Where LayerNorm is folded, as TransformerLens' processing does, N centres and scales and its weight is in
W_U, whose columns are centred: e is then d W_U up to one positive factor for each latent.

The lens is nostalgebraist's (https://www.lesswrong.com/posts/AcKRB8wDpdaN6v6ru, 2020), of directions instead of
activations.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from e2e_sae.analysis.similarity import unit_directions
from e2e_sae.ops.tokens import at_least_float32
from e2e_sae.saes import SAE

N_TOKENS = 10
"""Tokens shown at either end."""
BLOCK_SIZE = 2**24
"""Logits in memory at a time: 64 MB."""
_ON_THE_STREAM = ("hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out", "hook_embed")
"""What is written at these points is added to the residual stream as it is."""


class Lens(NamedTuple):
    """The tokens that directions promote and suppress most, the strongest first."""

    top: Int[Tensor, "n k"]
    """Promoted tokens."""
    top_effects: Float[Tensor, "n k"]
    """Their logits."""
    bottom: Int[Tensor, "n k"]
    """Suppressed tokens."""
    bottom_effects: Float[Tensor, "n k"]
    """Their logits."""


def written_directions(sae: SAE) -> Float[Tensor, "d_sae d_out"]:
    """Returns what each latent adds to the reconstruction per unit of activation."""
    W_dec = sae.W_dec.detach()
    return at_least_float32(W_dec) if sae.config.decoder_norm == "free" else unit_directions(W_dec)


def has_lens(write: str) -> bool:
    """Says whether what is written at a hook point reaches the unembedding directly."""
    return write.rpartition(".")[2] in _ON_THE_STREAM


@torch.no_grad()
def logit_lens(lm: nn.Module, directions: Float[Tensor, "n d_model"], k: int = N_TOKENS) -> Lens:
    """Returns the k most promoted and most suppressed tokens of directions in the residual stream, on the CPU."""
    model: Any = lm
    W_U: Tensor = model.W_U
    final_norm = getattr(model, "ln_final", None) or nn.Identity()
    k = min(k, W_U.shape[1])
    found: list[tuple[Tensor, ...]] = []
    for some in directions.to(W_U).split(max(1, BLOCK_SIZE // W_U.shape[1])):
        normed = final_norm(some[:, None]) - final_norm(torch.zeros_like(some[:1, None]))
        effects = at_least_float32(normed[:, 0]) @ at_least_float32(W_U)
        effects -= effects.mean(1, keepdim=True)
        top, bottom = effects.topk(k), effects.topk(k, largest=False)
        found.append((top.indices, top.values, bottom.indices, bottom.values))
    return Lens(*(torch.cat(parts).cpu() for parts in zip(*found, strict=True)))
