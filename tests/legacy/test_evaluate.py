"""`evaluate` of the training script."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from e2e_sae import SAETransformer
from e2e_sae.errors import UserError
from tests.tiny_runs import N_CTX, run_config, write_rows


def test_evaluate_gives_the_metrics_of_the_log(tiny_folder: Callable[[str], Path], lm: Any, tmp_path: Path):
    from e2e_sae.scripts.train_tlens_saes.run_train_tlens_saes import evaluate, main
    from e2e_sae.trackers import read_metrics

    rows = write_rows(tmp_path / "rows.parquet", 12)
    data = {"dataset_name": str(rows), "n_ctx": N_CTX}
    config = run_config(
        tiny_folder("gpt2"),
        rows,
        tmp_path / "out",
        n_samples=4,
        eval_data=data,
        eval_every_n_samples=2,
        eval_n_samples=6,
    )
    run_dir = main(config)
    assert run_dir is not None
    model = SAETransformer.from_local_path(run_dir, model=lm)
    metrics = evaluate(config, model, torch.device("cpu"), None)
    line = read_metrics(run_dir / "metrics.jsonl")[-1]
    assert {key: line[key] for key in metrics} == pytest.approx(metrics, rel=1e-4, nan_ok=True)
    # The run has no `in_to_orig`: every block is reported, unless that is not wanted.
    resid = {f"loss/eval/in_to_orig/blocks.{i}.hook_resid_post" for i in range(3)}
    assert resid <= metrics.keys()
    without = evaluate(config, model, torch.device("cpu"), None, log_resid_reconstruction=False)
    assert not any(key.startswith("loss/eval/in_to_orig") for key in without)
    with pytest.raises(UserError, match="nothing to evaluate on"):
        evaluate(config.model_copy(update={"eval_data": None}), model)
