"""Tables of runs made up by hand."""

import math
from collections.abc import Sequence
from typing import Any

import pandas as pd

NAN = math.nan
PLACE = "blocks.2.hook_resid_pre"


def runs(
    run_type: str, points: Sequence[tuple[float, float]], architecture: str = "relu", **columns: Any
) -> list[dict[str, Any]]:
    """Returns rows of runs of one kind from (L0, CE increase), ten times as many alive elements as L0.

    Args:
        columns: others; `coeffs` gives each run's sparsity coefficient (else 1, 2, ...).
    """
    coeffs = columns.pop("coeffs", range(1, len(points) + 1))
    kind = run_type if architecture == "relu" else f"{architecture} {run_type}"
    settings = {
        **{"model_name": "gpt2", "sae_pos": PLACE, "layer": 2, "seed": 0, "lr": 1e-3, "ratio": 60.0},
        **{"n_samples": 400.0, "n_tokens": 4000.0, "k": NAN, "target_l0": NAN, "d_sae": 64},
        **{"kl_coeff": NAN, "in_to_orig_coeff": NAN, "out_to_in_coeff": 1.0 if run_type == "local" else 0.0},
        **{"mean_grad_norm": 0.5, "seconds": NAN, "members": NAN},
    }
    return [
        {
            "id": f"{kind}-{l0}-{ce}-{columns}",
            "name": f"{kind} {l0}",
            **{"run_type": run_type, "architecture": architecture, "kind": kind, "sparsity_coeff": float(coeff)},
            **{"L0": l0, "CE_increase": ce, "alive_dict_elements": 10 * l0},
            **settings,
            **columns,
        }
        for (l0, ce), coeff in zip(points, coeffs, strict=True)
    ]


def table_of(*rows: list[dict[str, Any]]) -> Any:
    """Returns the table of all these rows."""
    return pd.DataFrame([row for some in rows for row in some])
