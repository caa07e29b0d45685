"""`python -m benchmarks.products`: float32 products on a CPU by torch's default library and by oneDNN, in turns.

Shapes of GPT-2 small on 1,024 tokens, and of a smaller model.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from e2e_sae.ops.products import multiply_by_onednn

SHAPES = (
    (1024, 768, 768), (1024, 768, 3072), (1024, 3072, 768), (1024, 768, 6144), (6144, 1024, 768),
    (166, 768, 50257), (166, 50257, 768), (1024, 128, 512), (1024, 64, 192), (64, 64, 64),
)  # fmt: skip
"""(n, k, m): [n, k] times [k, m]."""


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.products", description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, GFLOP/s and error against float64")
    print("| n, k, m | torch | oneDNN | ratio | torch's error | oneDNN's error |")
    print("|---|---|---|---|---|---|")
    for n, k, m in SHAPES:
        a, b = torch.randn(n, k), torch.randn(m, k).T
        ways: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"torch": torch.mm, "onednn": multiply_by_onednn}
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(args.rounds + 2):
            for name, way in ways.items():
                start = time.perf_counter()
                way(a, b)
                seconds[name].append(time.perf_counter() - start)
        rates = {name: 2 * n * k * m / statistics.median(values[2:]) / 1e9 for name, values in seconds.items()}
        exact = a.double() @ b.double()
        errors = {name: float((way(a, b) - exact).norm() / exact.norm()) for name, way in ways.items()}
        print(
            f"| {n}, {k}, {m} | {rates['torch']:.0f} | {rates['onednn']:.0f} | {rates['onednn'] / rates['torch']:.2f} "
            f"| {errors['torch']:.1e} | {errors['onednn']:.1e} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
