"""The paper's library's files: `samples_<n>.pt` (a state dict of all SAEs) beside `final_config.yaml`.

Keys: `<hook name with . as ->.{encoder.0.weight, encoder.0.bias, decoder.weight, decoder.bias}`, in torch's
orientation ([out, in]); the decoder is stored as trained, not normalised.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from e2e_sae.checkpoint.files import new_file, write_pickled
from e2e_sae.checkpoint.records import StoredSAE, stored_relu_sae
from e2e_sae.errors import CheckpointError
from e2e_sae.saes.base import LEGACY_NAMES

_KEY = re.compile(r"^(?P<sae>.+)\.(?P<name>encoder\.0\.weight|encoder\.0\.bias|decoder\.weight|decoder\.bias)$")


def legacy_saes(path: Path, state: Mapping[str, Tensor]) -> dict[str, StoredSAE]:
    """Returns the SAEs of a state dict by position name.

    Args:
        path: the file it comes from, for the message.
        state: see `files.read_state_dict`.

    Raises:
        CheckpointError: not such a state dict, or shapes that do not fit together.
    """
    by_sae: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        match = _KEY.match(key)
        if match is None:
            raise CheckpointError(
                f"'{path}' holds no SAEs: unexpected key '{key}', expected '<position>.encoder.0.weight' and so on"
            )
        name = LEGACY_NAMES[match["name"]]
        by_sae.setdefault(match["sae"].replace("-", "."), {})[name] = tensor.T if tensor.ndim == 2 else tensor
    for name, tensors in by_sae.items():
        missing = [theirs for theirs, ours in LEGACY_NAMES.items() if ours not in tensors]
        if missing:
            raise CheckpointError(f"'{path}': the SAE at {name} lacks {', '.join(missing)}")
    return {name: stored_relu_sae(path, name, tensors) for name, tensors in by_sae.items()}


def legacy_state_dict(saes: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Returns our parameters under the paper's library's keys, on the CPU, in memory of their own.

    Args:
        saes: W_enc, b_enc, W_dec and b_dec by position name.
    """
    return {
        f"{name.replace('.', '-')}.{theirs}": _transposed_copy(tensors[ours])
        for name, tensors in saes.items()
        for theirs, ours in LEGACY_NAMES.items()
    }


def write_legacy_saes(path: Path, saes: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Writes a `.pt` that the paper's library reads, at once.

    Args:
        path: `samples_<n>.pt`.
        saes: W_enc, b_enc, W_dec and b_dec by position name.

    Raises:
        OSError: the disk is full or cannot be written; nothing is left then.
    """
    with new_file(path) as temporary:
        write_pickled(temporary, legacy_state_dict(saes))


def _transposed_copy(tensor: Tensor) -> Tensor:
    """Returns the tensor on the CPU, a weight in the other orientation, in memory of its own.

    (A view would be saved with all of the memory it looks at.)
    """
    tensor = tensor.detach().cpu()
    return (tensor.T if tensor.ndim == 2 else tensor).clone(memory_format=torch.contiguous_format)
