"""Time and memory of the geometry analyses at the paper's size.

    python -m benchmarks.geometry make DIR [--runs 9] [--d-sae 46080] [--d-in 768]
    python -m benchmarks.geometry measure DIR [--only NAME ...]

`make` writes run folders as the paper's library leaves them, with random weights: a local, an e2e and an e2e+ds run at
each of layers 2, 6 and 10, 283 MB each. There is no language model with them, so that all latents count as alive.
`measure` runs `e2e-sae analyse` on them, one analysis after the other, in a process of its own, and prints one JSON
line for each: seconds, and the most memory that was resident (Linux), all dictionaries, torch and pandas included.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from e2e_sae.checkpoint.legacy import write_legacy_saes

LAYERS = (2, 6, 10)
"""The paper's."""
LOSSES: dict[str, dict[str, Any]] = {
    "local": {"out_to_in": {"coeff": 1.0}},
    "e2e": {"logits_kl": {"coeff": 1.0}},
    "e2e+ds": {
        "logits_kl": {"coeff": 0.5},
        "in_to_orig": {"total_coeff": 0.05, "hook_positions": ["blocks.11.hook_resid_post"]},
    },
}
"""Besides sparsity, of each type of run."""
ANALYSES = ("within_similarity", "cross_type_similarity")
"""What nine runs of one seed have."""
MB = 1024**2


def make(folder: Path, n_runs: int = 9, d_sae: int = 46_080, d_in: int = 768) -> list[Path]:
    """Writes run folders below `folder`, layer by layer, and returns them; those that are there stay."""
    kinds = [(layer, kind) for layer in LAYERS for kind in LOSSES][:n_runs]
    folders: list[Path] = []
    for seed, (layer, kind) in enumerate(kinds):
        folders.append(folder / f"layer_{layer}_{kind}")
        if (folders[-1] / "final_config.yaml").is_file():
            continue
        folders[-1].mkdir(parents=True, exist_ok=True)
        generator = torch.Generator().manual_seed(seed)
        name = f"blocks.{layer}.hook_resid_pre"
        tensors = {
            "W_enc": torch.randn(d_in, d_sae, generator=generator),
            "b_enc": torch.zeros(d_sae),
            "W_dec": torch.randn(d_sae, d_in, generator=generator),
            "b_dec": torch.zeros(d_in),
        }
        write_legacy_saes(folders[-1] / "samples_400000.pt", {name: tensors})
        config = {
            "tlens_model_path": str(folder / "no_language_model"),
            "saes": {"sae_positions": [name], "dict_size_to_input_ratio": d_sae / d_in},
            "train_data": {"dataset_name": "apollo-research/Skylion007-openwebtext-tokenizer-gpt2", "n_ctx": 1024},
            "n_samples": 400_000,
            "batch_size": 8,
            "lr": 5e-4,
            "loss": {"sparsity": {"p_norm": 1.0, "coeff": 1.0}, **LOSSES[kind]},
        }
        (folders[-1] / "final_config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    return folders


def measure(folder: Path, names: Sequence[str] = ANALYSES, device: str = "auto") -> Iterator[dict[str, Any]]:
    """Yields what each analysis of the runs below `folder` took; what they cached before is removed.

    Raises:
        subprocess.CalledProcessError: an analysis failed.
    """
    out = folder.with_name(f"{folder.name}_out")
    shutil.rmtree(out, ignore_errors=True)
    for name in names:
        command = [sys.executable, "-m", "e2e_sae.scripts.cli", "analyse", str(folder), "--out", str(out)]
        start = time.monotonic()
        peak = _peak_mb([*command, "--only", name, "--device", device])
        yield {"analysis": name, "seconds": round(time.monotonic() - start, 1), "peak_mb": round(peak)}


def _peak_mb(command: Sequence[str]) -> float:
    """Runs a command and returns the most memory that was resident in it.

    Asked of a process in between: the counter of children is the maximum over all that there ever were.
    """
    code = (
        "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stdout=sys.stderr); "
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    run = subprocess.run([sys.executable, "-c", code, *command], check=True, stdout=subprocess.PIPE, text=True)
    return int(run.stdout.split()[-1]) * 1024 / MB


def main(argv: Sequence[str] | None = None) -> None:
    """Makes the runs, or measures analyses of them."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.geometry", description=(__doc__ or "").partition("\n")[0]
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add = commands.add_parser("make", help="write run folders")
    add.add_argument("folder", type=Path)
    add.add_argument("--runs", type=int, default=9, metavar="N")
    add.add_argument("--d-sae", type=int, default=46_080, metavar="N")
    add.add_argument("--d-in", type=int, default=768, metavar="N")
    add.set_defaults(run=lambda args: [make(args.folder, args.runs, args.d_sae, args.d_in)])
    add = commands.add_parser("measure", help="run the analyses")
    add.add_argument("folder", type=Path)
    add.add_argument("--only", action="append", metavar="NAME", help=f"default: {', '.join(ANALYSES)}")
    add.add_argument("--device", default="auto")
    add.set_defaults(run=lambda args: measure(args.folder, args.only or ANALYSES, args.device))
    args = parser.parse_args(argv)
    for found in args.run(args):
        print(json.dumps(found, default=str), flush=True)


if __name__ == "__main__":
    main()
