"""What is computed from two outputs of the model, in chunks of tokens: neither the logits nor the log-softmaxes of
a whole batch ever exist.

Shapes: R rows (tokens), V vocabulary, h what enters the unembedding. KL(clean || spliced) = sum_v p_v (log p_v -
log q_v) with p the clean and q the spliced distribution. Its gradient with respect to the spliced logits is q - p
(softmax's Jacobian applied to -p/q); times the soft cap's slope 1 - (z/c)^2 and W_U^T it is the gradient with
respect to h, which the forward pass computes chunk by chunk and keeps: R x d_model numbers instead of R x V.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from e2e_sae.acts import Output
from e2e_sae.ops.tokens import at_least_float32

CHUNK_ELEMENTS = 2**22
"""Logits per chunk on a CPU: 16 MB in float32, small beside any model and large enough to keep the cores busy."""
CUDA_CHUNK_ELEMENTS = 2**26
"""Logits per chunk on a GPU: 256 MB in float32; enough rows for its matrix units."""


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
    clean: Output,
    spliced: Output,
    counted: Bool[Tensor, "batch pos"] | None = None,
    chunk_elements: int | None = None,
) -> Float[Tensor, ""]:
    """Returns the sum over counted tokens of KL(clean || spliced), in nats.

    Differentiable with respect to `spliced.hidden` only. Memory beyond the inputs: one gradient of the size of
    `spliced.hidden`, and a few chunks.
    """
    weights = None if counted is None else counted.flatten()
    total: Tensor = _KLSum.apply(spliced.hidden, spliced, clean, weights, chunk_elements)  # pyright: ignore[reportAssignmentType]
    return total


class _KLSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, spliced: Output, clean: Output, counted: Tensor | None, chunk_elements: int | None
    ) -> Tensor:
        grad = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        total = at_least_float32(hidden.new_zeros(()))
        chunks = list(row_chunks(spliced, chunk_elements))
        # Made once: fresh memory of this size costs a CPU more than what is computed in it.
        n_rows = chunks[0].stop if chunks else 0
        z_q_, z_p_, log_q_, log_p_ = total.new_empty(4, n_rows, spliced.d_vocab)
        for rows in chunks:
            n = rows.stop - rows.start
            z_q, z_p = _logits_into(z_q_[:n], spliced, rows), _logits_into(z_p_[:n], clean, rows)
            log_q = torch.log_softmax(z_q, -1, out=log_q_[:n])
            log_p = torch.log_softmax(z_p, -1, out=log_p_[:n])
            p = torch.exp(log_p, out=z_p_[:n])
            log_p -= log_q
            # Where p = 0 the term is 0, even if a model sets the logit to -inf.
            log_p.masked_fill_(p == 0, 0.0)
            kl = torch.bmm(p[:, None, :], log_p[:, :, None]).flatten()
            total = total + (kl if counted is None else torch.where(counted[rows], kl, torch.zeros_like(kl))).sum()
            if grad is not None:
                slope = log_q.exp_().sub_(p)
                if counted is not None:
                    slope.masked_fill_(~counted[rows, None], 0.0)
                grad.view(-1, grad.shape[-1])[rows] = _back_through_head(slope, z_q, spliced)
        if grad is not None:
            ctx.save_for_backward(grad)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Any
    ) -> tuple[Tensor, None, None, None, None]:
        (grad,) = ctx.saved_tensors
        return grad * grad_outputs[0].to(grad.dtype), None, None, None, None


def _logits_into(buffer: Float[Tensor, "rows vocab"], output: Output, rows: slice) -> Float[Tensor, "rows vocab"]:
    """Returns the logits of some tokens, written into `buffer` where they have to be computed in its type."""
    head, hidden = output.head, output.hidden
    if head is None or hidden.dtype != buffer.dtype:
        return output.rows(rows)
    h = hidden.reshape(-1, hidden.shape[-1])[rows]
    torch.mm(h, head.W_U, out=buffer)
    if head.b_U is not None:
        buffer += head.b_U
    if head.soft_cap is not None:
        buffer.div_(head.soft_cap).tanh_().mul_(head.soft_cap)
    return buffer


def _back_through_head(
    slope: Float[Tensor, "rows vocab"], logits: Float[Tensor, "rows vocab"], output: Output
) -> Float[Tensor, "rows d_out"]:
    """Returns the gradient with respect to the rows of `hidden`, given that with respect to their logits."""
    head = output.head
    if head is None:
        return slope.to(output.hidden.dtype)
    if head.soft_cap is not None:
        slope = slope * (1 - (logits / head.soft_cap).square())
    return slope.to(head.W_U.dtype) @ head.W_U.T


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
    clean: Output,
    spliced: Output,
    tokens: Int[Tensor, "batch pos"],
    counted: Bool[Tensor, "batch pos"] | None = None,
    chunk_elements: int | None = None,
) -> LogitComparison:
    """Returns everything that is reported of a pair of outputs, in one pass over the logits.

    The prediction made at a counted token is counted, whatever the token is that follows.
    """
    n_batch, n_pos = tokens.shape
    is_counted = torch.ones_like(tokens, dtype=torch.bool) if counted is None else counted
    has_next = is_counted.clone()
    has_next[:, -1] = False
    following = tokens.roll(-1, dims=1).flatten()
    same, mask, next_mask = tokens.flatten(), is_counted.flatten(), has_next.flatten()
    sums = torch.zeros(8, dtype=at_least_float32(clean.hidden.new_zeros(())).dtype, device=tokens.device)
    for rows in row_chunks(clean, chunk_elements):
        log_p = F.log_softmax(clean.rows(rows), dim=-1)
        log_q = F.log_softmax(spliced.rows(rows), dim=-1)
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


@torch.no_grad()
def next_token_ce(
    output: Output,
    tokens: Int[Tensor, "batch pos"],
    counted: Bool[Tensor, "batch pos"] | None = None,
    chunk_elements: int | None = None,
) -> tuple[Float[Tensor, ""], int]:
    """Returns the summed next-token cross-entropy in nats and the number of predictions it sums over."""
    predicts = torch.ones_like(tokens, dtype=torch.bool) if counted is None else counted.clone()
    predicts[:, -1] = False
    following, mask = tokens.roll(-1, dims=1).flatten(), predicts.flatten()
    total = at_least_float32(output.hidden.new_zeros(()))
    for rows in row_chunks(output, chunk_elements):
        ce = F.cross_entropy(output.rows(rows), following[rows], reduction="none")
        total = total + torch.where(mask[rows], ce, torch.zeros_like(ce)).sum()
    n_batch, n_pos = tokens.shape
    return total, n_batch * (n_pos - 1) if counted is None else int(mask.sum())


def row_chunks(output: Output, chunk_elements: int | None = None) -> Iterator[slice]:
    """Yields slices of tokens, counted through the whole batch, that have about `chunk_elements` logits each."""
    if chunk_elements is None:
        chunk_elements = CUDA_CHUNK_ELEMENTS if output.hidden.is_cuda else CHUNK_ELEMENTS
    n_tokens = output.hidden.shape[:-1].numel()
    n_rows = max(1, chunk_elements // max(1, output.d_vocab))
    for start in range(0, n_tokens, n_rows):
        yield slice(start, min(start + n_rows, n_tokens))
