"""A mode that finds, without a GPU, what would make the host wait for one.

It sees operators. `tolist()`, `numpy()` and copies between host and device are none where everything is on the CPU;
`torch.cuda.set_sync_debug_mode` finds those, on a GPU.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

WAITING = frozenset(
    {
        # A value is needed: .item(), bool(), int(), float(), `if tensor`.
        "_local_scalar_dense", "is_nonzero", "equal",
        # The shape of the result is.
        "nonzero", "masked_select", "argwhere", "_unique2", "unique_dim", "unique_consecutive", "bincount",
        "repeat_interleave",
        "lift_fresh",  # a literal is made on the host and copied over
    }
)  # fmt: skip
"""Operators that make a GPU's user wait."""


class HostSync(AssertionError):
    """An operator that waits for the device was called where none may be."""


class NoHostSyncs(TorchDispatchMode):
    """Raises `HostSync` at the first operator that waits for the device, in forward and backward passes."""

    def __init__(self) -> None:
        super().__init__()
        self.n_calls = 0
        """Operators seen."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.n_calls += 1
        name = func.overloadpacket.__name__
        empty = name == "lift_fresh" and args[0].numel() == 0  # nothing to copy
        if (name in WAITING and not empty) or _indexes_by_mask(name, args):
            raise HostSync(f"{func} waits for the device")
        return func(*args, **(kwargs or {}))


def _indexes_by_mask(name: str, args: Sequence[Any]) -> bool:
    if name not in ("index", "index_put", "index_put_", "_unsafe_index", "_index_put_impl_"):
        return False
    return any(isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in args[1])
