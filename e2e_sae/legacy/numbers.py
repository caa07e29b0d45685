"""The array and seed helpers of `e2e_sae.utils` of the paper's library."""

import random
from typing import Any

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor


def to_numpy(x: Any) -> ndarray:
    """Returns a tensor, list, tuple, number or string as an array.

    Raises:
        ValueError: it is something else.
    """
    if isinstance(x, Tensor):
        x = x.detach().cpu()
        return (x.float() if x.dtype == torch.bfloat16 else x).numpy()
    if isinstance(x, ndarray | np.generic | list | tuple | int | float | complex | str):
        return np.array(x)
    raise ValueError(f"a {type(x).__name__} cannot be made a numpy array: expected a tensor, list, number or string")


def set_seed(seed: int | None) -> None:
    """Seeds torch, numpy and `random`; None leaves them as they are."""
    if seed is not None:
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
