"""Results on disk: where and how they were measured, and one entry per case, written after each."""

import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from e2e_sae import __version__
from e2e_sae.base_config import apply_overrides
from e2e_sae.checkpoint.files import write_json
from e2e_sae.models.tlens import tlens_version

from .measure import Settings


class Results:
    """A growing list of results; the file, if there is one, is whole after each."""

    def __init__(self, settings: Settings, path: Path | None = None):
        self.entries: list[dict[str, Any]] = []
        self._path = path
        self._head = {"machine": machine(settings.device), "settings": described(settings)}

    def add(self, entry: dict[str, Any]) -> None:
        """Adds a result."""
        self.entries.append(entry)
        if self._path is not None:
            write_json(self._path, {**self._head, "results": self.entries})


def machine(device: str) -> dict[str, Any]:
    """Returns what the numbers were measured on, and with."""
    import transformers

    return {
        "commit": _commit(),
        "processor": _processor(),
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else "cpu",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "e2e_sae": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "transformer_lens": tlens_version(),
    }


def described(settings: Settings) -> dict[str, Any]:
    """Returns how our steps were run: everything that is not default in their configs, and the rounds."""
    return {
        "products": settings.products,
        "overrides": apply_overrides({}, settings.overrides),
        "rounds": settings.n_rounds,
        "steps_per_round": settings.n_steps,
        "twin_rows": settings.twin_rows,
    }


def _commit() -> str | None:
    """Returns the commit that the code is of, with `+` if it has been changed since; None without a clone."""
    here = Path(__file__).resolve().parent
    command = ["git", "-C", str(here), "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return run.stdout.strip() or None


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.processor() or platform.machine()
