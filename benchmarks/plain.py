"""The plain twin: what the paper's library does for each batch, on the same TransformerLens model.

A full clean pass (for a local run, up to and with the SAE's block), a full spliced pass from the tokens, two
log-softmaxes of the whole batch, the losses of the paper's configs (reconstruction with coefficient 0 among them),
gradient clipping and Adam; and, if asked, explained variances on every step. In float32, without compilation.
Left out, because the paper's library does it on log steps only: CE, accuracies, L0, counts of active latents.
In its favour: the tokens are on the device already, and the explained variances keep no graph.
"""

from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from e2e_sae.hooks import at_hook_point

from .shapes import Kind, Shape, downstream, random_rows
from .steps import Step


class PlainSAE(nn.Module):
    """As in the paper's library: two linear layers, the decoder's columns normalised in each forward pass."""

    def __init__(self, d_in: int, d_sae: int):
        super().__init__()
        self.encoder = nn.Linear(d_in, d_sae)
        self.decoder = nn.Linear(d_sae, d_in)
        nn.init.orthogonal_(self.decoder.weight.data.T)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns (output, latents)."""
        c = torch.relu(self.encoder(x))
        return F.linear(c, F.normalize(self.decoder.weight, dim=0), self.decoder.bias), c


def plain_step(lm: Any, shape: Shape, kind: Kind, with_metrics: bool = True) -> Step:
    """Returns the twin's step on a loaded language model."""
    device = next(lm.parameters()).device
    sae = PlainSAE(shape.d_model, shape.d_sae).to(device)
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-4)
    later = downstream(shape) if kind == "e2e+ds" else []
    rows = [batch.to(device) for batch in random_rows(shape, shape.batch_size * 4).split(shape.batch_size)]
    n_made = 0

    def step() -> None:
        nonlocal n_made
        loss, pairs = _loss(lm, shape, kind, sae, later, rows[n_made % len(rows)])
        if with_metrics:
            for x, a in pairs:
                _explained_variances(x, a)
        loss.backward()
        nn.utils.clip_grad_norm_(sae.parameters(), 10.0)
        optimizer.step()
        optimizer.zero_grad()
        n_made += 1

    return step


def _loss(
    lm: Any, shape: Shape, kind: Kind, sae: PlainSAE, later: list[str], tokens: Tensor
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Returns the loss, and the (prediction, target) pairs whose variance is explained."""
    at = shape.position
    clean, clean_logits = _clean(lm, tokens, [at, *later], shape.layer + 1 if kind == "local" else None)
    if kind == "local":
        x = clean[at].detach().clone()
        x_hat, c = sae(x)
        loss = (x - x_hat).square().mean()
        pairs = [(x, x_hat)]
    else:
        acts, logits, (x, x_hat, c) = _spliced(lm, tokens, at, sae, later)
        log_p, log_q = clean_logits.log_softmax(-1), logits.log_softmax(-1)
        loss = (log_p.exp() * (log_p - log_q)).sum(-1).mean() * (1.0 if kind == "e2e" else 0.5)
        loss = loss + 0.0 * (x - x_hat).square().mean()
        for name in later:
            loss = loss + 2.5 / len(later) * (acts[name] - clean[name]).square().mean()
        pairs = [(x, x_hat), *((acts[name], clean[name]) for name in later)]
    return loss + c.abs().sum(-1).mean() / shape.d_model, pairs


@torch.no_grad()
def _clean(lm: Any, tokens: Tensor, names: list[str], stop: int | None) -> tuple[dict[str, Tensor], Tensor]:
    acts: dict[str, Tensor] = {}
    with _listening(lm, names, acts):
        output = lm(tokens, return_type="logits", **({} if stop is None else {"stop_at_layer": stop}))
    return {name: act.detach().clone() for name, act in acts.items()}, output


def _spliced(
    lm: Any, tokens: Tensor, position: str, sae: PlainSAE, names: list[str]
) -> tuple[dict[str, Tensor], Tensor, tuple[Tensor, Tensor, Tensor]]:
    acts: dict[str, Tensor] = {}
    seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def replace(x: Tensor) -> Tensor:
        x_hat, c = sae(x)
        seen.append((x, x_hat, c))
        return x_hat

    with at_hook_point(lm.hook_dict[position], replace), _listening(lm, names, acts):
        logits = lm(tokens, return_type="logits")
    return acts, logits, seen[0]


def _listening(lm: Any, names: list[str], acts: dict[str, Tensor]) -> ExitStack:
    stack = ExitStack()
    for name in names:
        stack.enter_context(at_hook_point(lm.hook_dict[name], lambda x, name=name: acts.__setitem__(name, x)))
    return stack


@torch.no_grad()
def _explained_variances(x: Tensor, a: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Returns mean and standard deviation over tokens, of the activations and of their layer norms."""
    found: list[tuple[Tensor, Tensor]] = []
    for p, t in ((x, a), (F.layer_norm(x, x.shape[-1:]), F.layer_norm(a, a.shape[-1:]))):
        variance = 1 - (p - t).square().sum(-1) / (t - t.mean((0, 1))).square().sum(-1)
        found.append((variance.mean(), variance.std()))
    return found
