"""A custom TransformerLens model as the state dict of a `HookedTransformer`, whichever class it is.

The inverse of TransformerLens' own `convert_tl_checkpoint`: attention weights get one axis for the heads,
matrices are `[in, out]`, names are those of the paper's library's `.pt` files (`blocks.0.attn.W_Q`).
"""

from typing import Any

from torch import Tensor, nn


def hooked_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Returns copies of the weights under `HookedTransformer`'s names and shapes, on the CPU."""
    state: dict[str, Tensor] = model.state_dict()
    if hasattr(model, "original_model"):
        cfg: Any = model.cfg
        state = dict(_hooked_item(name, tensor, cfg) for name, tensor in state.items())
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}


def _hooked_item(name: str, tensor: Tensor, cfg: Any) -> tuple[str, Tensor]:
    module, _, kind = name.rpartition(".")
    parent, _, leaf = module.rpartition(".")
    is_bias = kind == "bias"
    if parent.endswith("attn"):
        n_shared: int | None = cfg.n_key_value_heads if leaf in "kv" else None
        n_heads: int = cfg.n_heads if n_shared is None else n_shared
        # HookedTransformer keeps keys and values that heads share under a leading underscore.
        letter = ("" if n_shared is None else "_") + ("b" if is_bias else "W")
        return f"{parent}.{letter}_{leaf.upper()}", _per_head(tensor, leaf, is_bias, n_heads)
    if parent.endswith("mlp"):
        return f"{parent}.{'b' if is_bias else 'W'}_{leaf}", tensor if is_bias else tensor.T
    if module == "unembed":
        return ("unembed.b_U", tensor) if is_bias else ("unembed.W_U", tensor.T)
    tables = {"embed.weight": "embed.W_E", "pos_embed.weight": "pos_embed.W_pos"}
    return tables.get(name, f"{module}.{'b' if is_bias else 'w'}"), tensor


def _per_head(tensor: Tensor, leaf: str, is_bias: bool, n_heads: int) -> Tensor:
    if leaf == "o":
        return tensor if is_bias else tensor.T.unflatten(0, (n_heads, -1))
    split = tensor.unflatten(0, (n_heads, -1))
    return split if is_bias else split.transpose(1, 2)
