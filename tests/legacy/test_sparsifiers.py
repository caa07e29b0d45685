"""`e2e_sae.models.sparsifiers`, and the state dicts of SAEs."""

from pathlib import Path
from typing import Any

import torch

from e2e_sae import SAETransformer
from e2e_sae.saes import ReluSAE
from tests.legacy.by_hand import P, Q, draw
from tests.tiny_models import D_MODEL, random_tokens


def test_sae_takes_the_legacy_arguments_and_starts_with_orthonormal_rows():
    from e2e_sae.models.sparsifiers import SAE

    sae = SAE(input_size=2, n_dict_components=4, init_decoder_orthogonal=True)
    assert (sae.input_size, sae.n_dict_components, sae.device.type) == (2, 4, "cpu")
    weight = sae.decoder.weight
    assert weight.shape == (2, 4)
    torch.testing.assert_close(weight @ weight.T, torch.eye(2))
    free = SAE(2, 4, False).decoder.weight
    assert not torch.allclose(free @ free.T, torch.eye(2))


def test_sae_computes_relu_of_the_encoder_and_unit_norm_columns():
    from e2e_sae.models.sparsifiers import SAE

    sae, x = SAE(3, 5), draw(2, 4, 3)
    x_hat, c = sae(x)
    columns = sae.decoder.weight / sae.decoder.weight.norm(dim=0)
    torch.testing.assert_close(sae.dict_elements, columns)
    torch.testing.assert_close(c, torch.relu(x @ sae.encoder[0].weight.T + sae.encoder[0].bias))
    torch.testing.assert_close(x_hat, c @ columns.T + sae.decoder.bias)


def test_every_sae_is_an_instance_of_the_legacy_class_and_nothing_else_is(model: SAETransformer):
    from e2e_sae.models.sparsifiers import SAE, Codebook

    class Own(SAE):
        pass

    assert all(isinstance(sae, SAE) for sae in model.saes.values())
    assert not isinstance(Codebook(2, 4, 1), SAE)
    assert isinstance(Own(2, 4), SAE)
    assert not isinstance(ReluSAE(2, 4), Own)


def test_state_dicts_have_the_legacy_names_and_shapes_and_load_again(model: SAETransformer, lm: Any):
    state = model.saes.state_dict()
    key = "blocks-1-hook_resid_pre"
    shapes = {
        f"{key}.encoder.0.weight": (2 * D_MODEL, D_MODEL),
        f"{key}.encoder.0.bias": (2 * D_MODEL,),
        f"{key}.decoder.weight": (D_MODEL, 2 * D_MODEL),
        f"{key}.decoder.bias": (D_MODEL,),
    }
    assert {name: tuple(tensor.shape) for name, tensor in state.items() if name.startswith(key)} == shapes
    other = SAETransformer(lm, [P, Q], dict_size_to_input_ratio=2.0, seed=1)
    other.saes.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(model.saes.parameters(), other.saes.parameters(), strict=True))
    own_names = dict(model.saes[key].named_parameters())
    other.saes[key].load_state_dict(own_names)


def test_a_saved_state_dict_is_a_checkpoint(model: SAETransformer, lm: Any, tmp_path: Path):
    from e2e_sae.utils import save_module

    config = {"tlens_model_name": "any", "saes": {"sae_positions": [P, Q], "dict_size_to_input_ratio": 2.0}}
    save_module(config, tmp_path / "run", model.saes, "samples_8.pt")
    save_module({"other": 1}, tmp_path / "run", model.saes, "samples_16.pt")
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [
        "final_config.yaml",
        "samples_16.pt",
        "samples_8.pt",
    ]
    assert "other" not in (tmp_path / "run" / "final_config.yaml").read_text()
    loaded = SAETransformer.from_local_path(tmp_path / "run", model=lm)
    tokens = random_tokens(2, 8)
    assert torch.equal(loaded(tokens, [P, Q])[0], model(tokens, [P, Q])[0])
