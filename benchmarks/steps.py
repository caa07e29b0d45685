"""One training step, ours and the plain way.

The twin does what the paper's library does for each batch, on the same TransformerLens model: a full clean pass (for a
local run, up to the block after the SAE), a full spliced pass from the tokens, two log-softmaxes of the whole
batch, and, if asked, explained variances on every step.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from benchmarks.shapes import Kind, Shape, random_rows, run_config
from e2e_sae.acts import TokenBatch
from e2e_sae.hooks import at_hook_point
from e2e_sae.setup import set_up
from e2e_sae.train import Trainer

Step = Callable[[], object]
N_WARM_UP = 2
"""Steps that are not measured: they allocate, and ours looks at the model and logs its first step."""


def our_step(shape: Shape, kind: Kind, model: Path, folder: Path, device: str, **changes: Any) -> tuple[Step, Any]:
    """Returns the step of a real run, and its language model."""
    rows = folder / "rows.parquet"
    tokens = random_rows(shape, shape.batch_size * 4)
    pq.write_table(pa.table({"input_ids": list(tokens.numpy())}), rows)
    config = run_config(shape, kind, model, rows, device, **changes)
    parts = set_up(config)
    trainer = Trainer(config, parts.lm, [parts.member], parts.train_batches, None, None, parts.device)
    batches = [TokenBatch.of(batch, None, parts.device) for batch in tokens.split(shape.batch_size)]
    state = {"n": 0}

    def step() -> None:
        state["n"] += 1
        trainer.train_step([batches[state["n"] % len(batches)]], is_last=False)

    return step, parts.lm


class PlainSAE(torch.nn.Module):
    """As in the paper's library: two linear layers, the decoder's columns normalised in each forward pass."""

    def __init__(self, d_in: int, d_sae: int):
        super().__init__()
        self.encoder = torch.nn.Linear(d_in, d_sae)
        self.decoder = torch.nn.Linear(d_sae, d_in)
        torch.nn.init.orthogonal_(self.decoder.weight.data.T)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns (output, latents)."""
        c = torch.relu(self.encoder(x))
        return torch.nn.functional.linear(
            c, torch.nn.functional.normalize(self.decoder.weight, dim=0), self.decoder.bias
        ), c


def plain_step(lm: Any, shape: Shape, kind: Kind, with_metrics: bool) -> Step:
    """Returns the twin's step on a loaded language model."""
    device = next(lm.parameters()).device
    sae = PlainSAE(shape.d_model, shape.d_sae).to(device)
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-4)
    later = [f"blocks.{i}.hook_resid_pre" for i in range(shape.layer + 1, shape.n_layers)] if kind == "e2e+ds" else []
    rows = [batch.to(device) for batch in random_rows(shape, shape.batch_size * 4).split(shape.batch_size)]
    state = {"n": 0}

    def step() -> None:
        state["n"] += 1
        tokens = rows[state["n"] % len(rows)]
        clean, clean_logits = _clean(lm, tokens, [shape.position, *later], shape.layer + 1 if kind == "local" else None)
        if kind == "local":
            x = clean[shape.position].detach().clone()
            x_hat, c = sae(x)
            loss = (x - x_hat).square().mean()
            pairs = [(x, x_hat)]
        else:
            spliced, spliced_logits, c = _spliced(lm, tokens, shape.position, sae, later)
            log_p, log_q = clean_logits.log_softmax(-1), spliced_logits.log_softmax(-1)
            loss = (log_p.exp() * (log_p - log_q)).sum(-1).mean() * (1.0 if kind == "e2e" else 0.5)
            pairs = [(spliced[name], clean[name]) for name in later]
            for x, a in pairs:
                loss = loss + 2.5 / len(later) * (x - a).square().mean()
        loss = loss + c.abs().sum(-1).mean() / shape.d_model
        if with_metrics:
            for x, a in pairs:
                for layer_norm in (False, True):
                    _explained_variance(x, a, layer_norm)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(sae.parameters(), 10.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


@torch.no_grad()
def _clean(lm: Any, tokens: Tensor, names: list[str], stop: int | None) -> tuple[dict[str, Tensor], Tensor]:
    acts: dict[str, Tensor] = {}
    with _listening(lm, names, acts):
        output = lm(tokens, return_type="logits", **({} if stop is None else {"stop_at_layer": stop}))
    return {name: act.detach().clone() for name, act in acts.items()}, output


def _spliced(
    lm: Any, tokens: Tensor, position: str, sae: PlainSAE, names: list[str]
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    acts: dict[str, Tensor] = {}
    latents: list[Tensor] = []

    def replace(x: Tensor) -> Tensor:
        x_hat, c = sae(x)
        latents.append(c)
        return x_hat

    with at_hook_point(lm.hook_dict[position], replace), _listening(lm, names, acts):
        logits = lm(tokens, return_type="logits")
    return acts, logits, latents[0]


def _listening(lm: Any, names: list[str], acts: dict[str, Tensor]) -> Any:
    from contextlib import ExitStack

    stack = ExitStack()
    for name in names:
        stack.enter_context(at_hook_point(lm.hook_dict[name], lambda x, name=name: acts.__setitem__(name, x)))
    return stack


def _explained_variance(x: Tensor, a: Tensor, layer_norm: bool) -> tuple[Tensor, Tensor]:
    if layer_norm:
        x, a = (torch.nn.functional.layer_norm(y, y.shape[-1:]) for y in (x, a))
    ratio = 1 - (x - a).square().sum(-1) / (a - a.mean((0, 1))).square().sum(-1)
    return ratio.mean(), ratio.std()
