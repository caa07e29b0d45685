"""A multi-layer perceptron, and one with a sparsifier (an SAE or a codebook) after every hidden layer.

Classes, arguments and state-dict keys are those of the paper's library's `e2e_sae.models.mlp`.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from jaxtyping import Float
from torch import Tensor, nn

from e2e_sae.errors import UserError
from e2e_sae.saes.codebook import Codebook
from e2e_sae.saes.relu import ReluSAE


class Layer(nn.Module):
    """A linear map, and GELU after it unless it is the last; `activation` exists only where there is one."""

    def __init__(self, in_features: int, out_features: int, has_activation_fn: bool = True, bias: bool = True):
        super().__init__()
        self.linear = nn.Linear(in_features, out_features, bias=bias)
        if has_activation_fn:
            self.activation = nn.GELU()

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """Returns activation(linear(x))."""
        return self.activation(self.linear(x)) if hasattr(self, "activation") else self.linear(x)


class MLP(nn.Module):
    """Layers one after another. State-dict keys: `layers.<i>.linear.{weight, bias}`."""

    def __init__(self, hidden_sizes: Sequence[int] | None, input_size: int, output_size: int, bias: bool = True):
        """
        Args:
            hidden_sizes: width of each hidden layer; None or empty: one linear layer.
        """
        super().__init__()
        self.layers = nn.Sequential(*_layers(hidden_sizes, input_size, output_size, bias))

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """Returns the last layer's output."""
        return self.layers(x)

    def layer_outputs(self, x: Float[Tensor, "*batch d_in"]) -> dict[str, Float[Tensor, "*batch d_layer"]]:
        """Returns every layer's output by its index."""
        outs: dict[str, Tensor] = {}
        for i, layer in enumerate(self.layers):
            x = outs[str(i)] = layer(x)
        return outs

    @property
    def sizes(self) -> list[int]:
        """Width of the input and of every layer's output."""
        linears: list[Any] = [layer.linear for layer in self.layers]
        return [linears[0].in_features, *(linear.out_features for linear in linears)]


class MLPModOutput(NamedTuple):
    """What `MLPMod` returns: dictionaries by layer index (`"0"`, `"1"`, ...)."""

    outs: dict[str, Float[Tensor, "*batch d_layer"]]
    """Each layer's output, before its sparsifier."""
    cs: dict[str, Float[Tensor, "*batch d_sae"] | None]
    """Latents of each hidden layer's SAE; None for a codebook."""
    sparsifier_outs: dict[str, Float[Tensor, "*batch d_layer"]]
    """What each hidden layer's sparsifier hands on to the next layer."""

    @property
    def logits(self) -> Float[Tensor, "*batch d_out"]:
        """The last layer's output."""
        return self.outs[str(len(self.outs) - 1)]


class MLPMod(nn.Module):
    """An MLP whose hidden layers' outputs pass through sparsifiers.

    State-dict keys: `layers.<i>.linear...` and `sparsifiers.<i>.{encoder.0.weight, encoder.0.bias, decoder.weight,
    decoder.bias}` or `sparsifiers.<i>.codebook`, in torch's orientation.
    """

    def __init__(
        self,
        hidden_sizes: Sequence[int] | None,
        input_size: int,
        output_size: int,
        bias: bool = True,
        type_of_sparsifier: Literal["sae", "codebook"] = "sae",
        dict_eles_to_input_ratio: float = 2.0,
        k: int = 0,
    ):
        """
        Args:
            dict_eles_to_input_ratio: dictionary elements per unit of a layer's width, rounded down.
            k: codebooks only: how many codes are summed.

        Raises:
            UserError: another type, or a k that does not fit.
        """
        super().__init__()
        layers = _layers(hidden_sizes, input_size, output_size, bias)
        self.layers = nn.ModuleDict({str(i): layer for i, layer in enumerate(layers)})
        self.sparsifiers = nn.ModuleDict()
        for i, width in enumerate(hidden_sizes or []):
            n_elements = int(width * dict_eles_to_input_ratio)
            if n_elements < 1:
                raise UserError(f"dict_eles_to_input_ratio={dict_eles_to_input_ratio} leaves no element for {width}")
            self.sparsifiers[str(i)] = _sparsifier(type_of_sparsifier, width, n_elements, k)

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> MLPModOutput:
        """Returns every layer's output, latents and sparsifier output."""
        outs: dict[str, Tensor] = {}
        cs: dict[str, Tensor | None] = {}
        sparsifier_outs: dict[str, Tensor] = {}
        for i, layer in self.layers.items():
            x = outs[i] = layer(x)
            if i in self.sparsifiers:
                x, cs[i] = self.sparsifiers[i](x)
                sparsifier_outs[i] = x
        return MLPModOutput(outs, cs, sparsifier_outs)


def insert_sparsifiers(
    mlp: MLP, type_of_sparsifier: Literal["sae", "codebook"], dict_eles_to_input_ratio: float, k: int = 0
) -> MLPMod:
    """Returns an `MLPMod` that has this MLP's own layers (not copies) and new sparsifiers."""
    input_size, *hidden_sizes, output_size = mlp.sizes
    mod = MLPMod(
        hidden_sizes,
        input_size,
        output_size,
        type_of_sparsifier=type_of_sparsifier,
        dict_eles_to_input_ratio=dict_eles_to_input_ratio,
        k=k,
    )
    mod.layers = nn.ModuleDict({str(i): layer for i, layer in enumerate(mlp.layers)})
    return mod


def _layers(hidden_sizes: Sequence[int] | None, input_size: int, output_size: int, bias: bool) -> list[Layer]:
    sizes = [input_size, *(hidden_sizes or []), output_size]
    last = len(sizes) - 2
    return [Layer(sizes[i], sizes[i + 1], has_activation_fn=i < last, bias=bias) for i in range(last + 1)]


def _sparsifier(kind: str, width: int, n_elements: int, k: int) -> nn.Module:
    if kind == "codebook":
        return Codebook(width, n_elements, k)
    if kind != "sae":
        raise UserError(f"unknown type_of_sparsifier '{kind}': expected 'sae' or 'codebook'")
    return ReluSAE(width, n_elements)
