"""In which numbers a run multiplies matrices: all of float32, TF32, or bfloat16 (autocast). Nothing else changes type.

Under autocast the products of the language model and of the SAEs take bfloat16 inputs and add up in float32; the SAEs'
parameters, their gradients and the optimizer stay float32, and so do softmaxes, losses and statistics, which never
were products. A float32 model then keeps its residual stream in float32; with `dtype: bfloat16` that is rounded too.

bfloat16 has float32's range, so that no gradient vanishes and none is scaled; float16 has not, and is not offered.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch

from e2e_sae.compiling import compiling


class Arithmetic(NamedTuple):
    """How a run computes what it computes."""

    autocast: Literal["bfloat16"] | None = None
    """Type of the inputs of matrix products; None: that of the tensors themselves."""
    tf32: bool = False
    """Whether a GPU may round the inputs of float32 products to 10 bits of mantissa; False: it may not."""
    compile: bool = False
    """Whether the functions marked `compilable` are compiled."""


@contextmanager
def computing(arithmetic: Arithmetic, device: torch.device) -> Iterator[None]:
    """Computes that way on that device while the block is open, and as before afterwards."""
    # No cache of casts: it would outlive an optimizer step, and a weight is cast once in a pass anyway.
    autocast = torch.autocast(
        device.type, dtype=torch.bfloat16, enabled=arithmetic.autocast is not None, cache_enabled=False
    )
    with _float32_products(arithmetic.tf32, device), autocast, compiling(arithmetic.compile):
        yield


@contextmanager
def plainly(device: torch.device) -> Iterator[None]:
    """Computes in the tensors' own types, with all of float32 and uncompiled, while the block is open: for checks that
    compare two ways of computing the same."""
    with computing(Arithmetic(), device):
        yield


@contextmanager
def _float32_products(tf32: bool, device: torch.device) -> Iterator[None]:
    if device.type != "cuda":
        yield
        return
    before = _product_settings()
    # Of torch's three ways the one that every version has, that warns in none, and that its compiler can read back.
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    try:
        yield
    finally:
        _restore_product_settings(before)


def _product_settings() -> tuple[str | None, list[str]]:
    try:
        overall = torch.get_float32_matmul_precision()
    except RuntimeError:  # somebody has set a backend's own
        overall = None
    return overall, [str(backend.fp32_precision) for backend in _backends()]


def _restore_product_settings(settings: tuple[str | None, list[str]]) -> None:
    overall, own = settings
    if overall is not None:
        torch.set_float32_matmul_precision(overall)
    for backend, precision in zip(_backends(), own, strict=True):
        backend.fp32_precision = precision


def _backends() -> list[Any]:
    """Returns what `set_float32_matmul_precision` sets one by one, since torch 2.9."""
    backends: list[Any] = [torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)]
    return backends if hasattr(torch.backends, "fp32_precision") else []
