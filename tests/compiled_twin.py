"""`python -m tests.compiled_twin FAMILY DEVICE`: a model, run plainly and compiled, in float64; what differs, as JSON.

A program of its own: the shape checks that pytest puts around every function of the library are not there.
"""

import json
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from e2e_sae.acts import Head, Output, TokenBatch
from e2e_sae.evaluate import clean_names
from e2e_sae.losses import LossConfigs, weighted_loss
from e2e_sae.models.lm import load_lm
from e2e_sae.models.lm_config import LMConfig
from e2e_sae.models.runner import run_clean, run_local, run_spliced
from e2e_sae.models.sae_transformer import SAETransformer
from e2e_sae.ops.logits import kl_sum
from e2e_sae.precision import Arithmetic, computing
from tests.tiny_models import make_model_folder, random_tokens
from tests.tiny_runs import E2E, E2E_DS, LOCAL

LOSSES = {"local": LOCAL, "e2e": E2E, "e2e+ds": {**E2E_DS, "sparsity": {"coeff": 0.1, "p_norm": 0.5}}}


def main(family: str, device: torch.device) -> None:
    """Prints {loss: {output: largest relative difference}}, numbers of graphs after each batch, and graph breaks."""
    warnings.simplefilter("error")
    with tempfile.TemporaryDirectory() as folder:
        config = LMConfig(tlens_model_path=make_model_folder(Path(folder) / "tiny", family), dtype="float64")
        model = SAETransformer(load_lm(config, str(device)), ["blocks.1.hook_resid_pre"], 4.0, seed=0)
    model.saes.to(device, torch.float64)
    differences: dict[str, Any] = {"soft cap": _compare(_capped_kl(False, device), _capped_kl(True, device))}
    n_graphs: list[int] = []
    for name, loss in LOSSES.items():
        terms = LossConfigs.from_dict(loss)
        for n, n_rows in enumerate((4, 3, 4)):  # the last batch is shorter; then the next epoch
            batch = TokenBatch.of(random_tokens(n_rows, 8), device=device)
            plain, compiled = (_outcome(model, batch, terms, compiled) for compiled in (False, True))
            differences[f"{name}, batch {n}"] = _compare(plain, compiled)
            n_graphs.append(_n_graphs())
    breaks = sum(torch._dynamo.utils.counters["graph_break"].values())
    print(json.dumps({"differences": differences, "n_graphs": n_graphs, "n_graph_breaks": breaks}))  # noqa: T201


def _outcome(model: SAETransformer, batch: TokenBatch, loss: LossConfigs, compiled: bool) -> dict[str, Tensor]:
    """Returns losses, activations and gradients."""
    saes = model.saes_at()
    names = list(loss.in_to_orig.hook_positions) if loss.in_to_orig else []
    model.zero_grad()
    with computing(Arithmetic(compile=compiled), batch.tokens.device):
        clean = run_clean(model.tlens_model, batch, clean_names(saes, names), reuse=[model.positions])
        if loss.needs_downstream:
            spliced = run_spliced(model.tlens_model, batch, saes, names, clean)
        else:
            spliced = run_local(clean, saes)
        total, values = weighted_loss(loss.terms, clean, spliced)
        (0.7 * total).backward()
    (acts,) = spliced.sae_acts.values()
    gradients = {name: p.grad.clone() for name, p in model.saes.named_parameters() if p.grad is not None}
    assert len(gradients) == 4
    losses = {name: mean.sum.detach() for name, mean in values.items()}
    return {**losses, **gradients, **clean.acts, "latents": acts.latents.detach(), "output": acts.output.detach()}


def _capped_kl(compiled: bool, device: torch.device) -> dict[str, Tensor]:
    """Returns a KL through a soft cap, and its gradient."""
    clean, spliced, W = (
        torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(device)
        for seed, shape in enumerate([(2, 5, 8), (2, 5, 8), (8, 30)])
    )
    head = Head(W, None, 3.0)
    with computing(Arithmetic(compile=compiled), device):
        kl = kl_sum(Output(clean, head), Output(spliced.requires_grad_(), head))
        (gradient,) = torch.autograd.grad(0.3 * kl, spliced)
    return {"KL": kl.detach(), "gradient": gradient}


def _compare(a: dict[str, Tensor], b: dict[str, Tensor]) -> dict[str, float]:
    assert a.keys() == b.keys()
    return {name: float((a[name] - b[name]).abs().max() / a[name].abs().max()) for name in a}


def _n_graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


if __name__ == "__main__":
    main(sys.argv[1], torch.device(sys.argv[2]))
