"""What every SAE is: parameters, encode, decode, and the views that the paper's library's users know.

    pre_acts = (x - b_pre) W_enc + b_enc,   b_pre = b_dec with `subtract_b_dec`, else 0
    latents  = activate(pre_acts)
    recon    = latents D + b_dec,           + x W_skip with `skip`

D is W_dec with every row divided by max(its L2 norm, 1e-12) inside every forward pass (arXiv 2405.12241, section 2
and its code; the stored `W_dec` is then not of unit norm), or, with `decoder_norm: free`, W_dec as it is. An SAE
knows no hook name, no model and no loss. An architecture is a subclass with an `activate`, and, where it needs them,
options (`Config`), parameters of its own, `penalised`, `extra_losses` and `after_step`.

A transcoder is the same thing between two activations: it encodes one and its recon stands for another one, further
on, of which `d_out` is the width (Dunefsky et al. 2024, arXiv 2406.11944, eq. 1-2).

Shapes: d_in width of the activation, d_sae number of latents, d_out = d_in unless it is a transcoder's.
"""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar, overload

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import model_validator
from torch import Tensor, nn

from e2e_sae.acts import SAEPass, Scales
from e2e_sae.base_config import BaseConfig
from e2e_sae.errors import UserError
from e2e_sae.ops.autoencode import autoencode
from e2e_sae.ops.decode import MIN_NORM, decode

PARAMETER_NAMES = ("W_enc", "b_enc", "W_dec", "b_dec")
LEGACY_NAMES = {
    "encoder.0.weight": "W_enc",
    "encoder.0.bias": "b_enc",
    "decoder.weight": "W_dec",
    "decoder.bias": "b_dec",
}
"""Names in state dicts, which are those of the paper's library ([out, in], so weights are transposed), and ours."""


_Method = TypeVar("_Method", bound=Callable[..., Any])
_SELECTIONS: set[Callable[..., Any]] = set()


def selection(activate: _Method) -> _Method:
    """Marks an `activate` that only selects: latents are some positive pre-activations as they are, and 0 elsewhere.

    Its gradient is then known, so `SAE.forward` runs as one function over active latents (`ops/autoencode.py`). A
    subclass with another `activate` is not marked until it says so itself.
    """
    _SELECTIONS.add(activate)
    return activate


class SAEConfig(BaseConfig):
    """Options of every architecture; an architecture's own `Config` adds to them."""

    architecture: str = "relu"
    """Name of the architecture, or `my_file.py:ClassName` for one of your own."""
    subtract_b_dec: bool = False
    """Whether b_dec is subtracted from the activation before it is encoded (Bricken et al. 2023,
    https://transformer-circuits.pub/2023/monosemantic-features)."""
    decoder_norm: Literal["in_forward", "projected", "free"] = "in_forward"
    """`in_forward`: decoder rows are divided by their norm in every forward pass, as in the paper. `projected`: they
    are also set to norm 1 after every optimizer step (the gradient along them is 0 in both). `free`: they are used as
    they are, and the sparsity penalty is on latents times the norm of their row."""
    decoder_init: Literal["orthogonal", "uniform", "zeros"] = "orthogonal"
    """`orthogonal`: semi-orthogonal (the columns are orthonormal if there are more latents than dimensions). `uniform`:
    in +-1/sqrt(d_sae), as `nn.Linear`. In both, rows are then normalised unless `decoder_norm` is `in_forward`.
    `zeros`, for `decoder_norm: free`: how sparsify begins a transcoder, whose output is then b_dec."""
    encoder_init: Literal["uniform", "transposed"] = "uniform"
    """`uniform`: weights and biases in +-1/sqrt(d_in), as `nn.Linear`. `transposed`: the initial decoder's directions,
    and biases 0; they are trained apart."""
    b_dec_init: Literal["uniform", "zeros", "mean", "geometric_median"] = "uniform"
    """`uniform`: in +-1/sqrt(d_sae), as `nn.Linear`. `mean`, `geometric_median`: of the activations that are to be
    reconstructed, over the first training data (`data_init.py`); until a run has seen them, as `uniform`."""
    input_norm: Literal["none", "scale"] = "none"
    """`scale`: it is trained on activations times a power of two that makes their mean square about 1; what is saved is
    for activations as they are (`scaling.py`)."""
    skip: bool = False
    """For transcoders: whether x W_skip, which starts at 0, is added to the reconstruction (Paulo et al. 2025, arXiv
    2501.18823, section 3): the latents are left what is not linear in x."""

    @property
    def trained(self) -> "SAEConfig":
        """The options with which an SAE that has been trained trains on."""
        return self

    def check_length(self, n_samples: int) -> None:
        """Checks that what changes along the training fits into a run.

        Args:
            n_samples: the run's length, in sequences.

        Raises:
            UserError: it does not.
        """

    @model_validator(mode="after")
    def _check_zeros(self) -> "SAEConfig":
        if self.decoder_init == "zeros" and (self.decoder_norm != "free" or self.encoder_init == "transposed"):
            raise ValueError(
                "decoder_init: zeros needs decoder_norm: free and encoder_init: uniform (rows of 0 have no direction)"
            )
        return self


class SAE(nn.Module, ABC):
    """A sparse autoencoder. An architecture is a subclass with an `activate` method."""

    Config: ClassVar[type[SAEConfig]] = SAEConfig
    """What its options are; their default `architecture` is its name."""
    needs_penalty: ClassVar[bool] = False
    """Whether nothing but the sparsity penalty makes it sparse."""
    doubles_with_latents: ClassVar[Mapping[str, bool]] = {}
    """For each parameter and buffer of its own, by name: whether it doubles where biases and latents do (a threshold
    does, a counter does not). Needed for `input_norm` only."""

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        config: SAEConfig | None = None,
        generator: torch.Generator | None = None,
        d_out: int | None = None,
    ):
        """Initialises as the config says; by default as the paper's library does, in distribution.

        Args:
            d_in: width of the activation.
            d_sae: number of latents.
            config: options; None: the defaults.
            generator: source of the random numbers; None: torch's global one.
            d_out: width of the activation that a transcoder replaces; None: `d_in`.

        Raises:
            ValueError: a size is below 1.
            UserError: an option does not go with the sizes.
        """
        if d_in < 1 or d_sae < 1:
            raise ValueError(f"an SAE needs d_in >= 1 and d_sae >= 1: got d_in={d_in}, d_sae={d_sae}")
        super().__init__()
        self.config = config if config is not None else self.Config()
        d_out = d_in if d_out is None else d_out
        if d_out != d_in and self.config.encoder_init == "transposed":
            raise UserError(
                f"encoder_init: transposed needs equal widths: this transcoder reads {d_in} dimensions, writes {d_out}"
            )
        self.scales = Scales()
        self.make_parameters(d_in, d_sae, d_out, generator)
        for name, start in self.latent_parameters().items():
            self.register_parameter(name, nn.Parameter(start.detach().clone()))
        self.register_state_dict_post_hook(_to_legacy_names)
        self.register_load_state_dict_pre_hook(_from_legacy_names)

    def make_parameters(self, d_in: int, d_sae: int, d_out: int, generator: torch.Generator | None) -> None:
        """Makes W_enc, b_enc, W_dec and b_dec (and W_skip) as the config says. An architecture adds its own here; one
        that encodes in another way makes what it needs instead, W_dec among it."""
        self.W_enc = nn.Parameter(torch.empty(d_in, d_sae))
        self.b_enc = nn.Parameter(torch.empty(d_sae))
        self.W_dec = nn.Parameter(torch.empty(d_sae, d_out))
        self.b_dec = nn.Parameter(torch.empty(d_out))
        if self.config.skip:
            self.W_skip = nn.Parameter(torch.zeros(d_in, d_out))
        with torch.no_grad():
            for parameter, fan_in in [(self.W_enc, d_in), (self.b_enc, d_in), (self.b_dec, d_sae)]:
                parameter.uniform_(-(fan_in**-0.5), fan_in**-0.5, generator=generator)
            if self.config.b_dec_init == "zeros":
                self.b_dec.zero_()
            if self.config.decoder_init == "orthogonal":
                nn.init.orthogonal_(self.W_dec, generator=generator)
            elif self.config.decoder_init == "uniform":
                self.W_dec.uniform_(-(d_sae**-0.5), d_sae**-0.5, generator=generator)
            else:
                self.W_dec.zero_()
            if self.config.decoder_norm != "in_forward":
                self.W_dec.copy_(self.dict_elements.T)
            if self.config.encoder_init == "transposed":
                self.W_enc.copy_(F.normalize(self.W_dec, dim=1, eps=MIN_NORM).T)
                self.b_enc.zero_()

    def latent_parameters(self) -> dict[str, Float[Tensor, " d_sae"]]:
        """Returns the start of every parameter of its own that has one number for each latent, by name.

        They are made with the SAE, and a latent that is given new directions (`revival.resample_`) gets them anew.
        """
        return {}

    @classmethod
    def between(
        cls, d_in: int, d_out: int, d_sae: int, config: SAEConfig, generator: torch.Generator | None = None
    ) -> "SAE":
        """Returns an SAE of this architecture, or a transcoder if the widths differ.

        Raises:
            UserError: the architecture's own `__init__` takes no `d_out`, and this one differs from `d_in`.
        """
        if d_out == d_in:
            return cls(d_in, d_sae, config, generator)
        if "d_out" not in inspect.signature(cls).parameters:
            raise UserError(
                f"the architecture '{config.architecture}' has no transcoders between widths ({d_in} and {d_out} "
                "here): its __init__ takes no d_out"
            )
        return cls(d_in, d_sae, config, generator, d_out=d_out)

    @classmethod
    def is_penalty_needed(cls, config: SAEConfig) -> bool:
        """Returns `needs_penalty`, unless the options decide."""
        return cls.needs_penalty

    @abstractmethod
    def activate(self, pre_acts: Float[Tensor, "*tokens d_sae"]) -> Float[Tensor, "*tokens d_sae"]:
        """Returns the latents. In training mode it may look at the batch as a whole."""

    def penalised(self, acts: SAEPass) -> Float[Tensor, "*tokens d_sae"]:
        """Returns what the sparsity penalty is the norm of: the latents, times the norms of free decoder rows."""
        if self.config.decoder_norm != "free":
            return acts.latents
        return acts.latents * self.W_dec.norm(dim=1)

    def extra_losses(self, acts: SAEPass) -> dict[str, Float[Tensor, "*tokens"]]:
        """Returns losses of its own by name, one number per token, already weighted: whatever the loss mix, they are
        added to it."""
        return {}

    def before_batch(self, n_samples: int) -> None:
        """Gets ready for a batch of the training; what it sets follows from `n_samples` alone, so that a resumed run
        goes on.

        Args:
            n_samples: sequences trained on before.
        """

    @torch.no_grad()
    def after_step(self, acts: SAEPass) -> None:
        """Does what follows every optimizer step.

        Args:
            acts: what it made of the step's last batch.
        """
        if self.config.decoder_norm == "projected":
            self.W_dec.copy_(F.normalize(self.W_dec, dim=1, eps=MIN_NORM))
        self.follow(acts.latents)

    @torch.no_grad()
    def follow(self, latents: Float[Tensor, "*tokens d_sae"]) -> None:
        """Updates buffers that tell what latents are like in training, such as a threshold for use. With averaged
        weights it is called for their latents too, on buffers of their own (`weight_average.py`).

        Args:
            latents: of the step's last batch.
        """

    def pre_activations(self, x: Float[Tensor, "*tokens d_in"]) -> Float[Tensor, "*tokens d_sae"]:
        """Returns (x - b_pre) W_enc + b_enc."""
        return F.linear(x, self.W_enc.T, self._encoder_bias())

    def encode(self, x: Float[Tensor, "*tokens d_in"]) -> Float[Tensor, "*tokens d_sae"]:
        """Returns the latents of activations `x`."""
        return self.activate(self.pre_activations(x))

    def decode(self, latents: Float[Tensor, "*tokens d_sae"]) -> Float[Tensor, "*tokens d_out"]:
        """Returns the reconstruction from latents; `forward` adds `skipped` to it."""
        return self.decode_with(latents, self.W_dec, self.b_dec)

    def decode_with(
        self,
        latents: Float[Tensor, "*tokens n"],
        W_dec: Float[Tensor, "n d_out"],
        b_dec: Float[Tensor, " d_out"],
    ) -> Float[Tensor, "*tokens d_out"]:
        """Returns what another decoder, such as a part of its own, makes of latents with its `decoder_norm`."""
        if self.config.decoder_norm == "free":
            return F.linear(latents, W_dec.T, b_dec)
        return decode(latents, W_dec, b_dec)

    def skipped(self, x: Float[Tensor, "*tokens d_in"]) -> Float[Tensor, "*tokens d_out"] | float:
        """Returns what the reconstruction has besides what latents give: x W_skip, or 0 without `skip`."""
        return F.linear(x, self.W_skip.T) if self.config.skip else 0.0

    def forward(
        self, x: Float[Tensor, "*tokens d_in"]
    ) -> tuple[Float[Tensor, "*tokens d_out"], Float[Tensor, "*tokens d_sae"]]:
        """Returns (reconstruction, latents)."""
        recon, latents, _ = self.run(x)
        return recon, latents

    def run(
        self, x: Float[Tensor, "*tokens d_in"]
    ) -> tuple[Float[Tensor, "*tokens d_out"], Float[Tensor, "*tokens d_sae"], Float[Tensor, "*tokens d_sae"] | None]:
        """Returns (reconstruction, latents, pre-activations); the last is None where they are never in memory."""
        recon, latents, pre_acts = self._run(x)
        return recon + self.skipped(x) if self.config.skip else recon, latents, pre_acts

    def _run(
        self, x: Float[Tensor, "*tokens d_in"]
    ) -> tuple[Float[Tensor, "*tokens d_out"], Float[Tensor, "*tokens d_sae"], Float[Tensor, "*tokens d_sae"] | None]:
        if self._selects:
            recon, latents = autoencode(x, self.W_enc, self._encoder_bias(), self.W_dec, self.b_dec, self.activate)
            return recon, latents, None
        if type(self).encode is not SAE.encode:  # a subclass's own way from x to latents
            latents = self.encode(x)
            return self.decode(latents), latents, None
        pre_acts = self.pre_activations(x)
        latents = self.activate(pre_acts)
        return self.decode(latents), latents, pre_acts

    def _encoder_bias(self) -> Float[Tensor, " d_sae"]:
        """Returns b_enc - b_pre W_enc: (x - b_pre) W_enc + b_enc = x W_enc + that, without a copy of x."""
        return self.b_enc - self.b_dec @ self.W_enc if self.config.subtract_b_dec else self.b_enc

    @property
    def _selects(self) -> bool:
        own = type(self)
        plain = all(getattr(own, name) is getattr(SAE, name) for name in ("pre_activations", "encode", "decode"))
        return own.activate in _SELECTIONS and plain and self.config.decoder_norm != "free"

    @property
    def stored_tensors(self) -> dict[str, Float[Tensor, "..."]]:
        """Everything that a checkpoint keeps: parameters, and the buffers that inference or training goes on with."""
        return {**dict(self.named_parameters()), **dict(self.named_buffers())}

    @property
    def architecture(self) -> str:
        """Its name in YAML and in checkpoints."""
        return self.config.architecture

    @property
    def d_in(self) -> int:
        """Width of the activation."""
        return self.W_enc.shape[0]

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return self.W_dec.shape[0]

    @property
    def d_out(self) -> int:
        """Width of the reconstruction."""
        return self.W_dec.shape[1]

    @property
    def dict_elements(self) -> Float[Tensor, "d_out d_sae"]:
        """The dictionary's directions: one column of unit L2 norm per latent; part of the autograd graph."""
        return F.normalize(self.W_dec, dim=1, eps=MIN_NORM).T

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.W_dec.device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the parameters."""
        return self.W_dec.dtype

    # --- names of the paper's library ---

    @property
    def input_size(self) -> int:
        """`d_in`."""
        return self.d_in

    @property
    def n_dict_components(self) -> int:
        """`d_sae`."""
        return self.d_sae

    @property
    def encoder(self) -> "EncoderView":
        """The encoder as (linear, activation): `encoder[0].weight` is [d_sae, d_in] and shares our storage."""
        return EncoderView(self)

    @property
    def decoder(self) -> "LinearView":
        """The decoder as a linear layer: `decoder.weight` is [d_out, d_sae], not normalised, our storage."""
        return LinearView(self.W_dec.T, self.b_dec)


@contextmanager
def in_eval_mode(saes: Iterable[SAE]) -> Iterator[None]:
    """Lets SAEs treat every token by itself while the block is open; then each is in the mode that it was in."""
    were_training = [(sae, sae.training) for sae in saes]
    try:
        for sae, _ in were_training:
            sae.eval()
        yield
    finally:
        for sae, was_training in were_training:
            sae.train(was_training)


class LinearView(NamedTuple):
    """A weight and a bias in `nn.Linear`'s orientation that share storage with an SAE's parameters."""

    weight: Float[Tensor, "d_out d_in"]
    """[out, in]."""
    bias: Float[Tensor, " d_out"]
    """[out]."""

    def __call__(self, x: Float[Tensor, "*tokens d_in"]) -> Float[Tensor, "*tokens d_out"]:
        return F.linear(x, self.weight, self.bias)


class EncoderView:
    """Looks like `nn.Sequential(nn.Linear, activation)` and shares storage with the SAE."""

    def __init__(self, sae: SAE):
        self._sae = sae

    @overload
    def __getitem__(self, index: Literal[0]) -> LinearView: ...
    @overload
    def __getitem__(self, index: Literal[1]) -> Callable[[Tensor], Tensor]: ...
    def __getitem__(self, index: int) -> LinearView | Callable[[Tensor], Tensor]:
        return (LinearView(self._sae.W_enc.T, self._sae.b_enc), self._sae.activate)[index]

    def __len__(self) -> int:
        return 2

    def __call__(self, x: Float[Tensor, "*tokens d_in"]) -> Float[Tensor, "*tokens d_sae"]:
        return self._sae.encode(x)


# `torch.save(model.saes.state_dict(), ...)` writes what every tool for the paper's SAEs reads, and
# `load_state_dict` takes those files, and our own names too.
def _to_legacy_names(_module: nn.Module, state: dict[str, Tensor], prefix: str, _local_metadata: Any) -> None:
    for theirs, ours in LEGACY_NAMES.items():
        if prefix + ours in state:
            tensor = state.pop(prefix + ours)
            state[prefix + theirs] = tensor.T if tensor.ndim == 2 else tensor


def _from_legacy_names(_module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for theirs, ours in LEGACY_NAMES.items():
        if prefix + theirs in state:
            tensor: Tensor = state.pop(prefix + theirs)
            state[prefix + ours] = tensor.T if tensor.ndim == 2 else tensor
