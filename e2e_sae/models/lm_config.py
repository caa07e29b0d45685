"""Which language model a run uses, and how its weights are processed: part of a checkpoint's identity.

No torch and no TransformerLens here: `lm.py` does the loading.
"""

from typing import Literal

from pydantic import NonNegativeInt, model_validator

from e2e_sae.base_config import BaseConfig
from e2e_sae.types import InputPath, StrDtype

ModelClass = Literal["auto", "hooked", "bridge"]
"""`hooked`: HookedTransformer (TransformerLens 3.x); `bridge`: TransformerBridge; `auto`: by version."""


class ProcessingConfig(BaseConfig):
    """Changes of the weights that leave the log-probabilities alone; the defaults are TransformerLens'.

    SAEs see the processed activations: one trained with other options does not fit. A legacy `.pt` is never
    processed. TransformerLens itself leaves out what a family cannot have (folding where a norm comes after
    its sublayer, centring the unembedding before a logit soft cap).
    """

    fold_ln: bool = True
    """Fold each LayerNorm's weight and bias into the linear map that follows."""
    center_writing_weights: bool = True
    """Give every map that writes to the residual stream mean zero over d_model (LayerNorm models only)."""
    center_unembed: bool = True
    """Give the unembedding mean zero over the vocabulary (changes logits, not log-probabilities)."""
    fold_value_biases: bool = True
    """Move the value biases into the attention output bias."""
    refactor_factored_attn_matrices: bool = False
    """Replace QK and OV by their singular value decompositions."""

    @property
    def is_raw(self) -> bool:
        """True if nothing is changed: activations are those of the plain Hugging Face model."""
        return not any(self.model_dump().values())


class LMConfig(BaseConfig):
    """A language model from the hub, from a local Hugging Face folder, or from a legacy `.pt` file."""

    tlens_model_name: str | None = None
    """Name on the Hugging Face hub, such as `gpt2`: any model that TransformerLens can load."""
    tlens_model_path: InputPath | None = None
    """A Hugging Face model folder, or a `.pt` state dict with `final_config.yaml` beside it."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    checkpoint_index: NonNegativeInt | None = None
    """Which of the training checkpoints that TransformerLens knows for the model (Pythia, stanford-crfm)."""
    checkpoint_value: NonNegativeInt | None = None
    """The same, by training step."""
    tlens_model_class: ModelClass = "auto"
    """TransformerLens' class: `hooked` exists in 3.x only; `auto` takes it there, and the bridge in 4.x."""
    processing: ProcessingConfig = ProcessingConfig()
    """Weight processing; unused for a legacy `.pt`, whose weights are taken as stored."""
    dtype: StrDtype = "float32"
    """Dtype of weights and activations."""

    @model_validator(mode="after")
    def _one_source(self) -> "LMConfig":
        if (self.tlens_model_name is None) == (self.tlens_model_path is None):
            given = "neither" if self.tlens_model_name is None else "both"
            raise ValueError(f"exactly one of 'tlens_model_name' and 'tlens_model_path' must be given (given: {given})")
        hub_only = {
            "revision": self.revision,
            "checkpoint_index": self.checkpoint_index,
            "checkpoint_value": self.checkpoint_value,
        }
        chosen = [f"'{key}'" for key, value in hub_only.items() if value is not None]
        if len(chosen) > 1:
            raise ValueError(f"{' and '.join(chosen)} exclude each other: give one")
        if chosen and self.tlens_model_path is not None:
            raise ValueError(f"{chosen[0]} needs 'tlens_model_name': a local model has one version only")
        return self

    @property
    def source(self) -> str:
        """The hub name or the absolute path, whichever was given."""
        return self.tlens_model_name or str(self.tlens_model_path)
