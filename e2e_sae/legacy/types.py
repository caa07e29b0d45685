"""`e2e_sae.types` of the paper's library, for configs that users wrote with it."""

from pathlib import Path
from typing import Annotated, Any, TypedDict, get_args

import torch
from pydantic import BeforeValidator, InstanceOf, PlainSerializer
from torch import Tensor

from e2e_sae.settings import REPO_ROOT
from e2e_sae.types import StrDtype

TORCH_DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in get_args(StrDtype)}
"""Dtypes by name."""


class Samples(TypedDict):
    """A batch of a tokenised data set."""

    input_ids: Tensor
    """[batch, pos]."""


def to_root_path(path: str | Path) -> Path:
    """Returns the path; a relative one begins at the repository."""
    return Path(path) if Path(path).is_absolute() else REPO_ROOT / path


def _to_dtype(value: Any) -> torch.dtype:
    if isinstance(value, torch.dtype):
        return value
    if value not in TORCH_DTYPES:
        raise ValueError(f"no dtype is called {value!r}: expected one of {', '.join(TORCH_DTYPES)}")
    return TORCH_DTYPES[value]


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


TorchDtype = Annotated[
    InstanceOf[torch.dtype], BeforeValidator(_to_dtype), PlainSerializer(_dtype_name, when_used="json")
]
"""In a config: a dtype, or its name; in JSON its name."""

RootPath = Annotated[Path, BeforeValidator(to_root_path), PlainSerializer(str)]
"""In a config: a path, relative to the repository; dumped as a string."""
