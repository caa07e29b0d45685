"""The files of the hub's repository `apollo-research/e2e-saes-gpt2`: one SAE each, `<name>.pt` and `<name>.yaml`.

Keys: `encoder.weight`, `encoder.bias`, `decoder.weight`, `decoder.bias`, without the position, in torch's orientation;
the position is in the YAML, which is the run's config. The decoder is stored with columns of unit norm. Ours is
normalised in every forward pass: dividing by a norm of 1 +- 1e-7 once more can change the last bits of a
reconstruction, nothing else.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from e2e_sae.checkpoint.records import StoredSAE, stored_relu_sae
from e2e_sae.config import rename_old_keys
from e2e_sae.errors import CheckpointError

OURS = {"encoder.weight": "W_enc", "encoder.bias": "b_enc", "decoder.weight": "W_dec", "decoder.bias": "b_dec"}
"""Their parameter names and ours; weights are transposed."""


def is_paper_hub_sae(state: Mapping[str, Tensor]) -> bool:
    """Says whether a state dict is of this format."""
    return state.keys() == OURS.keys()


def paper_hub_saes(path: Path, state: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, StoredSAE]:
    """Returns the one SAE of a state dict, by position name.

    Args:
        path: the file it comes from, for the message.
        state: see `is_paper_hub_sae`.
        config: the YAML beside it.

    Raises:
        CheckpointError: the config names no position or several, or the shapes do not fit together.
    """
    saes = rename_old_keys(config).get("saes")
    positions = saes.get("sae_positions", []) if isinstance(saes, Mapping) else []
    positions = [positions] if isinstance(positions, str) else list(positions)
    if len(positions) != 1:
        given = f"names {len(positions)} positions: {positions}" if config else "is not there"
        raise CheckpointError(
            f"'{path}' does not say where its SAE sits: expected saes.sae_positions with one hook name in "
            f"'{path.with_suffix('.yaml').name}' beside it, which {given}"
        )
    (name,) = positions
    tensors = {ours: state[theirs].T if state[theirs].ndim == 2 else state[theirs] for theirs, ours in OURS.items()}
    return {name: stored_relu_sae(path, name, tensors)}
