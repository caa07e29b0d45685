"""The whole run as data: the model, the SAEs, the losses, the data, the optimisation, what is logged and saved.

Every key of the paper's library is here under its name, with its default; `OLD_KEYS` renames what that
library itself renamed. Keys it did not have are marked (new).
"""

from collections.abc import Mapping
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)

from e2e_sae.base_config import BaseConfig, describe_validation_error
from e2e_sae.data.dataset_config import DatasetConfig
from e2e_sae.dead_latents import DeadLatentsConfig
from e2e_sae.losses import LossConfigs
from e2e_sae.member_overrides import whole_members
from e2e_sae.models.lm_config import LMConfig, ModelClass, ProcessingConfig
from e2e_sae.optim import LRScaling, OptimizerName
from e2e_sae.phase_config import PhaseConfig, check_lengths
from e2e_sae.precision import Arithmetic
from e2e_sae.saes import SAEConfig, architecture_of
from e2e_sae.saes_config import SAEsConfig
from e2e_sae.types import InputPath, OutputPath, StrDtype

OLD_KEYS = {
    "sae_position_name": "saes.sae_positions",
    "sae_position_names": "saes.sae_positions",
    "saes.sae_position_name": "saes.sae_positions",
    "saes.sae_position_names": "saes.sae_positions",
    "loss.inp_to_out": "loss.out_to_in",
    "loss.inp_to_orig": "loss.in_to_orig",
    "loss.in_to_orig.coeff": "loss.in_to_orig.total_coeff",
}
"""Keys in configs of older runs of the paper's library, and what they are called now."""

DROPPED_KEYS = ("collect_output_metrics_every_n_samples", "layerwise", "adam_beta1", "beta1")
"""Keys in configs of older runs that no longer do anything; accepted and ignored."""


Beta = Annotated[float, Field(ge=0, lt=1)]
"""Decay of a running mean, per step."""

MAX_RUN_NAME = 200
"""Characters in a run's name."""


class Config(BaseConfig):
    """A training run."""

    # --- tracking ---
    wandb_project: str | None = None
    """W&B project; null: no W&B. Everything is in the run folder either way."""
    wandb_run_name: str | None = None
    """Name of the run; null: made from the settings."""
    wandb_run_name_prefix: str = ""
    """Put before the name."""

    # --- model ---
    seed: NonNegativeInt = 0
    """Seed of everything random."""
    tlens_model_name: str | None = None
    """A model that TransformerLens can load from the hub. Either this or `tlens_model_path`."""
    tlens_model_path: InputPath | None = None
    """A local Hugging Face folder, or a `.pt` of TransformerLens with `final_config.yaml` beside it."""
    tlens_model_class: ModelClass = "auto"
    """(new) `hooked`: HookedTransformer (TransformerLens 3); `bridge`: TransformerBridge; `auto`: what the
    installed version is built around."""
    tlens_model_revision: str | None = None
    """(new) Git revision of the model on the hub."""
    tlens_model_checkpoint: NonNegativeInt | None = None
    """(new) Training step of a model whose intermediate checkpoints TransformerLens knows (Pythia)."""
    tlens_processing: ProcessingConfig = ProcessingConfig()
    """(new) TransformerLens' weight processing; its defaults are ours."""
    dtype: StrDtype = "float32"
    """(new) Type of the frozen model; SAEs, losses and statistics are float32 (float64 with a float64 model)."""
    autocast: Literal["bfloat16"] | None = None
    """(new) `bfloat16`: the model's and the SAEs' matrix products take bfloat16 inputs; the SAEs' parameters, gradients
    and optimizer, losses and statistics stay float32. null: products in the tensors' own types."""
    tf32: bool = False
    """(new) Whether a GPU may round the inputs of float32 products to TF32; false: exact float32 products."""
    compile: bool = False
    """(new) Whether torch.compile is used for blocks, SAEs and losses; without a working compiler a warning says so."""
    device: str = "auto"
    """(new) `auto` (CUDA if there is one, else CPU), `cpu`, `cuda`, `cuda:1`, `mps`."""
    saes: SAEsConfig
    """The SAEs."""

    # --- data ---
    train_data: DatasetConfig
    """What is trained on."""
    eval_data: DatasetConfig | None = None
    """What is evaluated on; null with `train_data.holdout_fraction`: the part that is held out."""
    n_samples: PositiveInt | None = None
    """Sequences to train on; null: all there are."""
    eval_n_samples: PositiveInt | None = None
    """Sequences per evaluation, rounded up to whole batches; null: all there are."""
    batch_size: PositiveInt
    """Sequences per forward pass, in training and evaluation."""
    effective_batch_size: PositiveInt | None = None
    """Sequences per optimizer step, a multiple of `batch_size`; null: `batch_size`."""

    # --- optimisation ---
    loss: LossConfigs
    """The loss; may be left out where `phases` say all of it."""
    optimizer: OptimizerName = "adam"
    """(new) `adam` as in the paper; `adamw`, `radam`, `signum`, `muon`, `schedulefree_adamw`: their formulas are in
    `update_rules.py`. The last keeps an average, as `ema_decay` does, and goes with `lr_schedule: linear`. `adam8bit`:
    Adam whose moments take a byte a weight instead of four, where bitsandbytes is installed."""
    betas: tuple[Beta, Beta] | None = None
    """(new) Decay of the running means of the gradient and of its square; null: the optimizer's own, (0.9, 0.999), for
    `muon` (0.95, 0.999). `signum` has the first only."""
    weight_decay: NonNegativeFloat | None = None
    """(new) Decoupled weight decay, times the learning rate, not for `adam`; null: 0.01 for `adamw`, else none."""
    lr: PositiveFloat
    """Learning rate of the optimizer, at its peak."""
    lr_scaling: LRScaling = "none"
    """(new) `inverse_sqrt`: each SAE has `lr` times sqrt(2^14 / d_sae) (Gao et al. 2024, arXiv 2406.04093, figure 3);
    what is logged is `lr`."""
    lr_schedule: Literal["linear", "cosine"] = "cosine"
    """After the warm-up: `cosine` falls along half a cosine, `linear` is flat up to the cool-down."""
    min_lr_factor: NonNegativeFloat = 0.1
    """The schedule's end, as a factor of `lr`."""
    warmup_samples: NonNegativeInt = 0
    """Samples over which the learning rate rises."""
    cooldown_samples: NonNegativeInt = 0
    """`linear` only: samples over which the learning rate falls at the end."""
    max_grad_norm: PositiveFloat | None = None
    """The gradient of all SAEs together is scaled down to this norm; null: never."""
    ema_decay: float | None = Field(default=None, gt=0, lt=1)
    """(new) An exponential moving average of the weights (`weight_average.py`) is what is evaluated and saved as the
    SAEs; training goes on with the weights themselves, which `resume.pt` keeps and training metrics show. null: no
    average."""
    dead_latents: DeadLatentsConfig | None = None
    """(new) Counts latents that have stopped firing, and repairs them; null: neither."""

    phases: Annotated[list[PhaseConfig], Field(min_length=1)] | None = None
    """(new) Stretches of the run, one after the other, and what each changes of the loss and the learning rate; null:
    the whole run is one."""

    # --- what is logged and saved ---
    log_every_n_grad_steps: PositiveInt = 20
    """Optimizer steps between two lines of the log."""
    collect_act_frequency_every_n_samples: NonNegativeInt = 20_000
    """Samples between two windows in which the firing of latents is counted; 0: never."""
    act_frequency_n_tokens: PositiveInt = 100_000
    """Tokens in such a window."""
    eval_every_n_samples: NonNegativeInt | None = None
    """Samples between two evaluations (the first batch and the end are evaluated too); 0: only at the end;
    null: never."""
    save_dir: OutputPath | None = Field(default="out", validate_default=True)  # pyright: ignore
    """Folder in which the run's own folder is made; null: nothing is written."""
    save_every_n_samples: PositiveInt | None = None
    """Samples between two checkpoints; null: only at the end."""

    # --- several SAEs over one clean pass ---
    members: list[dict[str, Any]] | None = None
    """(new) Independent runs that share everything else: what each of them changes (`member_overrides.MEMBER_KEYS`).
    Each ends as it would have ended alone, in a folder of its own."""

    # `info` is pydantic's ValidationInfo (`types.py` says why it is Any).
    @model_validator(mode="before")
    @classmethod
    def _accept_old_keys(cls, values: Any, info: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        renamed = rename_old_keys(values)
        if renamed.get("phases") is not None:
            renamed.setdefault("loss", {})
        if renamed.get("members") is not None:
            renamed["members"] = whole_members(cls, renamed, rename_old_keys, info.context)
        return renamed

    @field_validator("autocast", mode="before")
    @classmethod
    def _known_autocast(cls, autocast: Any) -> Any:
        if autocast not in (None, "bfloat16"):
            raise ValueError("expected bfloat16 or null (float16 has not the range for gradients, bfloat16 has)")
        return autocast

    @field_validator("device")
    @classmethod
    def _known_device(cls, device: str) -> str:
        kind, _, index = device.partition(":")
        if kind not in ("auto", "cpu", "cuda", "mps") or (index and not (kind == "cuda" and index.isdigit())):
            raise ValueError("expected auto, cpu, cuda, cuda:<n> or mps")
        return device

    @model_validator(mode="after")
    def _check(self) -> "Config":
        if (self.tlens_model_name is None) == (self.tlens_model_path is None):
            given = "neither" if self.tlens_model_name is None else "both"
            raise ValueError(f"give exactly one of tlens_model_name and tlens_model_path (given: {given})")
        self._check_model_version()
        if self.effective_batch_size is not None and self.effective_batch_size % self.batch_size:
            raise ValueError(
                f"effective_batch_size={self.effective_batch_size} must be a multiple of batch_size={self.batch_size}"
            )
        if self.lr_schedule == "cosine" and self.cooldown_samples:
            raise ValueError(
                f"cooldown_samples={self.cooldown_samples} needs lr_schedule: linear (a cosine has no cool-down)"
            )
        if self.min_lr_factor > 1:
            raise ValueError(f"min_lr_factor={self.min_lr_factor} must be at most 1: it is a factor of lr")
        if self.optimizer == "schedulefree_adamw" and self.ema_decay is not None:
            raise ValueError("optimizer: schedulefree_adamw averages the weights by itself: leave out ema_decay")
        if self.optimizer == "adam" and self.weight_decay:
            raise ValueError(f"weight_decay={self.weight_decay:g} needs optimizer: adamw (adam has none)")
        if self.optimizer == "adam8bit" and self.dtype == "float64":
            raise ValueError("optimizer: adam8bit is for float32 SAEs: choose another optimizer with dtype: float64")
        self._check_dtype()
        self._check_data()
        if self.dead_latents is not None:
            self.dead_latents.check(architecture_of(self.saes.sae.architecture))
        if self.phases is None:
            self._check_loss()
        else:
            check_lengths(self.phases)
            _ = self.phase_configs
        _ = self.lm  # the model's own cross-checks
        return self

    def _check_model_version(self) -> None:
        versions = {
            "tlens_model_revision": self.tlens_model_revision,
            "tlens_model_checkpoint": self.tlens_model_checkpoint,
        }
        chosen = [key for key, value in versions.items() if value is not None]
        if len(chosen) > 1:
            raise ValueError(f"{' and '.join(chosen)} exclude each other: give one")
        if chosen and self.tlens_model_path is not None:
            raise ValueError(f"{chosen[0]} needs tlens_model_name: a local model has one version only")

    def _check_dtype(self) -> None:
        if self.autocast is not None and self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"autocast: {self.autocast} needs dtype: float32 or bfloat16 (given: {self.dtype})")

    def _check_loss(self) -> None:
        sae, target = self.saes.sae, self.loss.sparsity.target_l0
        is_penalty_needed = architecture_of(sae.architecture).is_penalty_needed(sae)
        if target is not None and not is_penalty_needed:
            key = "saes.sae.k" if hasattr(sae, "k") else "the options of saes.sae"
            raise ValueError(
                f"loss.sparsity.target_l0={target:g} moves the weight of a penalty, and that is not what makes SAEs of "
                f"the architecture '{sae.architecture}' sparse: set {key}"
            )
        if "sparsity" not in self.loss.model_fields_set and is_penalty_needed:
            raise ValueError(
                f"missing config key 'loss.sparsity': Lp penalty on the latents; nothing else makes SAEs of the "
                f"architecture '{sae.architecture}' sparse"
            )
        if self.dtype == "float16" and self.loss.needs_downstream:
            raise ValueError(
                "dtype: float16 is for local runs only (the gradients of logits_kl and in_to_orig vanish in it): "
                "use bfloat16"
            )

    def _check_data(self) -> None:
        holdout = self.train_data.holdout_fraction is not None
        if self.eval_data is not None:
            if holdout:
                raise ValueError("eval_data and train_data.holdout_fraction are both given: drop one of them")
            if self.eval_data.holdout_fraction is not None:
                raise ValueError("holdout_fraction belongs into train_data, not into eval_data")
        if self.eval_every_n_samples is not None and self.eval_data is None and not holdout:
            raise ValueError(
                "eval_every_n_samples is given but there is nothing to evaluate on: give eval_data, or set "
                "train_data.holdout_fraction"
            )

    @property
    def lm(self) -> LMConfig:
        """Which language model, and how its weights are processed."""
        return LMConfig(
            tlens_model_name=self.tlens_model_name,
            tlens_model_path=self.tlens_model_path,
            revision=self.tlens_model_revision,
            checkpoint_value=self.tlens_model_checkpoint,
            tlens_model_class=self.tlens_model_class,
            processing=self.tlens_processing,
            dtype=self.dtype,
        )

    @property
    def arithmetic(self) -> Arithmetic:
        """How it computes."""
        return Arithmetic(self.autocast, self.tf32, self.compile)

    @property
    def n_accumulation(self) -> int:
        """Batches per optimizer step."""
        return (self.effective_batch_size or self.batch_size) // self.batch_size

    @property
    def samples_per_step(self) -> int:
        """Sequences per optimizer step."""
        return self.effective_batch_size or self.batch_size

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> "Config":
        """Returns a copy with some values replaced, unchecked."""
        copy = super().model_copy(update=update, deep=deep)
        vars(copy).pop("phase_configs", None)  # those of other values
        return copy

    @cached_property
    def phase_configs(self) -> "list[Config]":
        """The config of each phase, as that of a run which is this phase from beginning to end; without phases, itself.

        Raises:
            ValueError: one line about the first that is wrong.
        """
        if self.phases is None:
            return [self]
        # What is not set is left out: a check asks whether the sparsity was forgotten.
        run = self.model_dump(mode="json", exclude={"phases", "members"}, exclude_unset=True)
        configs: list[Config] = []
        for n, phase in enumerate(self.phases):
            try:
                configs.append(Config.model_validate(phase.settings(run)))
            except ValidationError as error:
                raise ValueError(f"phases[{n}]: {describe_validation_error(error, Config).splitlines()[0]}") from None
        return configs

    @property
    def final_loss(self) -> LossConfigs:
        """The loss of the last phase: what evaluations report, in all phases."""
        return self.phase_configs[-1].loss

    @property
    def is_local(self) -> bool:
        """Whether nothing downstream of the SAEs is ever needed: they then run on the clean activations."""
        return not any(config.loss.needs_downstream for config in self.phase_configs)

    @property
    def run_name(self) -> str:
        """The run's name, made as the paper's library makes it (its odd label `in-to-out` included)."""
        return (self.wandb_run_name_prefix + (self.wandb_run_name or self._generated_name()))[:MAX_RUN_NAME]

    def _generated_name(self) -> str:
        loss = self.final_loss
        sae = self.saes.sae
        own = [] if sae == SAEConfig() else ["_".join(f"{k}-{v}" for k, v in _shown_options(sae).items())]
        parts = [f"seed-{self.seed}", *own, f"lpcoeff-{loss.sparsity.coeff}"]
        if loss.out_to_in is not None and loss.out_to_in.coeff > 0:
            parts.append(f"in-to-out-{loss.out_to_in.coeff}")
        if loss.logits_kl is not None and loss.logits_kl.coeff > 0:
            parts.append(f"logits-kl-{loss.logits_kl.coeff}")
        if loss.in_to_orig is not None and loss.in_to_orig.total_coeff > 0:
            parts.append(f"in-to-orig-{loss.in_to_orig.total_coeff}")
        if self.phases is not None:
            parts.append(f"phases-{len(self.phases)}")
        d_sae, ratio = self.saes.d_sae, self.saes.dict_size_to_input_ratio
        parts += [f"lr-{self.lr}", f"ratio-{_joined(ratio)}" if d_sae is None else f"dsae-{_joined(d_sae)}"]
        return "_".join(parts) + "_" + "-".join(map(str, self.saes.sae_positions))


def _joined(numbers: Any) -> str:
    return "-".join(map(str, numbers.values())) if isinstance(numbers, Mapping) else str(numbers)


def _shown_options(sae: SAEConfig) -> dict[str, Any]:
    """Returns what a run's name says of its SAEs: the architecture, and every option that is not the default."""
    name = sae.architecture.rpartition(":")[-1]
    return {"sae": name, **sae.model_dump(exclude_defaults=True, exclude={"architecture"})}


def rename_old_keys(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `values` with a `train:` level flattened, old names renamed, `DROPPED_KEYS` left out."""
    renamed: dict[str, Any] = {k: (dict(v) if isinstance(v, Mapping) else v) for k, v in values.items()}
    nested = renamed.pop("train", {})
    renamed.update(nested if isinstance(nested, Mapping) else {"train": nested})
    for key in DROPPED_KEYS:
        renamed.pop(key, None)
    per_step, n_steps = renamed.get("effective_batch_size") or renamed.get("batch_size"), renamed.get("warmup_steps")
    if isinstance(per_step, int) and isinstance(n_steps, int):
        renamed.setdefault("warmup_samples", renamed.pop("warmup_steps") * per_step)
    for old, new in OLD_KEYS.items():
        *old_parents, old_leaf = old.split(".")
        holder = _descend(renamed, old_parents)
        if holder is None or old_leaf not in holder:
            continue
        value = holder.pop(old_leaf)
        *parents, leaf = new.split(".")
        target = renamed
        for parent in parents:
            target = target.setdefault(parent, {})
        target.setdefault(leaf, value)
    return renamed


def _descend(values: dict[str, Any], parents: list[str]) -> dict[str, Any] | None:
    holder: Any = values
    for parent in parents:
        child = holder.get(parent)
        if not isinstance(child, Mapping):
            return None
        # A copy: renaming must not touch the caller's mapping.
        holder[parent] = dict(child)
        holder = holder[parent]
    return holder
