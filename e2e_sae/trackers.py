"""Where log lines go: `metrics.jsonl` always; `wandb_tracker.py` has the other one."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from e2e_sae.checkpoint.files import write_text
from e2e_sae.metrics import FiringCounts


@runtime_checkable
class Tracker(Protocol):
    """Takes what is observed in a run. Its own trouble never stops the run."""

    def log(self, line: Mapping[str, Any]) -> None:
        """Takes one line; `samples` says where in the run it belongs."""
        ...

    def save(self, path: Path) -> None:
        """Takes a checkpoint folder that has just been written."""
        ...

    def firing(self, counts: FiringCounts, n_samples: int | None) -> None:
        """Takes how often each latent fired: in a window that has closed, or (without `n_samples`) at the end."""
        ...

    def close(self, failed: bool = False) -> None:
        """Finishes; `failed` if the run did not come to its end."""
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

    def firing(self, counts: FiringCounts, n_samples: int | None) -> None:
        """Does nothing: a checkpoint holds the counts, and the log lines what is told of them."""

    def close(self, failed: bool = False) -> None:
        """Closes the file."""
        self._file.close()


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
