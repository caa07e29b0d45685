"""A run folder and its trackers, for trainings that are made in one go (language models, MLPs)."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from e2e_sae.base_config import BaseConfig
from e2e_sae.checkpoint.run_dir import RunDir
from e2e_sae.trackers import JsonlTracker, Tracker
from e2e_sae.wandb_tracker import start_wandb


@dataclass(frozen=True)
class TrackedRun:
    """Where a run writes and logs."""

    path: Path
    """Its folder, with `final_config.yaml` in it."""
    trackers: list[Tracker]
    """`metrics.jsonl`, and W&B where it was asked for."""

    def log(self, line: Mapping[str, Any]) -> None:
        """Hands a line to every tracker; `samples` says where in the run it belongs."""
        for tracker in self.trackers:
            tracker.log(line)


@contextmanager
def tracked_run(save_dir: Path, run_name: str, config: BaseConfig, wandb_project: str | None) -> Iterator[TrackedRun]:
    """Makes `<save_dir>/<run_name>_<time>/`, opens the trackers, and closes them at the end of the block.

    Raises:
        UserError: the folder cannot be made.
    """
    run_dir = RunDir.create(save_dir, run_name, config.to_yaml())
    trackers: list[Tracker] = [JsonlTracker(run_dir.metrics_file)]
    if wandb_project is not None and (wandb := start_wandb(wandb_project)) is not None:
        wandb.describe(run_name, config)
        trackers.append(wandb)
    failed = True
    try:
        yield TrackedRun(run_dir.path, trackers)
        failed = False
    finally:
        for tracker in trackers:
            tracker.close(failed)
