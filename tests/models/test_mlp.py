"""The MLPs' structure as the paper's library has it, and forward passes by hand."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from e2e_sae.errors import UserError
from e2e_sae.models.mlp import MLP, MLPMod, insert_sparsifiers
from e2e_sae.saes import ReluSAE
from e2e_sae.saes.codebook import Codebook


@pytest.mark.parametrize(("hidden_sizes", "bias"), [([4, 3], False), ([], True), ([4], True)])
def test_layers_have_the_sizes_biases_and_activations_asked_for(hidden_sizes: list[int], bias: bool):
    mlp = MLP(hidden_sizes, input_size=3, output_size=4, bias=bias)
    sizes = [3, *hidden_sizes, 4]
    assert len(mlp.layers) == len(hidden_sizes) + 1
    for i, layer in enumerate(mlp.layers):
        linear: Any = layer.linear
        assert (linear.in_features, linear.out_features) == (sizes[i], sizes[i + 1])
        assert (linear.bias is not None) == bias
        if i < len(hidden_sizes):
            assert isinstance(layer.activation, nn.GELU)
        else:
            assert not hasattr(layer, "activation")
    assert mlp.sizes == sizes


def test_no_hidden_sizes_is_one_linear_layer():
    assert MLP(None, 3, 2).sizes == [3, 2]
    assert list(MLP(None, 3, 2).state_dict()) == ["layers.0.linear.weight", "layers.0.linear.bias"]


def test_forward_is_gelu_between_linear_maps():
    mlp = MLP([4], 3, 2)
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    state = mlp.state_dict()
    pre = x @ state["layers.0.linear.weight"].T + state["layers.0.linear.bias"]
    hidden = pre * 0.5 * (1 + torch.erf(pre / 2**0.5))
    expected = hidden @ state["layers.1.linear.weight"].T + state["layers.1.linear.bias"]
    torch.testing.assert_close(mlp(x), expected)
    outs = mlp.layer_outputs(x)
    torch.testing.assert_close(outs["0"], hidden)
    torch.testing.assert_close(outs["1"], expected)


def test_a_modified_mlp_hands_the_sparsifiers_output_on():
    mod = MLPMod([4, 3], 2, 5, dict_eles_to_input_ratio=2.5)
    x = torch.randn(6, 2, generator=torch.Generator().manual_seed(0))
    outs, cs, sparsifier_outs = mod(x)
    gelu = nn.functional.gelu
    layers: Any = mod.layers
    saes: Any = mod.sparsifiers
    state, expected_cs = x, dict[str, Tensor]()
    for i in ("0", "1"):
        state = gelu(state @ layers[i].linear.weight.T + layers[i].linear.bias)
        torch.testing.assert_close(outs[i], state)
        expected_cs[i] = torch.relu(state @ saes[i].W_enc + saes[i].b_enc)
        rows = saes[i].W_dec / saes[i].W_dec.norm(dim=1, keepdim=True)
        state = expected_cs[i] @ rows + saes[i].b_dec
        torch.testing.assert_close(sparsifier_outs[i], state)
        torch.testing.assert_close(cs[i], expected_cs[i])
    torch.testing.assert_close(outs["2"], state @ layers["2"].linear.weight.T + layers["2"].linear.bias)
    torch.testing.assert_close(mod(x).logits, outs["2"])
    assert (list(outs), list(cs), list(sparsifier_outs)) == (["0", "1", "2"], ["0", "1"], ["0", "1"])
    assert [c.shape[-1] for c in expected_cs.values()] == [10, 7], "int(4 * 2.5), int(3 * 2.5)"


def test_codebooks_have_no_latents():
    mod = MLPMod([4], 2, 3, type_of_sparsifier="codebook", k=2)
    outs, cs, sparsifier_outs = mod(torch.randn(6, 2))
    assert cs == {"0": None}
    torch.testing.assert_close(sparsifier_outs["0"], mod.sparsifiers["0"](outs["0"])[0])
    assert isinstance(mod.sparsifiers["0"], Codebook)
    assert [name for name in mod.state_dict() if "sparsifiers" in name] == ["sparsifiers.0.codebook"]


def test_state_dict_has_the_paper_librarys_keys_and_orientation():
    mod = MLPMod([4], 2, 3)
    sae = mod.sparsifiers["0"]
    assert isinstance(sae, ReluSAE)
    shapes = {name: tuple(t.shape) for name, t in mod.sparsifiers.state_dict().items()}
    assert shapes == {
        "0.encoder.0.weight": (8, 4),
        "0.encoder.0.bias": (8,),
        "0.decoder.weight": (4, 8),
        "0.decoder.bias": (4,),
    }
    assert {f"sparsifiers.{name}" for name in shapes} < set(mod.state_dict())
    other = MLPMod([4], 2, 3)
    other.load_state_dict(mod.state_dict())
    x = torch.randn(5, 2)
    torch.testing.assert_close(other(x).logits, mod(x).logits, rtol=0, atol=0)
    assert torch.equal(mod.state_dict()["sparsifiers.0.encoder.0.weight"], sae.encoder[0].weight)


def test_inserted_sparsifiers_share_the_mlps_layers():
    mlp = MLP([4], 2, 3)
    mod = insert_sparsifiers(mlp, "sae", 2.0)
    assert mod.layers["0"] is mlp.layers[0]
    assert mod.layers["1"] is mlp.layers[1]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"type_of_sparsifier": "codebook"}, "got k=0 of 8 codes"),
        ({"dict_eles_to_input_ratio": 0.1}, "dict_eles_to_input_ratio=0.1 leaves no element"),
    ],
)
def test_sparsifiers_that_cannot_be_are_errors(options: dict[str, Any], words: str):
    with pytest.raises(UserError, match=words):
        MLPMod([4], 2, 3, **options)
