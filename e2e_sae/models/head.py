"""The end of a model, seen from outside: the unembedding as two tensors and a soft cap, so that logits can be
computed in chunks. Checked once per model against its own logits.
"""

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from e2e_sae.acts import Head
from e2e_sae.log import logger
from e2e_sae.precision import plainly

_FOLLOWS: "WeakKeyDictionary[nn.Module, bool]" = WeakKeyDictionary()
"""By model: whether its logits follow from its unembedding."""


class _AtUnembedding(Exception):
    """Ends a forward pass before its unembedding; carries what would have entered it."""

    def __init__(self, hidden: Tensor):
        super().__init__()
        self.hidden = hidden


def head_of(model: Any) -> Head | None:
    """Returns the model's unembedding; None (with a warning, once) for a model whose logits do not follow from it."""
    cap = getattr(model.cfg, "output_logits_soft_cap", None)
    head = Head(model.W_U, model.b_U, float(cap) if cap is not None and cap > 0 else None)
    if model not in _FOLLOWS:
        with plainly(head.W_U.device):
            _FOLLOWS[model] = _gives_its_logits(head, model)
    return head if _FOLLOWS[model] else None


def run_to_unembedding(model: Any, tokens: Tensor) -> Tensor:
    """Runs the model and returns what enters its unembedding, [batch, pos, d_model]."""

    def stop(_module: nn.Module, inputs: Any) -> None:
        raise _AtUnembedding(inputs[0])

    handle = model.unembed.register_forward_pre_hook(stop)
    try:
        model(tokens, return_type="logits")
    except _AtUnembedding as end:
        return end.hidden
    finally:
        handle.remove()
    raise AssertionError(f"the forward pass of {type(model).__name__} did not reach its unembedding")


@torch.no_grad()
def _gives_its_logits(head: Head, model: Any) -> bool:
    tokens = torch.arange(3, device=next(model.parameters()).device)[None] % int(model.cfg.d_vocab)
    logits = model(tokens, return_type="logits")
    ours = head.logits(run_to_unembedding(model, tokens))
    # Rounding of another order of additions, relative to the largest logit. Narrow types add up in float32, round once.
    n_eps = 4 if logits.dtype in (torch.bfloat16, torch.float16) else 100
    if (ours - logits).abs().max() <= n_eps * torch.finfo(logits.dtype).eps * logits.abs().max():
        return True
    logger.warning(
        "this model's logits do not follow from its unembedding alone: they are computed all at once, which takes more "
        "time and memory"
    )
    return False
