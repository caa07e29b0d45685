"""Sweep files for the tests of sweeps: a base config, a sweep on it, and what its folder says afterwards."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.tiny_runs import run_values, write_rows

SweepFile = Callable[..., Path]


@pytest.fixture
def base_values(tmp_path: Path, tiny_folder: Callable[[str], Path]) -> dict[str, Any]:
    """A tiny local run with an evaluation at the end, as a user would write it."""
    values = run_values(
        tiny_folder("gpt2"),
        write_rows(tmp_path / "rows.parquet", 20),
        None,
        n_samples=8,
        eval_every_n_samples=0,
        train_data={"holdout_fraction": 0.2},
    )
    del values["save_dir"]
    return values


@pytest.fixture
def sweep_file(tmp_path: Path, base_values: dict[str, Any]) -> SweepFile:
    """Writes `base.yaml` and a sweep on it whose program is the light one, and returns the sweep's file."""

    def write(name: str = "sweep", base: dict[str, Any] | None = None, **changes: Any) -> Path:
        (tmp_path / "base.yaml").write_text(yaml.safe_dump(base or base_values))
        values: dict[str, Any] = {
            "program": str(Path(__file__).parent / "light_program.py"),
            "command": ["${env}", "${interpreter}", "${program}", "base.yaml"],
            "method": "grid",
            "parameters": {"seed": {"values": [0, 1]}},
            **changes,
        }
        values = {key: value for key, value in values.items() if value is not None}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(values))
        return tmp_path / f"{name}.yaml"

    return write
