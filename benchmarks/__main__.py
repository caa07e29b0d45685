"""`python -m benchmarks [CASE ...] [--memory] [--json FILE]`: ours against the plain twin, alternating."""

import argparse
import json
import platform
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.floor import matmul_rate, step_flops
from benchmarks.memory import peak_of
from benchmarks.shapes import DEMO, GPT2_SMALL, Kind, Shape, model_folder
from benchmarks.steps import N_WARM_UP, Step, our_step, plain_step


class Case(NamedTuple):
    """One line of the table."""

    shape: Shape
    kind: Kind


CASES: dict[str, Case] = {
    "demo-e2e+ds": Case(DEMO, "e2e+ds"),
    "demo-local": Case(DEMO, "local"),
    "gpt2-L6-local": Case(GPT2_SMALL, "local"),
    "gpt2-L2-e2e+ds": Case(GPT2_SMALL._replace(layer=2), "e2e+ds"),
    "gpt2-L6-e2e+ds": Case(GPT2_SMALL, "e2e+ds"),
    "gpt2-L10-e2e+ds": Case(GPT2_SMALL._replace(layer=10), "e2e+ds"),
    "gpt2-L6-e2e+ds-46080": Case(GPT2_SMALL._replace(d_sae=46080), "e2e+ds"),
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"default: all of {', '.join(CASES)}")
    parser.add_argument("--rounds", type=int, default=7, help="measured steps of each kind (default: %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--memory", action="store_true", help="also the peak memory of each, in processes of their own")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to FILE")
    args = parser.parse_args()
    if unknown := [name for name in args.cases if name not in CASES]:
        parser.error(f"no case is called {', '.join(unknown)}: choose from {', '.join(CASES)}")
    results: list[dict[str, Any]] = []
    for name in args.cases or CASES:
        result = {"case": name, **measure(CASES[name], args.rounds, args.device)}
        if args.memory:
            result["memory"] = {which: peak_of(*CASES[name], which) for which in ("ours", "twin")}
        results.append(result)
        print(line_of(result), flush=True)
        if args.json:
            args.json.write_text(json.dumps({"machine": machine(args.device), "results": results}, indent=2) + "\n")


def measure(case: Case, n_rounds: int, device: str) -> dict[str, Any]:
    """Returns medians, ratios and the share of the arithmetic floor of one case, all from one process."""
    shape, kind = case
    with model_folder(shape) as model, tempfile.TemporaryDirectory() as folder:
        ours, lm = our_step(shape, kind, model, Path(folder), device)
        steps: dict[str, Step] = {
            "ours": ours,
            "twin": plain_step(lm, shape, kind, with_metrics=True),
            "twin_without_metrics": plain_step(lm, shape, kind, with_metrics=False),
        }
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        rates: list[float] = []
        for i in range(N_WARM_UP + n_rounds):
            for name, step in steps.items():
                took = timed(step, device)
                if i >= N_WARM_UP:
                    seconds[name].append(took)
            rates.append(matmul_rate(shape, torch.device(device)))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    # Of each round, so that what else the machine does hits both.
    ratio = statistics.median(t / o for t, o in zip(seconds["twin"], seconds["ours"], strict=True))
    plain_ratio = statistics.median(
        t / o for t, o in zip(seconds["twin_without_metrics"], seconds["ours"], strict=True)
    )
    floor = step_flops(shape, kind) / statistics.median(rates)
    return {
        "seconds": medians,
        "tokens_per_s": shape.n_tokens / medians["ours"],
        "ratio": ratio,
        "ratio_without_metrics": plain_ratio,
        "floor_seconds": floor,
        "share_of_floor": floor / medians["ours"],
        "gflops": statistics.median(rates) / 1e9,
    }


def timed(step: Step, device: str) -> float:
    """Returns the seconds that a step takes."""
    start = time.perf_counter()
    step()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - start


def line_of(result: dict[str, Any]) -> str:
    """Returns a result as one line."""
    text = (
        f"{result['case']:<22} {result['seconds']['ours']:7.3f} s ours, {result['seconds']['twin']:7.3f} s twin: "
        f"{result['ratio']:.2f}x ({result['ratio_without_metrics']:.2f}x without its metrics), "
        f"{result['share_of_floor']:.0%} of the floor, {result['tokens_per_s']:,.0f} tokens/s"
    )
    if "memory" in result:
        ours, twin = (result["memory"][which]["step_mb"] for which in ("ours", "twin"))
        text += f", memory of a step {ours:.0f} MB / {twin:.0f} MB = {ours / twin:.2f}"
    return text


def machine(device: str) -> dict[str, str]:
    """Returns where the numbers come from."""
    import transformer_lens
    import transformers

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "commit": commit.stdout.strip(),
        "processor": platform.processor() or platform.machine(),
        "threads": str(torch.get_num_threads()),
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else "cpu",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "transformer_lens": getattr(transformer_lens, "__version__", "?"),
    }


if __name__ == "__main__":
    main()
