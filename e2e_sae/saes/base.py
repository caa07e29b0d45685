"""What every SAE is: parameters, encode, decode, and the views that the paper's library's users know.

    pre_acts = x W_enc + b_enc
    latents  = activate(pre_acts)
    recon    = latents D + b_dec,   D = W_dec with every row divided by max(its L2 norm, 1e-12)

The decoder is normalised inside every forward pass (arXiv 2405.12241, section 2 and its code); the stored
`W_dec` is not of unit norm. An SAE knows no hook name, no model and no loss.

Shapes: d_in width of the activation, d_sae number of latents.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar, overload

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

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


class SAE(nn.Module, ABC):
    """A sparse autoencoder. An architecture is a subclass with a name and an `activate` method."""

    architecture: ClassVar[str]
    """Name in checkpoints."""

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        init_decoder_orthogonal: bool = True,
        generator: torch.Generator | None = None,
    ):
        """Initialises as the paper's library does, in distribution.

        W_enc and b_enc are uniform in +-1/sqrt(d_in), b_dec in +-1/sqrt(d_sae) (torch's `nn.Linear`). W_dec is
        semi-orthogonal (its d_in columns are orthonormal if d_sae >= d_in), or else uniform in +-1/sqrt(d_sae).

        Args:
            d_in: width of the activation.
            d_sae: number of latents.
            init_decoder_orthogonal: see above.
            generator: source of the random numbers; None: torch's global one.

        Raises:
            ValueError: a size is below 1.
        """
        if d_in < 1 or d_sae < 1:
            raise ValueError(f"an SAE needs d_in >= 1 and d_sae >= 1: got d_in={d_in}, d_sae={d_sae}")
        super().__init__()
        self.W_enc = nn.Parameter(torch.empty(d_in, d_sae))
        self.b_enc = nn.Parameter(torch.empty(d_sae))
        self.W_dec = nn.Parameter(torch.empty(d_sae, d_in))
        self.b_dec = nn.Parameter(torch.empty(d_in))
        with torch.no_grad():
            for parameter, fan_in in [(self.W_enc, d_in), (self.b_enc, d_in), (self.b_dec, d_sae)]:
                parameter.uniform_(-(fan_in**-0.5), fan_in**-0.5, generator=generator)
            if init_decoder_orthogonal:
                nn.init.orthogonal_(self.W_dec, generator=generator)
            else:
                self.W_dec.uniform_(-(d_sae**-0.5), d_sae**-0.5, generator=generator)
        self.register_state_dict_post_hook(_to_legacy_names)
        self.register_load_state_dict_pre_hook(_from_legacy_names)

    @abstractmethod
    def activate(self, pre_acts: Float[Tensor, "*tokens d_sae"]) -> Float[Tensor, "*tokens d_sae"]:
        """Returns the latents."""

    def encode(self, x: Float[Tensor, "*tokens d_in"]) -> Float[Tensor, "*tokens d_sae"]:
        """Returns the latents of activations `x`."""
        return self.activate(F.linear(x, self.W_enc.T, self.b_enc))

    def decode(self, latents: Float[Tensor, "*tokens d_sae"]) -> Float[Tensor, "*tokens d_in"]:
        """Returns the reconstruction from latents."""
        return decode(latents, self.W_dec, self.b_dec)

    def forward(
        self, x: Float[Tensor, "*tokens d_in"]
    ) -> tuple[Float[Tensor, "*tokens d_in"], Float[Tensor, "*tokens d_sae"]]:
        """Returns (reconstruction, latents)."""
        if self._selects:
            return autoencode(x, self.W_enc, self.b_enc, self.W_dec, self.b_dec, self.activate)
        latents = self.encode(x)
        return self.decode(latents), latents

    @property
    def _selects(self) -> bool:
        own = type(self)
        return own.activate in _SELECTIONS and own.encode is SAE.encode and own.decode is SAE.decode

    @property
    def d_in(self) -> int:
        """Width of the activation."""
        return self.W_enc.shape[0]

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return self.W_enc.shape[1]

    @property
    def dict_elements(self) -> Float[Tensor, "d_in d_sae"]:
        """The dictionary: one column of unit L2 norm per latent; part of the autograd graph."""
        return F.normalize(self.W_dec, dim=1, eps=MIN_NORM).T

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.W_enc.device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the parameters."""
        return self.W_enc.dtype

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
        """The decoder as a linear layer: `decoder.weight` is [d_in, d_sae], not normalised, our storage."""
        return LinearView(self.W_dec.T, self.b_dec)


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
        tensor = state.pop(prefix + ours)
        state[prefix + theirs] = tensor.T if tensor.ndim == 2 else tensor


def _from_legacy_names(_module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for theirs, ours in LEGACY_NAMES.items():
        if prefix + theirs in state:
            tensor: Tensor = state.pop(prefix + theirs)
            state[prefix + ours] = tensor.T if tensor.ndim == 2 else tensor
