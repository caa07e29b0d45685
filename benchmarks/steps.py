"""One training step, ours: of a real run, with one member or several."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from e2e_sae.acts import TokenBatch
from e2e_sae.setup import set_up
from e2e_sae.train import Trainer

from .shapes import Kind, Shape, random_rows, run_config

Step = Callable[[], object]
N_WARM_UP = 2
"""Steps that are not measured: they allocate, and ours looks at the model and logs its first step."""


def our_step(
    shape: Shape, kind: Kind, folder: Path, device: str, n_members: int = 1, overrides: Sequence[str] = ()
) -> tuple[Step, Any]:
    """Returns the step of a real run, and its language model.

    Args:
        shape: with the folder of its model.
        kind: which losses.
        folder: where the token rows are written.
        device: where.
        n_members: SAEs over one clean pass.
        overrides: settings of the run, such as `autocast=bfloat16`.
    """
    rows = folder / "rows.parquet"
    tokens = random_rows(shape, shape.batch_size * 4)
    pq.write_table(pa.table({"input_ids": list(tokens.numpy())}), rows)
    config = run_config(shape, kind, rows, device, n_members, tuple(overrides))
    parts = set_up(config)
    trainer = Trainer(config, parts.lm, list(parts.members), parts.train_batches, None, None, parts.device)
    batches = [TokenBatch.of(batch, None, parts.device) for batch in tokens.split(shape.batch_size)]
    n_made = 0

    def step() -> None:
        nonlocal n_made
        trainer.train_step([batches[n_made % len(batches)]], is_last=False)
        n_made += 1

    return step, parts.lm
