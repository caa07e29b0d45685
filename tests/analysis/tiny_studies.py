"""Studies of runs in the paper's library's layout, without a language model, and of tiny runs with one."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from e2e_sae.analysis.runs import runs_table
from e2e_sae.analysis.study import Study
from e2e_sae.train import train
from tests.tiny_runs import N_CTX, run_config, write_rows

LOSSES: dict[str, dict[str, Any]] = {
    "local": {"out_to_in": {"coeff": 1.0}, "logits_kl": None, "in_to_orig": None},
    "e2e": {"out_to_in": None, "logits_kl": {"coeff": 1.0}, "in_to_orig": None},
    "e2e+ds": {
        "out_to_in": None,
        "logits_kl": {"coeff": 0.5},
        "in_to_orig": {"total_coeff": 0.05, "hook_positions": ["blocks.1.hook_resid_pre"]},
    },
}
"""Of each type of run."""


def write_legacy_run(
    folder: Path, run_type: str, W_dec: Tensor, seed: int = 0, layer: int = 0, loss: Mapping[str, Any] | None = None
) -> Path:
    """Writes a run folder as the paper's library leaves it, of a language model that is nowhere, and returns it.

    Args:
        W_dec: [d_sae, d_in]; encoder and biases are 0.
        loss: changes of the type's.
    """
    d_sae, d_in = W_dec.shape
    folder.mkdir(parents=True)
    name = f"blocks-{layer}-hook_resid_pre"
    state = {
        f"{name}.encoder.0.weight": torch.zeros(d_sae, d_in),
        f"{name}.encoder.0.bias": torch.zeros(d_sae),
        f"{name}.decoder.weight": W_dec.T.contiguous(),
        f"{name}.decoder.bias": torch.zeros(d_in),
    }
    torch.save(state, folder / "samples_400.pt")
    config = {
        "tlens_model_path": str(folder.parent / "no_such_model"),
        "seed": seed,
        "n_samples": 400,
        "lr": 5e-4,
        "batch_size": 2,
        "saes": {"sae_positions": [name.replace("-", ".")], "dict_size_to_input_ratio": d_sae / d_in},
        "loss": {"sparsity": {"p_norm": 1.0, "coeff": 1.0}, **LOSSES[run_type], **(loss or {})},
        "train_data": {"dataset_name": "rows", "n_ctx": 8},
    }
    (folder / "final_config.yaml").write_text(yaml.safe_dump(config))
    return folder


def train_with_eval_data(model: Path, folder: Path, **changes: Any) -> Path:
    """Trains one SAE for some steps, with 6 rows of evaluation data, and returns the run's folder.

    Args:
        model: folder of the language model.
        folder: where data and run go.
        changes: of the config.
    """
    rows, eval_rows = write_rows(folder / "rows.parquet", 8), write_rows(folder / "eval.parquet", 6, seed=1)
    eval_data = {"dataset_name": str(eval_rows), "n_ctx": N_CTX}
    run = train(run_config(model, rows, folder / "ours", **{"eval_data": eval_data, **changes}))
    assert run is not None
    return run


def random_decoder(d_sae: int, d_in: int = 8, seed: int = 0) -> Tensor:
    """Returns random rows, not of norm 1."""
    return 2 * torch.randn(d_sae, d_in, generator=torch.Generator().manual_seed(seed))


def study_of(*folders: Path, **options: Any) -> Study:
    """Returns a study of run folders; its cache is beside the first one."""
    return Study(runs_table([str(folder) for folder in folders]), folders[0].parent / "cache", **options)
