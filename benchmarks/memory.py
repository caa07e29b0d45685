"""Peak memory of a step above what is resident after set-up, each kind of step in a process of its own.

`python -m benchmarks.memory SHAPE LAYER D_SAE KIND ours|twin` prints one JSON line.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.shapes import SHAPES, Kind, Shape, model_folder
from benchmarks.steps import our_step, plain_step

MB = 1024**2


def peak_of(shape: Shape, kind: Kind, which: str) -> dict[str, float]:
    """Returns {set_up_peak_mb, resident_mb, step_mb} from a new process."""
    command = [sys.executable, "-m", "benchmarks.memory", shape.name, str(shape.layer), str(shape.d_sae), kind, which]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(run.stdout.splitlines()[-1])


def _status(key: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024 / MB
    raise LookupError(key)


def _measure(shape: Shape, kind: Kind, which: str) -> dict[str, float]:
    with model_folder(shape) as model, tempfile.TemporaryDirectory() as folder:
        step, lm = our_step(shape, kind, model, Path(folder), "cpu")
        if which == "twin":
            step = plain_step(lm, shape, kind, with_metrics=True)
        set_up_peak, resident = _status("VmHWM"), _status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        for _ in range(3):
            step()
        return {"set_up_peak_mb": set_up_peak, "resident_mb": resident, "step_mb": _status("VmHWM") - resident}


if __name__ == "__main__":
    name, layer, d_sae, kind, which = sys.argv[1:]
    shape = SHAPES[name]._replace(layer=int(layer), d_sae=int(d_sae))
    print(json.dumps(_measure(shape, kind, which)))  # pyright: ignore[reportArgumentType]
