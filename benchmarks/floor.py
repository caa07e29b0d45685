"""The arithmetic that a step cannot do without, against the rate at which this machine multiplies matrices now."""

import statistics
import time

import torch

from benchmarks.shapes import Kind, Shape


def step_flops(shape: Shape, kind: Kind) -> float:
    """Returns the floating-point operations of a step's matrix products.

    Per token, a product with a [n, m] matrix takes 2 n m. A block of GPT-2 has 12 d^2 weights, and its causal
    attention 2 T d operations more. Blocks below the SAE run once (clean); those above twice and once backward,
    without gradients of weights. The SAE: two products forward, two for its weights' gradients, one for the
    latents' (its input needs none). The unembedding: clean, spliced, backward.
    """
    d, T = shape.d_model, shape.n_ctx
    block = 24 * d * d + 2 * T * d
    n_above = shape.n_layers - shape.layer
    sae = 5 * 2 * d * shape.d_sae
    if kind == "local":
        return shape.n_tokens * (shape.layer * block + sae)
    backward = n_above * (24 * d * d + 4 * T * d)
    unembedding = 3 * 2 * d * shape.d_vocab
    return shape.n_tokens * (shape.n_layers * block + n_above * block + backward + sae + unembedding)


def matmul_rate(shape: Shape, device: torch.device, n: int = 9) -> float:
    """Returns operations per second of the model's largest hidden product, the median of `n`."""
    a = torch.randn(shape.n_tokens, shape.d_model, device=device)
    b = torch.randn(shape.d_model, 4 * shape.d_model, device=device)
    c = a @ b
    seconds: list[float] = []
    for _ in range(n + 2):
        start = time.perf_counter()
        for _ in range(4):
            torch.mm(a, b, out=c)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append((time.perf_counter() - start) / 4)
    return 2 * a.numel() * b.shape[1] / statistics.median(seconds[2:])
