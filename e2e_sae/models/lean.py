"""Loading a language model without second copies of its weights: at the peak, and afterwards.

TransformerLens processes weights in steps that each copy all of them, one step after the other, and a bridge keeps
the joint query-key-value weights that it has replaced by three of its own. Nothing here changes a number.
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


@contextmanager
def lazy_copies() -> Iterator[None]:
    """Makes `tensor.clone()` copy when the copy or its source is first written to, while the block is open.

    Where torch cannot (tensors that lie in a mapped file, a torch without copy-on-write), it copies as ever.
    """
    with _LazyClones() if hasattr(torch, "_lazy_clone") else nullcontext():
        yield


def own_memory_(model: nn.Module) -> None:
    """Moves weights that lie in a mapped file into memory, where `lazy_copies` can share them."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()


def settle_(model: nn.Module) -> None:
    """Frees what loading has left behind: weights that nothing computes with any more, and unused memory."""
    for block in getattr(model, "blocks", ()):
        _drop_joint_weights_(getattr(block, "attn", None))
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data_ptr()  # ends the sharing of lazy copies; the last owner keeps the memory
    give_back_memory()


def give_back_memory() -> None:
    """Hands memory that is free within this process back to the system, where the C library can (glibc)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


class _LazyClones(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.clone and len(args) == 1 and not kwargs:
            try:
                return torch._lazy_clone(args[0])  # pyright: ignore[reportPrivateImportUsage]
            except RuntimeError:  # not torch's own memory
                pass
        return func(*args, **(kwargs or {}))


def _drop_joint_weights_(attn: Any) -> None:
    """Empties the joint projection of a bridge that computes with q, k and v of its own, unless they are its views."""
    joint = getattr(getattr(attn, "qkv", None), "original_component", None)
    if joint is None or not all(hasattr(attn, name) for name in "qkv"):
        return
    place = _storage(joint.weight)
    if any(_storage(getattr(attn, name).weight) == place for name in "qkv"):
        return
    # None, not zeros: whoever computes with them is told.
    joint.weight = joint.bias = None


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
