"""SAELens folders: their formula, written out here, must be what comes out; what we cannot compute is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from e2e_sae import SAETransformer
from e2e_sae.checkpoint import load_run
from e2e_sae.checkpoint.files import write_json
from e2e_sae.convert import convert_to_legacy
from e2e_sae.errors import CheckpointError
from e2e_sae.models.lm import load_lm
from e2e_sae.models.lm_config import LMConfig, ProcessingConfig
from e2e_sae.models.stored import build_sae, lm_config_of

A = "blocks.1.hook_resid_pre"
FLAT: dict[str, Any] = {
    "architecture": "standard", "d_in": 16, "d_sae": 40, "activation_fn_str": "relu", "apply_b_dec_to_input": False,
    "finetuning_scaling_factor": False, "context_size": 1024, "model_name": "gpt2-small", "hook_name": A,
    "hook_layer": 1, "hook_head_index": None, "prepend_bos": False, "dataset_path": "some/data",
    "normalize_activations": "none", "dtype": "torch.float32", "device": "cpu", "sae_lens_training_version": None,
}  # fmt: skip
"""`cfg.json` up to SAELens 5."""
METADATA: dict[str, Any] = {
    "architecture": "standard", "d_in": 16, "d_sae": 40, "dtype": "float32", "device": "cpu",
    "apply_b_dec_to_input": False, "normalize_activations": "none", "reshape_activations": "none",
    "metadata": {
        "sae_lens_version": "6.54.12", "model_name": "gpt2-small", "model_class_name": "HookedTransformer",
        "hook_name": A, "hook_head_index": None, "hook_name_out": None,
        "model_from_pretrained_kwargs": {"center_writing_weights": True},
    },
}  # fmt: skip
"""`cfg.json` from SAELens 6 on."""


def weights(unit: bool = True) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    shapes = {"W_enc": (16, 40), "b_enc": (40,), "W_dec": (40, 16), "b_dec": (16,)}
    tensors = {name: torch.randn(shape, generator=g) for name, shape in shapes.items()}
    if unit:
        tensors["W_dec"] /= tensors["W_dec"].norm(dim=1, keepdim=True)
    return tensors


def write(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor] | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    write_json(folder / "cfg.json", config)
    save_file(tensors or weights(), folder / "sae_weights.safetensors")
    return folder


def theirs(x: Tensor, w: dict[str, Tensor], apply_b_dec_to_input: bool) -> tuple[Tensor, Tensor]:
    """Returns SAELens' (reconstruction, latents)."""
    centred = x - w["b_dec"] if apply_b_dec_to_input else x
    latents = torch.relu(centred @ w["W_enc"] + w["b_enc"])
    return latents @ w["W_dec"] + w["b_dec"], latents


X = torch.randn(9, 16, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("config", [FLAT, METADATA], ids=["flat", "metadata"])
def test_both_layouts_give_the_stored_tensors_bit_for_bit(tmp_path: Path, config: dict[str, Any]) -> None:
    run = load_run(write(tmp_path / "sae", config))
    assert list(run.saes) == [A]
    assert (run.saes[A].info.d_in, run.saes[A].info.d_sae) == (16, 40)
    assert all(torch.equal(tensor, weights()[name]) for name, tensor in run.saes[A].tensors.items())
    recon, latents = build_sae(run.saes[A])(X)
    torch.testing.assert_close(recon, theirs(X, weights(), False)[0])
    torch.testing.assert_close(latents, theirs(X, weights(), False)[1])


@pytest.mark.parametrize("given", [{"apply_b_dec_to_input": True}, {}], ids=["said", "left out"])
def test_a_subtracted_decoder_bias_is_folded_into_the_encoder_bias(tmp_path: Path, given: dict[str, Any]) -> None:
    # Left out, it is SAELens' older default: subtracted.
    config = {k: v for k, v in FLAT.items() if k != "apply_b_dec_to_input"} | given
    recon, latents = build_sae(load_run(write(tmp_path / "sae", config)).saes[A])(X)
    torch.testing.assert_close(latents, theirs(X, weights(), True)[1])
    torch.testing.assert_close(recon, theirs(X, weights(), True)[0])
    assert not torch.allclose(recon, theirs(X, weights(), False)[0])


@pytest.mark.parametrize("subtracts", [True, False])
def test_decoder_norms_move_into_the_latents_and_leave_the_reconstruction(tmp_path: Path, subtracts: bool) -> None:
    w = weights(unit=False)
    w["W_dec"][3] = 0
    sae = build_sae(load_run(write(tmp_path / "sae", {**FLAT, "apply_b_dec_to_input": subtracts}, w)).saes[A])
    recon, latents = theirs(X, w, subtracts)
    torch.testing.assert_close(sae(X)[0], recon)
    torch.testing.assert_close(sae(X)[1], latents * w["W_dec"].norm(dim=1))


def test_a_scaling_factor_of_ones_changes_nothing_and_another_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "sae", FLAT, {**weights(), "scaling_factor": torch.ones(40)})
    assert set(load_run(tmp_path / "sae").saes[A].tensors) == set(weights())
    write(tmp_path / "sae", FLAT, {**weights(), "scaling_factor": torch.full((40,), 2.0)})
    with pytest.raises(CheckpointError, match="a scaling factor on its latents, which cannot be represented here"):
        load_run(tmp_path / "sae")


def test_the_weight_processing_is_what_saelens_would_use_except_for_the_papers_saes(tmp_path: Path) -> None:
    def processing(folder: str, config: dict[str, Any]) -> ProcessingConfig:
        lm = lm_config_of(load_run(write(tmp_path / folder, config)))
        assert lm.tlens_model_name == "gpt2-small"
        return lm.processing

    raw = {name: False for name in ProcessingConfig.model_fields}
    assert processing("plain", FLAT) == ProcessingConfig(**raw)
    assert processing("kwargs", METADATA) == ProcessingConfig(**{**raw, "center_writing_weights": True})
    # The converter's default said `False`; the paper's SAEs saw centred weights.
    converted = {**FLAT, "model_from_pretrained_kwargs": {"center_writing_weights": False}}
    assert processing("6-res_sce-ajt", converted) == ProcessingConfig()
    assert processing("other", {**converted, "neuronpedia_id": "gpt2-small/6-res_sce-ajt"}) == ProcessingConfig()


def test_it_runs_in_a_model_and_converts_to_legacy(tmp_path: Path, tiny_folder: Callable[[str], Path]) -> None:
    folder = write(tmp_path / "6-res_sce-ajt", FLAT)
    lm = load_lm(LMConfig(tlens_model_path=tiny_folder("gpt2")))
    model = SAETransformer.from_local_path(folder, model=lm)
    out = convert_to_legacy(folder, tmp_path / "legacy")
    again = SAETransformer.from_local_path(out, model=lm)
    tokens = torch.arange(8)[None]
    assert torch.equal(model(tokens)[0], again(tokens)[0])
    assert not torch.equal(model(tokens)[0], model(tokens, sae_positions=[])[0])
    with pytest.raises(CheckpointError, match="with fold_ln=False, center_writing_weights=False"):
        convert_to_legacy(write(tmp_path / "raw", FLAT), tmp_path / "legacy2")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"architecture": "jumprelu"}, r"architecture is 'jumprelu' \(expected: standard\)"),
        ({"activation_fn_str": "topk"}, r"activation_fn_str is 'topk' \(expected: relu\)"),
        ({"normalize_activations": "layer_norm"}, r"normalize_activations is 'layer_norm' \(expected: none\)"),
        ({"normalize_activations": True}, "normalize_activations is True"),
        ({"reshape_activations": "hook_z"}, "reshape_activations is 'hook_z'"),
        ({"hook_head_index": 3}, r"hook_head_index is 3 \(expected: none\)"),
        ({"hook_name_out": "blocks.1.hook_mlp_out"}, rf"hook_name_out is .* \(expected: {A}\)"),
        ({"model_class_name": "AutoModelForCausalLM"}, "model_class_name is 'AutoModelForCausalLM'"),
        ({"hook_name": None}, "does not say where the SAE sits: it has no hook_name"),
        ({"model_from_pretrained_kwargs": {"checkpoint_value": 512}}, "another version of its model"),
    ],
)
def test_what_cannot_be_represented_is_refused(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        load_run(write(tmp_path / "sae", {**FLAT, **change}))


def test_damaged_folders_are_told(tmp_path: Path) -> None:
    folder = write(tmp_path / "sae", FLAT, {k: v for k, v in weights().items() if k != "b_dec"})
    with pytest.raises(CheckpointError, match=f"the SAE at {A} lacks b_dec"):
        load_run(folder)
    write(folder, FLAT, {**weights(), "threshold": torch.zeros(40)})
    with pytest.raises(CheckpointError, match=r"has tensors \['threshold'\], which cannot be represented here"):
        load_run(folder)
    (folder / "sae_weights.safetensors").write_bytes(b"junk")
    with pytest.raises(CheckpointError, match="is damaged or no safetensors file"):
        load_run(folder)
    (folder / "cfg.json").write_text("[]")
    with pytest.raises(CheckpointError, match="cfg.json' is damaged: expected a JSON object"):
        load_run(folder)
