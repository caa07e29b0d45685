"""What every checkpoint format is read into: configs and named tensors, nothing that runs."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt, model_validator
from torch import Tensor

from e2e_sae.acts import Position
from e2e_sae.base_config import BaseConfig
from e2e_sae.errors import CheckpointError
from e2e_sae.models.lm_config import ProcessingConfig
from e2e_sae.saes import SAEConfig

FORMAT_VERSION = 2
"""2: SAEs have options. 1: they are all of the paper's kind."""

HELD_OUT = "held-out data"
"""What latents are counted on where a run is evaluated."""
PAPERS_OPTIONS = SAEConfig().to_dict()
"""Options of the paper's SAEs."""
_NOT_IN_FORWARD = {"decoder_init", "encoder_init", "b_dec_init", "input_norm"}
"""Options that matter at the start of training only."""


class StoredModel(BaseConfig):
    """The language model that SAEs were trained on, exactly enough to load it again."""

    name: str | None = None
    """Name on the hub."""
    path: str | None = None
    """Local folder or `.pt`, absolute."""
    revision: str | None = None
    """Git revision on the hub."""
    checkpoint: NonNegativeInt | None = None
    """Training step."""
    model_class: str
    """`hooked` or `bridge`."""
    processing: ProcessingConfig | None
    """Weight processing; None for a model used as stored."""
    dtype: str
    """Type of the frozen model."""
    d_model: PositiveInt
    """Width of the residual stream."""
    n_layers: PositiveInt
    """Blocks."""
    d_vocab: PositiveInt
    """Vocabulary."""


class StoredSAEInfo(BaseConfig):
    """One SAE, without its tensors."""

    architecture: str
    """Name in `saes.ARCHITECTURES`, or `/path/my_file.py:ClassName`."""
    read: str
    """Hook point it reads."""
    write: str
    """Hook point it writes."""
    d_in: PositiveInt
    """Width of the activation."""
    d_out: PositiveInt | None = None
    """Width of the activation that a transcoder writes; null: `d_in`."""
    d_sae: PositiveInt
    """Number of latents."""
    options: dict[str, Any] = {}
    """Its config, with every default; empty: the paper's."""
    dtype: str = "float32"
    """Type of the parameters."""
    scales: tuple[PositiveFloat, PositiveFloat] = (1.0, 1.0)
    """What activations were multiplied by in training, where it reads and where it writes. The tensors are for
    activations as they are."""

    @model_validator(mode="before")
    @classmethod
    def _without_keys_of_version_1(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        # They had one value each, which is the default of the options.
        old = ("subtract_pre_encoder_bias", "decoder_norm", "input_normalisation", "run_state")
        return {key: value for key, value in values.items() if key not in old}

    @property
    def is_the_papers(self) -> bool:
        """Whether it is an SAE as the paper's library has them."""
        options = {key: value for key, value in self.options.items() if key not in _NOT_IN_FORWARD}
        return self.architecture == "relu" and self.read == self.write and options.items() <= PAPERS_OPTIONS.items()

    @property
    def width_out(self) -> int:
        """Width of what it writes."""
        return self.d_in if self.d_out is None else self.d_out

    @property
    def position(self) -> Position:
        """Where it sits."""
        return Position(self.read, self.write)


class CheckpointInfo(BaseConfig):
    """`checkpoint.json`: everything needed to use the tensors beside it."""

    format_version: int = FORMAT_VERSION
    """Raised when a reader of an older version would misread."""
    library_version: str
    """Version of this package that wrote it."""
    n_samples: NonNegativeInt
    """Sequences trained on."""
    n_steps: NonNegativeInt
    """Optimizer steps made."""
    model: StoredModel
    """The language model."""
    saes: dict[str, StoredSAEInfo]
    """By position name."""
    firing_data: str
    """What `firing.safetensors` counts on: `HELD_OUT` if the run was evaluated here, else a window of training data,
    which may lie far back."""
    firing_n_tokens: NonNegativeInt
    """Tokens it counts over."""
    files: dict[str, dict[str, int]]
    """Size and CRC-32 of each file of the folder."""


@dataclass(frozen=True)
class StoredSAE:
    """One SAE as read from any format."""

    info: StoredSAEInfo
    """What it is."""
    tensors: dict[str, Tensor]
    """W_enc [d_in, d_sae], b_enc [d_sae], W_dec [d_sae, d_out], b_dec [d_out], and what else the architecture has."""


def stored_relu_sae(source: Path, name: str, tensors: dict[str, Tensor]) -> StoredSAE:
    """Returns an SAE of the paper's kind, made of W_enc, b_enc, W_dec and b_dec from a foreign file.

    Args:
        source: the file, for the message.
        name: hook point that it reads and writes.
        tensors: in our names and orientation.

    Raises:
        CheckpointError: shapes that do not fit together.
    """
    if tensors["W_enc"].ndim != 2:
        raise CheckpointError(f"'{source}': the SAE at {name} has an encoder weight that is no matrix")
    d_in, d_sae = tensors["W_enc"].shape
    expected = {"b_enc": (d_sae,), "W_dec": (d_sae, d_in), "b_dec": (d_in,)}
    for parameter, shape in expected.items():
        if tuple(tensors[parameter].shape) != shape:
            raise CheckpointError(
                f"'{source}': the SAE at {name} has {parameter} {list(tensors[parameter].shape)}, "
                f"expected {list(shape)}"
            )
    dtype = str(tensors["W_enc"].dtype).removeprefix("torch.")
    info = StoredSAEInfo(architecture="relu", read=name, write=name, d_in=d_in, d_sae=d_sae, dtype=dtype)
    return StoredSAE(info, tensors)


@dataclass(frozen=True)
class StoredRun:
    """A trained run as read from any format."""

    source: Path
    """The file or folder it came from."""
    saes: dict[str, StoredSAE]
    """By position name, in the model's order."""
    model: StoredModel | None
    """None where the format does not say."""
    config: dict[str, Any]
    """`final_config.yaml` as it stands; empty where there is none."""
    n_samples: int | None
    """Sequences trained on, where known."""
