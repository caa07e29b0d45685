"""Where log lines go: `metrics.jsonl` always, W&B where it is asked for.

A tracker's trouble never stops a run: W&B's communication errors are counted and told at the end.
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from e2e_sae.checkpoint.files import write_text
from e2e_sae.log import logger


class Tracker(Protocol):
    """Takes log lines."""

    def log(self, line: Mapping[str, Any]) -> None:
        """Takes one line; `samples` says where in the run it belongs."""
        ...

    def save(self, path: Path) -> None:
        """Takes a checkpoint folder that has just been written."""
        ...

    def close(self) -> None:
        """Finishes."""
        ...


class JsonlTracker:
    """Appends one JSON object a line, flushed at once; a number that is not finite becomes null."""

    def __init__(self, path: Path):
        self._file = path.open("a", encoding="utf-8")

    def log(self, line: Mapping[str, Any]) -> None:
        """Writes one line."""
        self._file.write(json.dumps(_finite(line), allow_nan=False) + "\n")
        self._file.flush()

    def save(self, path: Path) -> None:
        """Does nothing: the checkpoint already lies beside the log."""

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class WandbTracker:
    """Logs to a W&B run, step = samples. `.env` in the working tree is read for key and entity."""

    def __init__(self, project: str, name: str, config: Mapping[str, Any]):
        import wandb
        from dotenv import find_dotenv, load_dotenv

        load_dotenv(find_dotenv(usecwd=True), override=True)
        self._wandb = wandb
        self._n_errors = 0
        self._run: Any = None
        entity = os.environ.get("WANDB_ENTITY") or None
        try:
            self._run = wandb.init(project=project, entity=entity, name=name, config=dict(config))
        except (wandb.Error, OSError) as error:
            logger.warning(f"W&B could not be started ({error}): the run goes on without it")

    def log(self, line: Mapping[str, Any]) -> None:
        """Sends one line; histograms become W&B histograms."""
        values = {key: self._native(value) for key, value in line.items()}
        self._try(lambda: self._run.log(values, step=int(line["samples"])))

    def save(self, path: Path) -> None:
        """Uploads the config and the checkpoint's files, but not the resume state."""
        run_dir = path.parent
        for file in (run_dir / "final_config.yaml", *sorted(path.iterdir())):
            if file.name != "resume.pt":
                self._try(lambda file=file: self._run.save(str(file), base_path=str(run_dir), policy="now"))

    def close(self) -> None:
        """Finishes the run and says how many calls failed."""
        self._try(lambda: self._run.finish())
        if self._n_errors:
            logger.warning(f"W&B: {self._n_errors} calls failed; everything is in the run folder")

    def _native(self, value: Any) -> Any:
        if isinstance(value, Mapping) and "edges" in value:
            return self._wandb.Histogram(np_histogram=(value["counts"], value["edges"]))
        return value

    def _try(self, call: Any) -> None:
        if self._run is None:
            return
        try:
            call()
        except (self._wandb.Error, OSError):
            self._n_errors += 1


def cut_back(path: Path, n_samples: int) -> None:
    """Removes the lines of `metrics.jsonl` after `n_samples`, and a last line that is not whole."""
    if not path.exists():
        return
    kept: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            if json.loads(line)["samples"] <= n_samples and line.endswith("\n"):
                kept.append(line)
        except (ValueError, KeyError):
            continue
    write_text(path, "".join(kept))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Returns the lines of a `metrics.jsonl`."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return value
