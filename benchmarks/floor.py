"""The arithmetic that a step cannot do without, against the rate at which this machine multiplies matrices now.

Only matrix products count. Per token, one with a [n, m] matrix takes 2 n m operations; causal attention multiplies
half of each [T, T] matrix. Products whose result nobody needs are not counted: gradients of the frozen weights and of
the SAE's input, and what a spliced pass has in common with the clean one.
"""

import statistics
import time
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch

from e2e_sae.ops.products import is_for_onednn, multiply

from .shapes import Kind, Shape

Products = Literal["float32", "tf32", "bfloat16", "float64"]
"""Type of the inputs of matrix products."""
PEAK_SIZE = {"cuda": 8192, "cpu": 2048}
"""Side of the square product that the machine's peak is measured on: large enough that no larger one is faster."""


class Work(NamedTuple):
    """Operations of one step."""

    shared: float
    """Once for all members: the clean pass."""
    own: float
    """Of each member: SAE, spliced pass, backward."""

    def of(self, n_members: int = 1) -> float:
        """Returns the operations of a step of so many members."""
        return self.shared + n_members * self.own


def step_work(shape: Shape, kind: Kind) -> Work:
    """Returns the operations of a step's matrix products.

    A local step: the blocks below the SAE (clean), and the SAE. Others: all blocks and the unembedding clean; those
    above the SAE and the unembedding once more (spliced), and once backward; the SAE.
    """
    n = shape.n_tokens
    weights, attention = block_work(shape)
    block, sae = weights + attention, sae_work(shape)
    if kind == "local":
        return Work(n * shape.layer * block, n * sae)
    # Backward: one product for each with weights, two for each of attention's two.
    above = (shape.n_layers - shape.layer) * (block + weights + 2 * attention)
    unembedding = 2 * shape.d_model * shape.d_vocab
    return Work(n * (shape.n_layers * block + unembedding), n * (above + 2 * unembedding + sae))


def block_work(shape: Shape) -> tuple[float, float]:
    """Returns the forward operations per token of a block: products with its weights, and those of its attention.

    Weights: queries and output [d, heads x d_head], keys and values [d, kv_heads x d_head]; the MLP's two matrices
    [d, d_mlp], three if it is gated (Llama). Attention: scores and their weighted sum of values, T/2 tokens each.
    """
    d, d_head = shape.d_model, shape.d_model // shape.n_heads
    projections = 2 * d * d_head * (shape.n_heads + shape.n_kv_heads)
    mlp = (3 if shape.style == "llama" else 2) * d * shape.d_mlp
    return 2.0 * (projections + mlp), 2.0 * shape.n_ctx * shape.n_heads * d_head


def sae_work(shape: Shape) -> float:
    """Returns the operations per token of an SAE's step: two products forward, two for its weights' gradients, one for
    the latents'."""
    return 5 * 2.0 * shape.d_model * shape.d_sae


def matmul_rate(shape: Shape, device: torch.device, products: Products = "float32") -> float:
    """Returns operations per second of the model's largest hidden product, [tokens, d] with [d, d_mlp], by the faster
    of torch's libraries."""
    return _rate(shape.n_tokens, shape.d_model, shape.d_mlp, device, products)


def peak_rate(device: torch.device, products: Products = "float32") -> float:
    """Returns operations per second of a large square product."""
    n = PEAK_SIZE[device.type]
    return _rate(n, n, n, device, products)


def _rate(n: int, k: int, m: int, device: torch.device, products: Products, n_rounds: int = 9) -> float:
    dtype = {"tf32": torch.float32}.get(products) or getattr(torch, products)
    # The second as a linear layer has it, [out, in].
    a, b = torch.randn(n, k, device=device).to(dtype), torch.randn(m, k, device=device).to(dtype).T
    c = a @ b
    run = (lambda: multiply(a, b)) if is_for_onednn(a, b) else (lambda: torch.mm(a, b, out=c))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if products == "tf32" else "highest")
    try:
        seconds = [_seconds(run, device) for _ in range(n_rounds + 2)]
    finally:
        torch.set_float32_matmul_precision(before)
    return 2.0 * n * k * m / statistics.median(seconds[2:])


def _seconds(run: Callable[[], object], device: torch.device, n_times: int = 4) -> float:
    synchronize(device)
    start = time.perf_counter()
    for _ in range(n_times):
        run()
    synchronize(device)
    return (time.perf_counter() - start) / n_times


def synchronize(device: torch.device) -> None:
    """Waits until the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
