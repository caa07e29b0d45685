"""The paper's library's files: `samples_<n>.pt` (a state dict of all SAEs) beside `final_config.yaml`.

Keys: `<hook name with . as ->.{encoder.0.weight, encoder.0.bias, decoder.weight, decoder.bias}`, in torch's
orientation ([out, in]); the decoder is stored as trained, not normalised.
"""

import re
from pathlib import Path

from torch import Tensor

from e2e_sae.checkpoint.files import read_pickled_tensors
from e2e_sae.checkpoint.records import StoredSAE, StoredSAEInfo
from e2e_sae.errors import CheckpointError

_KEY = re.compile(r"^(?P<sae>.+)\.(?P<name>encoder\.0\.weight|encoder\.0\.bias|decoder\.weight|decoder\.bias)$")
OURS = {
    "encoder.0.weight": "W_enc",
    "encoder.0.bias": "b_enc",
    "decoder.weight": "W_dec",
    "decoder.bias": "b_dec",
}
"""Their parameter names and ours; weights are transposed."""


def read_legacy_saes(path: Path) -> dict[str, StoredSAE]:
    """Returns the SAEs of a `.pt` by position name.

    Raises:
        CheckpointError: damaged, unsafe, not such a file, or shapes that do not fit together.
    """
    state = read_pickled_tensors(path)
    if not isinstance(state, dict) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise CheckpointError(f"'{path}' holds no state dict of SAEs: expected a mapping from names to tensors")
    by_sae: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        match = _KEY.match(str(key))
        if match is None:
            raise CheckpointError(
                f"'{path}' holds no SAEs: unexpected key '{key}', expected '<position>.encoder.0.weight' and so on"
            )
        name = OURS[match["name"]]
        by_sae.setdefault(match["sae"], {})[name] = tensor.T if tensor.ndim == 2 else tensor
    return {sae.replace("-", "."): _checked(path, sae.replace("-", "."), tensors) for sae, tensors in by_sae.items()}


def _checked(path: Path, name: str, tensors: dict[str, Tensor]) -> StoredSAE:
    missing = [theirs for theirs, ours in OURS.items() if ours not in tensors]
    if missing:
        raise CheckpointError(f"'{path}': the SAE at {name} lacks {', '.join(missing)}")
    d_in, d_sae = tensors["W_enc"].shape
    expected = {"b_enc": (d_sae,), "W_dec": (d_sae, d_in), "b_dec": (d_in,)}
    for parameter, shape in expected.items():
        if tuple(tensors[parameter].shape) != shape:
            raise CheckpointError(
                f"'{path}': the SAE at {name} has {parameter} {list(tensors[parameter].shape)}, expected {list(shape)}"
            )
    dtype = str(tensors["W_enc"].dtype).removeprefix("torch.")
    info = StoredSAEInfo(architecture="relu", read=name, write=name, d_in=d_in, d_sae=d_sae, dtype=dtype)
    return StoredSAE(info, tensors)
