"""What is computed from two sets of logits, in chunks of tokens, so that full-vocabulary log-softmaxes of the
whole batch never exist.

Shapes: R rows (tokens), V vocabulary. KL(clean || spliced) = sum_v p_v (log p_v - log q_v) with p the clean
and q the spliced distribution. Its gradient with respect to the spliced logits is q - p (softmax's Jacobian
applied to -p/q), which the forward pass keeps instead of a graph.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from e2e_sae.ops.tokens import at_least_float32

CHUNK_ELEMENTS = 2**22
"""Logits per chunk: 16 MB in float32, small beside any model and large enough to keep the cores busy."""


def kl_rows_plain(
    clean_logits: Float[Tensor, "rows vocab"], spliced_logits: Float[Tensor, "rows vocab"]
) -> Float[Tensor, " rows"]:
    """Returns KL(clean || spliced) of each row, in nats; the plain twin of `kl_sum`."""
    log_p = F.log_softmax(at_least_float32(clean_logits), dim=-1)
    log_q = F.log_softmax(at_least_float32(spliced_logits), dim=-1)
    p = log_p.exp()
    # Where p = 0 the term is 0, even if a model sets the logit to -inf.
    return torch.where(p > 0, p * (log_p - log_q), torch.zeros_like(p)).sum(-1)


def kl_sum(
    clean_logits: Float[Tensor, "batch pos vocab"],
    spliced_logits: Float[Tensor, "batch pos vocab"],
    counted: Bool[Tensor, "batch pos"] | None = None,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> Float[Tensor, ""]:
    """Returns the sum over counted tokens of KL(clean || spliced), in nats.

    Differentiable with respect to `spliced_logits` only. Memory beyond the inputs: one gradient of the size
    of the logits, and a few chunks.
    """
    vocab = clean_logits.shape[-1]
    weights = None if counted is None else counted.flatten()
    total: Tensor = _KLSum.apply(
        clean_logits.detach().reshape(-1, vocab), spliced_logits.reshape(-1, vocab), weights, chunk_elements
    )  # pyright: ignore[reportAssignmentType]
    return total


class _KLSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, clean: Tensor, spliced: Tensor, counted: Tensor | None, chunk_elements: int) -> Tensor:
        wants_grad = ctx.needs_input_grad[1]
        grad = torch.empty_like(spliced) if wants_grad else None
        total = at_least_float32(spliced.new_zeros(()))
        for rows in row_chunks(spliced, chunk_elements):
            log_q = F.log_softmax(at_least_float32(spliced[rows]), dim=-1)
            log_p = F.log_softmax(at_least_float32(clean[rows]), dim=-1)
            p = log_p.exp()
            kl = torch.where(p > 0, p * (log_p - log_q), torch.zeros_like(p)).sum(-1)
            slope = log_q.exp_().sub_(p)
            if counted is not None:
                kl = torch.where(counted[rows], kl, torch.zeros_like(kl))
                slope = torch.where(counted[rows, None], slope, torch.zeros_like(slope))
            total = total + kl.sum()
            if grad is not None:
                grad[rows] = slope.to(grad.dtype)
        if grad is not None:
            ctx.save_for_backward(grad)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Any
    ) -> tuple[None, Tensor, None, None]:
        (grad,) = ctx.saved_tensors
        return None, grad * grad_outputs[0].to(grad.dtype), None, None


class LogitComparison(NamedTuple):
    """Sums over counted tokens; next-token quantities are over the tokens that have a successor."""

    n_tokens: int
    """Counted tokens."""
    n_predictions: int
    """Counted tokens that are not the last of their row."""
    clean_ce: Float[Tensor, ""]
    """Next-token cross-entropy of the clean logits, in nats."""
    spliced_ce: Float[Tensor, ""]
    """Next-token cross-entropy of the spliced logits, in nats."""
    clean_correct: Float[Tensor, ""]
    """Next tokens that the clean model ranks first."""
    spliced_correct: Float[Tensor, ""]
    """Next tokens that the spliced model ranks first."""
    clean_same_token: Float[Tensor, ""]
    """Tokens whose own id the clean model ranks first: what the paper's library logs as accuracy."""
    spliced_same_token: Float[Tensor, ""]
    """Likewise for the spliced model."""
    agree: Float[Tensor, ""]
    """Tokens where both models rank the same id first."""
    total_variation: Float[Tensor, ""]
    """0.5 * sum_v |p_v - q_v|."""


@torch.no_grad()
def compare_logits(
    clean_logits: Float[Tensor, "batch pos vocab"],
    spliced_logits: Float[Tensor, "batch pos vocab"],
    tokens: Int[Tensor, "batch pos"],
    counted: Bool[Tensor, "batch pos"] | None = None,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> LogitComparison:
    """Returns everything that is reported of a pair of outputs, in one pass over the logits.

    The prediction made at a counted token is counted, whatever the token is that follows.
    """
    n_batch, n_pos, vocab = clean_logits.shape
    clean, spliced = clean_logits.reshape(-1, vocab), spliced_logits.reshape(-1, vocab)
    is_counted = torch.ones_like(tokens, dtype=torch.bool) if counted is None else counted
    has_next = is_counted.clone()
    has_next[:, -1] = False
    following = tokens.roll(-1, dims=1).flatten()
    same, mask, next_mask = tokens.flatten(), is_counted.flatten(), has_next.flatten()
    sums = torch.zeros(8, dtype=at_least_float32(clean.new_zeros(())).dtype, device=clean.device)
    for rows in row_chunks(clean, chunk_elements):
        log_p = F.log_softmax(at_least_float32(clean[rows]), dim=-1)
        log_q = F.log_softmax(at_least_float32(spliced[rows]), dim=-1)
        top_p, top_q = log_p.argmax(-1), log_q.argmax(-1)
        target, m, n = following[rows], mask[rows], next_mask[rows]
        ce_p = -log_p.gather(-1, target[:, None]).squeeze(-1)
        ce_q = -log_q.gather(-1, target[:, None]).squeeze(-1)
        variation = 0.5 * (log_p.exp_() - log_q.exp_()).abs_().sum(-1)
        pairs = [
            (ce_p, n), (ce_q, n), (top_p == target, n), (top_q == target, n),
            (top_p == same[rows], m), (top_q == same[rows], m), (top_p == top_q, m), (variation, m),
        ]  # fmt: skip
        zero = torch.zeros((), dtype=sums.dtype, device=sums.device)
        sums += torch.stack([torch.where(keep, v.to(sums.dtype), zero).sum() for v, keep in pairs])
    if counted is None:
        n_tokens, n_predictions = n_batch * n_pos, n_batch * (n_pos - 1)
    else:  # waits for the device
        n_tokens, n_predictions = int(mask.sum()), int(next_mask.sum())
    return LogitComparison(n_tokens, n_predictions, *sums.unbind())


def next_token_ce(
    logits: Float[Tensor, "batch pos vocab"],
    tokens: Int[Tensor, "batch pos"],
    counted: Bool[Tensor, "batch pos"] | None = None,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> tuple[Float[Tensor, ""], int]:
    """Returns the summed next-token cross-entropy in nats and the number of predictions it sums over."""
    predictions = logits[:, :-1].flatten(0, 1)
    targets = tokens[:, 1:].flatten()
    mask = None if counted is None else counted[:, :-1].flatten()
    total = at_least_float32(logits.new_zeros(()))
    for rows in row_chunks(predictions, chunk_elements):
        ce = F.cross_entropy(at_least_float32(predictions[rows]), targets[rows], reduction="none")
        total = total + (ce if mask is None else torch.where(mask[rows], ce, torch.zeros_like(ce))).sum()
    return total, targets.numel() if mask is None else int(mask.sum())


def row_chunks(x: Float[Tensor, "rows vocab"], chunk_elements: int) -> Iterator[slice]:
    """Yields slices of rows that hold about `chunk_elements` numbers each."""
    n_rows = max(1, chunk_elements // max(1, x.shape[-1]))
    for start in range(0, x.shape[0], n_rows):
        yield slice(start, min(start + n_rows, x.shape[0]))
