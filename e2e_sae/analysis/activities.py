"""What the latents of a study's SAEs do on its rows, the SAE alone on clean activations: one pass, then the cache."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from e2e_sae.analysis.feature_data import Activity, Rows, collect_activity
from e2e_sae.analysis.study import Study


def activities(
    study: Study, run_id: str, names: Sequence[str], desc: str = "activations"
) -> tuple[dict[str, Activity], Rows]:
    """Returns what each SAE's latents do, by position name, and the rows.

    Args:
        study: the runs; its seed draws the sampled places.
        run_id: the run.
        names: of positions.
        desc: what the progress bar says.

    Raises:
        UserError: the run names no evaluation data, or its language model is not to be had.
    """

    def compute() -> dict[str, Tensor]:
        saes = study.open(run_id).saes_at(names)
        lm = study.lm(study.stored(run_id))
        found, rows = collect_activity(lm, saes, study.batches(run_id, desc=desc), study.seed)
        tensors = {f"rows/{name}": value for name, value in vars(rows).items()}
        for position, activity in found.items():
            tensors |= {f"{position}/{name}": value for name, value in activity.tensors().items()}
        return tensors

    keys = [data_key(study, run_id, name) for name in names]
    kept = study.cached("activities", {"saes": keys, "drawn": study.seed}, compute)
    rows = Rows(kept["rows/tokens"], kept["rows/counted"])
    return {name: Activity.of(_below(kept, f"{name}/")) for name in names}, rows


def data_key(study: Study, run_id: str, position: str) -> dict[str, Any]:
    """Returns what activations of an SAE on the study's rows depend on, for its cache."""
    run = study.stored(run_id)
    config = study.config(run)
    return {
        "sae": [study.fingerprint(run_id), position],
        "lm": study.lm_key(run),
        "data": (config.eval_data or config.train_data).to_dict(),
        "seed": config.seed,
        "n_samples": study.n_samples,
    }


def _below(tensors: dict[str, Tensor], stem: str) -> dict[str, Tensor]:
    return {name.removeprefix(stem): value for name, value in tensors.items() if name.startswith(stem)}
