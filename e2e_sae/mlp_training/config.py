"""The YAML of `run_train_mnist.py`, `train_mnist_saes.py` and `max_act_data_mnist.py`.

The paper's library's keys keep their names; `data`, `p_norm` and most of `infer` are ours, with defaults.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PlainSerializer,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from e2e_sae.base_config import BaseConfig
from e2e_sae.data.images import DIGITS, ImageSource
from e2e_sae.settings import REPO_ROOT
from e2e_sae.types import InputPath, OutputPath, path_candidates


def _saved_run(given: Path, info: Any) -> Path:
    named = [path_candidates(path, info) for path in (given, Path("models") / given)]
    places = dict.fromkeys([*named[0], *named[1], REPO_ROOT / "models" / given])
    for place in places:
        if place.is_dir():
            return place
    looked = ", ".join(f"'{place}'" for place in places)
    raise ValueError(f"no such run folder: '{given}' (looked at {looked})")


SavedRun = Annotated[Path, AfterValidator(_saved_run), PlainSerializer(str)]
"""A run's folder by its path, or by its name in `models/`; stored absolute."""


class LoopConfig(BaseConfig):
    """How something is trained with Adam."""

    learning_rate: PositiveFloat
    """Constant."""
    batch_size: PositiveInt
    """Images per step; the last batch of an epoch may be smaller."""
    n_epochs: PositiveInt
    """Passes over the training images."""
    save_dir: OutputPath = Field(default="out", validate_default=True)  # pyright: ignore
    """Folder in which the run's own folder is made."""


class MLPModelConfig(BaseConfig):
    """The MLP's shape; input and output follow the data."""

    hidden_sizes: list[PositiveInt] | None
    """Width of each hidden layer; null: none."""


class MLPConfig(BaseConfig):
    """An MLP to be trained on images."""

    seed: NonNegativeInt = 0
    """Seed of weights and order."""
    data: ImageSource = DIGITS
    """`digits` (scikit-learn's, 8 x 8), `hub` (MNIST), an .npz file, or a folder of MNIST's idx files."""
    model: MLPModelConfig
    """The MLP."""
    train: LoopConfig
    """How it is trained."""
    wandb_project: str | None = None
    """W&B project; null: `metrics.jsonl` only."""

    @property
    def run_name(self) -> str:
        """The paper's library's name for the run."""
        hidden = "-".join(str(size) for size in self.model.hidden_sizes or []) or "None"
        return f"orig-train-lr-{self.train.learning_rate}_bs-{self.train.batch_size}_hidden-{hidden}"


class SparsifierTrainConfig(LoopConfig):
    """What the sparsifiers are, and how they are trained."""

    type_of_sparsifier: Literal["sae", "codebook"] = "sae"
    """ReLU SAEs, or codebooks (arXiv 2310.17230)."""
    sparsity_lambda: NonNegativeFloat = 0.005
    """SAEs only: weight of the sparsity term."""
    p_norm: PositiveFloat = 0.6
    """SAEs only: p of the sparsity term's Lp norm (the paper's library's constant)."""
    dict_eles_to_input_ratio: PositiveFloat = 10.0
    """Dictionary elements per unit of a layer's width, rounded down."""
    sparsifier_in_out_recon_loss_scale: NonNegativeFloat = 0.0
    """Weight of the mean square between each sparsifier's output and its own input."""
    k: PositiveInt | None = None
    """Codebooks only: how many codes are summed."""

    @model_validator(mode="after")
    def _check_k(self) -> "SparsifierTrainConfig":
        if self.type_of_sparsifier == "codebook" and self.k is None:
            raise ValueError("train.type_of_sparsifier 'codebook' needs train.k, the number of codes that are summed")
        return self


class MLPSAEsConfig(BaseConfig):
    """Sparsifiers to be trained on a saved MLP."""

    seed: NonNegativeInt = 0
    """Seed of weights and order."""
    data: ImageSource | None = None
    """As in the MLP's config; null: what the MLP was trained on."""
    saved_model_dir: InputPath | None = None
    """Run folder of the MLP; null: one is trained first, with the defaults of `run_train_mnist.py`."""
    train: SparsifierTrainConfig
    """The sparsifiers."""
    wandb_project: str | None = None
    """W&B project; null: `metrics.jsonl` only."""

    @property
    def run_name(self) -> str:
        """The paper's library's name for the run."""
        train = self.train
        return f"sae_lambda-{train.sparsity_lambda}_lr-{train.learning_rate}_bs-{train.batch_size}"


class InferConfig(BaseConfig):
    """Whose dictionary elements are looked at, and on what."""

    batch_size: PositiveInt = 1024
    """Images at a time; has no influence on the result."""
    model_name: SavedRun | None = None
    """Run folder of `train_mnist_saes.py`, or its name in `models/`; null: one is trained first, with defaults."""
    save_dir: OutputPath = Field(default="out", validate_default=True)  # pyright: ignore
    """Folder in which the results' own folder is made."""
    split: Literal["train", "valid", "test"] = "train"
    """Which part of the data."""
    n_top_images: PositiveInt = 10
    """Images that are kept for each element, the strongest first."""
    n_elements_shown: PositiveInt = 12
    """Elements in each layer's picture, the most often active first."""


class MaxActConfig(BaseConfig):
    """Which images the dictionary elements of trained sparsifiers react to."""

    seed: NonNegativeInt = 0
    """Seed of the runs that are trained first; without them, nothing here is random."""
    data: ImageSource | None = None
    """As in the MLP's config; null: what the sparsifiers were trained on."""
    model: MLPModelConfig | None = None
    """Checked against the saved model where it is given."""
    infer: InferConfig = InferConfig()
    """The rest."""

    @property
    def hidden_sizes(self) -> list[int] | None:
        """What `model` says; None if it says nothing."""
        return None if self.model is None else self.model.hidden_sizes or []
