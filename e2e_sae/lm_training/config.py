"""What a language model to be trained is, and how: the YAML of `run_train_tlens.py`.

The paper's library's keys (`seed`, `name`, `tlens_config`, `train`, `wandb_project`) keep their names.
"""

from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from e2e_sae.base_config import BaseConfig
from e2e_sae.data.dataset_config import DatasetConfig
from e2e_sae.types import LocalOrHub, OutputPath


class TokenizerConfig(BaseConfig):
    """A byte-level BPE tokenizer that is trained on the training data."""

    vocab_size: Annotated[int, Field(ge=257)]
    """Entries, the 256 bytes and the special token included."""
    special_token: str = "<|endoftext|>"
    """BOS, EOS and padding in one; its id is 0."""


class LMTrainConfig(BaseConfig):
    """How the model is trained, and what is saved."""

    n_epochs: PositiveInt
    """Passes over the training data."""
    batch_size: PositiveInt
    """Sequences per forward pass."""
    effective_batch_size: PositiveInt | None = None
    """Sequences per optimizer step, a multiple of `batch_size`; null: `batch_size`."""
    lr: PositiveFloat
    """Learning rate at its peak (with `muon`: of the embeddings, gains and biases)."""
    optimizer: Literal["adam", "muon"] = "adam"
    """`muon`: Muon for the hidden matrices and Adam for the rest; learns more from each token."""
    muon_lr: PositiveFloat | None = None
    """`muon` only: learning rate of the hidden matrices at its peak; null: `lr`."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay of the hidden matrices."""
    warmup_samples: NonNegativeInt = 0
    """Samples over which the learning rate rises linearly."""
    cooldown_fraction: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of the run, at its end, over which the learning rate falls linearly to zero."""
    max_grad_norm: PositiveFloat | None = None
    """The gradient is scaled down to this norm; null: never."""
    random_windows: bool = False
    """Local text only: every epoch cuts the token stream at another offset, so that rows differ."""
    compile: bool = False
    """Compiles the loss: needs a C++ compiler and a minute at the start, then runs a fifth faster."""
    log_every_n_steps: PositiveInt = 20
    """Optimizer steps between two lines of `metrics.jsonl`."""
    save_dir: OutputPath = Field(default="out", validate_default=True)  # pyright: ignore
    """Folder in which the run's own folder is made."""
    save_every_n_epochs: PositiveInt | None = None
    """Epochs between two saved and evaluated models; null: only at the end."""
    save_dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Type of the saved weights of a Hugging Face model."""

    @model_validator(mode="after")
    def _check_accumulation(self) -> "LMTrainConfig":
        if self.effective_batch_size is not None and self.effective_batch_size % self.batch_size:
            raise ValueError(
                f"effective_batch_size={self.effective_batch_size} must be a multiple of batch_size={self.batch_size}"
            )
        return self

    @property
    def n_accumulated(self) -> int:
        """Batches per optimizer step."""
        return (self.effective_batch_size or self.batch_size) // self.batch_size


class LMConfig(BaseConfig):
    """A language model to be trained, and its data."""

    name: str
    """What the model is called; the run folder begins with it."""
    seed: NonNegativeInt = 0
    """Seed of everything random."""
    hf_config: dict[str, Any] | None = None
    """Settings of a Hugging Face model, `model_type` among them; vocabulary and special ids come from the
    tokenizer. Either this or `tlens_config`."""
    tlens_config: dict[str, Any] | None = None
    """Fields of TransformerLens' own config (d_model, n_layers, n_ctx, d_head, d_vocab, act_fn, ...) and
    `tokenizer_name`. Either this or `hf_config`."""
    tokenizer: TokenizerConfig | None = None
    """With `hf_config`: a tokenizer to be trained first. Either this or `tokenizer_name`."""
    tokenizer_name: LocalOrHub | None = None
    """With `hf_config`: an existing tokenizer, a folder or a hub name."""
    train_data: DatasetConfig | None = None
    """What is trained on; null: the `train` part of the embedded corpus, or with `tlens_config`, as in the paper's
    library, `NeelNanda/pile-10k` from the hub."""
    eval_data: DatasetConfig | None = None
    """What is evaluated on; null: the `eval` part of the embedded corpus if that is trained on, or what
    `train_data.holdout_fraction` keeps; without either, nothing is evaluated."""
    train: LMTrainConfig
    """How it is trained."""
    wandb_project: str | None = None
    """W&B project; null: `metrics.jsonl` only."""

    @field_validator("tlens_config", mode="before")
    @classmethod
    def _plain(cls, value: Any) -> Any:
        # The paper's library has a config class for it.
        return value.to_dict() if isinstance(value, BaseConfig) else value

    @model_validator(mode="after")
    def _check_model(self) -> "LMConfig":
        if (self.hf_config is None) == (self.tlens_config is None):
            given = "both" if self.hf_config is not None else "neither"
            raise ValueError(f"give exactly one of hf_config and tlens_config (given: {given})")
        if self.tlens_config is not None:
            if self.tokenizer is not None or self.tokenizer_name is not None:
                raise ValueError("with tlens_config, the tokenizer is tlens_config.tokenizer_name")
        elif self.hf_config is not None:
            if (self.tokenizer is None) == (self.tokenizer_name is None):
                raise ValueError("with hf_config, give exactly one of tokenizer and tokenizer_name")
            if "model_type" not in self.hf_config:
                raise ValueError("hf_config needs model_type, e.g. 'gpt2'")
        return self

    @property
    def run_name(self) -> str:
        """The paper's library's name for the run."""
        return f"{self.name}_lr-{self.train.lr}_bs-{self.train.batch_size}"
