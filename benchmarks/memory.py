"""Peak memory of a step above what is resident after set-up, each kind of step in a process of its own.

`python -m benchmarks.memory REQUEST` measures one, given as JSON, and prints one JSON line.
On a CPU: the process's resident memory (Linux, peak counter reset after set-up); on a GPU: torch's allocator.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from e2e_sae.errors import UserError

from .plain import plain_step
from .shapes import Kind, Shape, model_folder
from .steps import our_step

MB = 1024**2
N_STEPS = 3
_STATUS = Path("/proc/self/status")


class Memory(NamedTuple):
    """Megabytes (2^20 bytes)."""

    set_up_peak_mb: float
    """Peak of set-up: imports, loading and processing the model, building the SAEs."""
    resident_mb: float
    """What is resident once that is done."""
    step_mb: float
    """Peak of the first steps above that."""


def peak_of(
    shape: Shape, kind: Kind, which: str, device: str, n_members: int = 1, overrides: Sequence[str] = ()
) -> Memory:
    """Returns what a new process takes for `ours` or the `twin`.

    Raises:
        UserError: the system does not say.
        RuntimeError: the process failed; with its last words.
    """
    if not device.startswith("cuda") and not _STATUS.exists():
        raise UserError("memory on a CPU is read from /proc, which this system has not: leave --memory out")
    package = __package__ or "benchmarks"
    root = Path(__file__).resolve().parents[len(package.split("."))]
    paths = [str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
    with model_folder(shape) as ready:
        request = [ready.to_dict(), kind, which, device, n_members, list(overrides), torch.get_num_threads()]
        run = subprocess.run(
            [sys.executable, "-m", f"{package}.memory", json.dumps(request)],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        )
    if run.returncode != 0:
        raise RuntimeError(f"measuring memory failed: {(run.stderr.strip().splitlines() or ['no message'])[-1]}")
    return Memory(**json.loads(run.stdout.splitlines()[-1]))


def _measure(shape: Shape, kind: Kind, which: str, device: str, n_members: int, overrides: list[str]) -> Memory:
    read = _of_gpu if device.startswith("cuda") else _of_process
    with tempfile.TemporaryDirectory() as folder:
        step, lm = our_step(shape, kind, Path(folder), device, n_members, overrides)
        if which == "twin":
            step = plain_step(lm, shape, kind)
        resident, set_up_peak = read()
        _reset_peak(device)
        for _ in range(N_STEPS):
            step()
        return Memory(set_up_peak, resident, read()[1] - resident)


def _of_process() -> tuple[float, float]:
    """Returns (now, peak)."""
    fields = dict(line.split(":", 1) for line in _STATUS.read_text(encoding="utf-8").splitlines() if ":" in line)
    now, peak = (int(fields[key].split()[0]) * 1024 / MB for key in ("VmRSS", "VmHWM"))
    return now, peak


def _of_gpu() -> tuple[float, float]:
    return torch.cuda.memory_allocated() / MB, torch.cuda.max_memory_allocated() / MB


def _reset_peak(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def main(request: list[Any]) -> None:
    """Measures what was asked for and prints it."""
    shape, *rest, n_threads = request
    torch.set_num_threads(n_threads)
    print(json.dumps(_measure(Shape.from_dict(shape), *rest)._asdict()))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
