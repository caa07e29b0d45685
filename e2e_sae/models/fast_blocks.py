"""A frozen model's blocks without their inner hook points: fused attention, normalisation and GELU.

TransformerLens computes every block in small steps, so that each can be hooked. Where nothing listens inside a
block, the same arithmetic is done here with torch's fused kernels, on the model's own weights, for both model
classes: GPT-2-, GPT-NeoX- and Llama-style blocks. Whether a model is one is read from its config and then checked
against TransformerLens' own blocks; any other model runs as it is.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from e2e_sae.compiling import compilable
from e2e_sae.log import logger
from e2e_sae.models.head import run_to_unembedding
from e2e_sae.ops.products import frozen_linear
from e2e_sae.precision import plainly

ARCHITECTURES = (
    "GPT2LMHeadModel", "GPTNeoXForCausalLM", "LlamaForCausalLM", "Qwen2ForCausalLM", "MistralForCausalLM",
    "NativeModel", None,
)  # fmt: skip
"""Hugging Face's names of the models whose blocks are known here; the last two are custom TransformerLens models, as a
bridge and as a HookedTransformer."""

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_fast": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "relu": F.relu,
}
_Wrap = Callable[[Tensor], Any]
_WRAPS: "WeakKeyDictionary[nn.Module, _Wrap | None]" = WeakKeyDictionary()
"""By model: how its blocks return their output (bare, or in a tuple); None: its blocks are not fused."""
_CHECKED_TOKENS = 256
"""Tokens of the row that fused and plain blocks are compared on."""


@contextmanager
def fast_blocks(model: Any) -> Iterator[None]:
    """Runs the blocks that nobody listens inside with fused kernels, while the block of code is open.

    Hooks at `hook_resid_pre` and `hook_resid_post` fire as ever. Enter it after all hooks are in place.
    """
    wrap = _wrap_of(model)
    if wrap is None:
        yield
        return
    quiet = [i for i in range(len(model.blocks)) if not _is_listened_to(model, i)]
    overridden: list[dict[str, Any]] = []
    try:
        for i in quiet:
            attributes = model.blocks[i].__dict__
            if "forward" not in attributes:  # else it is replayed
                attributes["forward"] = _fused_forward(model, i, wrap)
                overridden.append(attributes)
        yield
    finally:
        for attributes in overridden:
            del attributes["forward"]


def can_fuse(model: Any) -> bool:
    """Returns whether the fused blocks compute what this model's own do; checked once per model."""
    return _wrap_of(model) is not None


def _wrap_of(model: Any) -> _Wrap | None:
    if model not in _WRAPS:
        with plainly(next(model.parameters()).device):
            _WRAPS[model] = _checked_wrap(model) if _is_known(model) else None
    return _WRAPS[model]


def _is_known(model: Any) -> bool:
    cfg = model.cfg
    original = getattr(model, "original_model", None)
    if original is not None:
        name = type(original).__name__
        hf_config = getattr(original, "config", None)
        window = getattr(hf_config, "sliding_window", None) if getattr(hf_config, "use_sliding_window", True) else None
    else:
        name, window = getattr(cfg, "original_architecture", None), None
    unknown = (
        name not in ARCHITECTURES
        or window is not None
        or getattr(cfg, "use_local_attn", False)
        or (getattr(cfg, "attn_scores_soft_cap", None) or -1.0) > 0
        or getattr(cfg, "use_qk_norm", False)
        or getattr(cfg, "scale_attn_by_inverse_layer_idx", False)
        or getattr(cfg, "num_experts", None)
        or getattr(cfg, "attn_only", False)
        or getattr(cfg, "attention_dir", "causal") != "causal"
        or getattr(cfg, "rotary_adjacent_pairs", False)
        or getattr(cfg, "positional_embedding_type", None) not in ("standard", "rotary")
        or getattr(cfg, "normalization_type", None) not in ("LN", "LNPre", "RMS", "RMSPre")
        or getattr(cfg, "act_fn", None) not in _ACTIVATIONS
    )
    return not unknown


@torch.no_grad()
def _checked_wrap(model: Any) -> _Wrap | None:
    n_tokens = min(_CHECKED_TOKENS, int(model.cfg.n_ctx))
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, int(model.cfg.d_vocab), (1, n_tokens), generator=generator)
    tokens = tokens.to(next(model.parameters()).device)
    outputs: list[Any] = []
    with model.blocks[0].register_forward_hook(lambda module, inputs, output: outputs.append(output)):
        plain = run_to_unembedding(model, tokens)
    wrap = _in_tuple if isinstance(outputs[0], tuple) else _bare
    _pack_weights_(model)
    _WRAPS[model] = wrap
    try:
        with fast_blocks(model):
            fused = run_to_unembedding(model, tokens)
    finally:
        del _WRAPS[model]
    # Rounding of another order of additions, through all blocks; transformers norms in float32 at best.
    difference = float((fused - plain).abs().max() / plain.abs().max())
    # Narrow types round after every step: 1 to 4 eps were found at 3 to 12 blocks.
    n_eps = 16 if plain.dtype in (torch.bfloat16, torch.float16) else 1000
    if difference <= n_eps * max(torch.finfo(plain.dtype).eps, torch.finfo(torch.float32).eps):
        return wrap
    logger.warning(
        "this model runs without fused kernels, which would change its activations "
        f"(by {difference:.1e} of the largest): slower, same results"
    )
    return None


def _bare(x: Tensor) -> Tensor:
    return x


def _in_tuple(x: Tensor) -> tuple[Tensor]:
    return (x,)


def _pack_weights_(model: Any) -> None:
    """Lays HookedTransformer's attention weights out as the products need them; the values stay in their places."""
    # Whoever asks first: the weights go on being used with gradients.
    with torch.inference_mode(False):
        for block in model.blocks:
            for name in ("W_Q", "W_K", "W_V", "_W_K", "_W_V"):
                weight = block.attn._parameters.get(name)
                if weight is not None:  # [n_heads, d_model, d_head], stored as [n_heads, d_head, d_model]
                    weight.data = weight.data.transpose(1, 2).contiguous().transpose(1, 2)


def _is_listened_to(model: Any, i: int) -> bool:
    """Returns whether any hook is at a point inside the block (its input and output do not count)."""
    points = model.hook_dict
    edges = {id(points[f"blocks.{i}.{name}"]) for name in ("hook_resid_pre", "hook_resid_post")}
    return any(
        (point.fwd_hooks or point.bwd_hooks)
        for name, point in points.items()
        if name.startswith(f"blocks.{i}.") and id(point) not in edges
    )


class _Weights(NamedTuple):
    """A block's weights as the products take them, (weight [out, in], bias) each; norms without any have None."""

    norm_1: tuple[Tensor | None, Tensor | None]
    norm_2: tuple[Tensor | None, Tensor | None]
    q: tuple[Tensor, Tensor | None]
    k: tuple[Tensor, Tensor | None]
    v: tuple[Tensor, Tensor | None]
    out: tuple[Tensor, Tensor | None]
    up: tuple[Tensor, Tensor | None]
    gate: Tensor | None
    down: tuple[Tensor, Tensor | None]


class _Kind(NamedTuple):
    """What a block does with them."""

    is_rms: bool
    eps: float
    d_head: int
    scale: float
    """Of the attention scores."""
    activation: str
    """A key of `_ACTIVATIONS`."""
    is_parallel: bool
    """Whether the MLP reads the block's input, not the attention's output."""


def _fused_forward(model: Any, i: int, wrap: _Wrap) -> Callable[..., Any]:
    cfg, block, points = model.cfg, model.blocks[i], model.hook_dict
    before, after = points[f"blocks.{i}.hook_resid_pre"], points[f"blocks.{i}.hook_resid_post"]
    kind = _kind(cfg)

    def forward(x: Tensor, *_: Any, **kwargs: Any) -> Any:
        x = before(x)
        rotary = _rotary(cfg, block.attn, x.shape[1], kwargs.get("position_embeddings"))
        return wrap(after(_block(kind, _weights(block), x, rotary)))

    return forward


def _kind(cfg: Any) -> _Kind:
    return _Kind(
        is_rms=cfg.normalization_type.startswith("RMS"),
        eps=cfg.eps,
        d_head=cfg.d_head,
        scale=_scale(cfg),
        activation=cfg.act_fn,
        is_parallel=bool(cfg.parallel_attn_mlp),
    )


def _weights(block: Any) -> _Weights:
    attn, mlp = block.attn, block.mlp
    gate = getattr(mlp, "W_gate", None)
    return _Weights(
        norm_1=_norm_weights(block.ln1),
        norm_2=_norm_weights(block.ln2),
        q=_head_weights(attn.W_Q, attn.b_Q),
        # HookedTransformer's, where several heads share a key and a value.
        k=_head_weights(getattr(attn, "_W_K", attn.W_K), getattr(attn, "_b_K", attn.b_K)),
        v=_head_weights(getattr(attn, "_W_V", attn.W_V), getattr(attn, "_b_V", attn.b_V)),
        out=(attn.W_O.flatten(0, 1).T, attn.b_O),
        up=(mlp.W_in.T, mlp.b_in),
        gate=None if gate is None else gate.T,
        down=(mlp.W_out.T, mlp.b_out),
    )


def _norm_weights(norm: Any) -> tuple[Tensor | None, Tensor | None]:
    parameters = {name.split(".")[-1]: parameter for name, parameter in norm.named_parameters()}
    weight, bias = parameters.get("weight", parameters.get("w")), parameters.get("bias", parameters.get("b"))
    return weight, bias


def _head_weights(
    W: Float[Tensor, "heads d d_head"], b: Float[Tensor, "heads d_head"] | None
) -> tuple[Float[Tensor, "heads*d_head d"], Float[Tensor, " heads*d_head"] | None]:
    return W.transpose(1, 2).flatten(0, 1), None if b is None else b.flatten()


def _rotary(
    cfg: Any, attn: Any, n_pos: int, given: tuple[Tensor, Tensor] | None
) -> tuple[Float[Tensor, "*one pos d_rot"], Float[Tensor, "*one pos d_rot"]] | None:
    """Returns (cos, sin) of the positions' angles; None for a model without rotary positions."""
    if cfg.positional_embedding_type != "rotary":
        return None
    return given if given is not None else (attn.rotary_cos[:n_pos], attn.rotary_sin[:n_pos])


@compilable
def _block(
    kind: _Kind,
    weights: _Weights,
    x: Float[Tensor, "batch pos d"],
    rotary: tuple[Float[Tensor, "*one pos d_rot"], Float[Tensor, "*one pos d_rot"]] | None,
) -> Float[Tensor, "batch pos d"]:
    """Returns the block's output: x + attention(norm_1 x), and the MLP of what norm_2 makes of it, or of x, added."""
    middle = x + _attention(kind, weights, _norm(kind, weights.norm_1, x), rotary)
    return middle + _mlp(kind, weights, _norm(kind, weights.norm_2, x if kind.is_parallel else middle))


def _norm(
    kind: _Kind, weights: tuple[Tensor | None, Tensor | None], x: Float[Tensor, "batch pos d"]
) -> Float[Tensor, "batch pos d"]:
    weight, bias = weights
    if kind.is_rms:
        return F.rms_norm(x, x.shape[-1:], weight, kind.eps)
    return F.layer_norm(x, x.shape[-1:], weight, bias, kind.eps)


def _attention(
    kind: _Kind,
    weights: _Weights,
    x: Float[Tensor, "batch pos d"],
    rotary: tuple[Tensor, Tensor] | None,
) -> Float[Tensor, "batch pos d"]:
    q, k, v = (
        frozen_linear(x, *pair).unflatten(-1, (-1, kind.d_head)).transpose(1, 2)
        for pair in (weights.q, weights.k, weights.v)
    )
    if rotary is not None:
        q, k = _rotated(q, *rotary), _rotated(k, *rotary)
    n_repeats = q.shape[1] // k.shape[1]
    if n_repeats > 1:
        k, v = k.repeat_interleave(n_repeats, 1), v.repeat_interleave(n_repeats, 1)
    z = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=kind.scale)
    return frozen_linear(z.transpose(1, 2).flatten(2), *weights.out)


def _scale(cfg: Any) -> float:
    if not cfg.use_attn_scale:
        return 1.0
    scale = float(cfg.attn_scale)
    return 1 / scale if scale > 0 else cfg.d_head**-0.5


def _rotated(
    x: Float[Tensor, "batch heads pos d_head"],
    cos: Float[Tensor, "*one pos d_rot"],
    sin: Float[Tensor, "*one pos d_rot"],
) -> Float[Tensor, "batch heads pos d_head"]:
    """Rotates pairs (j, j + d_rot/2) of the first d_rot dimensions (RoFormer, arXiv 2104.09864, as GPT-NeoX pairs)."""
    n_rotated = cos.shape[-1]
    turned, rest = x[..., :n_rotated], x[..., n_rotated:]
    left, right = turned.chunk(2, -1)
    turned = turned * cos + torch.cat((-right, left), -1) * sin
    return torch.cat((turned, rest), -1)


def _mlp(kind: _Kind, weights: _Weights, x: Float[Tensor, "batch pos d"]) -> Float[Tensor, "batch pos d"]:
    activation = _ACTIVATIONS[kind.activation]
    hidden = frozen_linear(x, *weights.up)
    hidden = activation(hidden) if weights.gate is None else activation(frozen_linear(x, weights.gate)) * hidden
    return frozen_linear(hidden, *weights.down)
