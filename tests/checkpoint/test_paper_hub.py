"""The files of `apollo-research/e2e-saes-gpt2`: one SAE without its position, the run's config beside it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from e2e_sae import SAETransformer
from e2e_sae.checkpoint import load_run
from e2e_sae.checkpoint.files import read_state_dict
from e2e_sae.convert import convert_to_legacy
from e2e_sae.errors import CheckpointError
from e2e_sae.evaluate_run import evaluate_run_dir
from e2e_sae.models.lm import load_lm
from e2e_sae.models.lm_config import LMConfig
from tests.tiny_runs import E2E, N_CTX, write_rows

A = "blocks.1.hook_resid_pre"


def published(
    folder: Path, stem: str = "e2e_similar_ce_layer_1", config: dict[str, Any] | None = None
) -> tuple[Path, dict[str, Tensor]]:
    """Writes an SAE as that repository holds it, and returns the file and what is in it."""
    g = torch.Generator().manual_seed(0)
    shapes = {"encoder.weight": (40, 16), "encoder.bias": (40,), "decoder.weight": (16, 40), "decoder.bias": (16,)}
    state = {name: torch.randn(shape, generator=g) for name, shape in shapes.items()}
    state["decoder.weight"] /= state["decoder.weight"].norm(dim=0)
    torch.save(state, folder / f"{stem}.pt")
    values = {"tlens_model_name": "gpt2-small", "n_samples": 400_000, "saes": {"sae_positions": [A]}}
    (folder / f"{stem}.yaml").write_text(yaml.safe_dump(values if config is None else config))
    return folder / f"{stem}.pt", state


@pytest.mark.parametrize(
    "config",
    [
        {"saes": {"sae_positions": [A]}},
        {"saes": {"sae_positions": A}},
        {"sae_position_name": A},
        {"train": {"sae_position_names": [A]}},
    ],
)
def test_the_position_comes_from_the_yaml_of_the_same_name_also_under_old_keys(
    tmp_path: Path, config: dict[str, Any]
) -> None:
    path, state = published(tmp_path, config={**config, "n_samples": 400_000})
    run = load_run(path)
    assert list(run.saes) == [A]
    assert run.n_samples == 400_000, "the number in the name is a layer"
    assert torch.equal(run.saes[A].tensors["W_enc"], state["encoder.weight"].T)
    assert torch.equal(run.saes[A].tensors["W_dec"], state["decoder.weight"].T)


def test_outputs_are_those_of_the_formula_with_the_stored_unit_decoder(
    tmp_path: Path, tiny_folder: Callable[[str], Path]
) -> None:
    path, state = published(tmp_path)
    lm = load_lm(LMConfig(tlens_model_path=tiny_folder("gpt2")))
    (sae,) = SAETransformer.from_local_path(path, model=lm).saes_at().values()
    x = torch.randn(7, 16, generator=torch.Generator().manual_seed(1))
    latents = torch.relu(x @ state["encoder.weight"].T + state["encoder.bias"])
    recon = latents @ state["decoder.weight"].T + state["decoder.bias"]
    torch.testing.assert_close(sae(x)[1], latents)
    torch.testing.assert_close(sae(x)[0], recon)
    torch.testing.assert_close(sae.dict_elements, state["decoder.weight"])


def test_it_can_be_converted_and_evaluated(tmp_path: Path, tiny_folder: Callable[[str], Path]) -> None:
    rows = write_rows(tmp_path / "rows.parquet", 6)
    config = {
        "tlens_model_path": str(tiny_folder("gpt2")),
        "n_samples": 400_000,
        "saes": {"sae_positions": [A], "dict_size_to_input_ratio": 2.5},
        "loss": E2E,
        "lr": 1e-3,
        "batch_size": 2,
        "train_data": {"dataset_name": str(rows), "n_ctx": N_CTX},
    }
    path, state = published(tmp_path, config=config)
    out = convert_to_legacy(path, tmp_path / "legacy")
    written = read_state_dict(out / "samples_400000.pt")
    assert torch.equal(written["blocks-1-hook_resid_pre.decoder.weight"], state["decoder.weight"])
    assert evaluate_run_dir(path) == evaluate_run_dir(out)
    assert f"sparsity/eval/alive_dict_elements/{A}" in evaluate_run_dir(path)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"saes": {"sae_positions": [A, "blocks.2.hook_resid_pre"]}}, "which names 2 positions"),
        ({"lr": 1}, r"expected saes.sae_positions with one hook name in 'e2e_similar_ce_layer_1.yaml'"),
    ],
)
def test_a_position_that_is_not_clear_is_an_error(tmp_path: Path, config: dict[str, Any], words: str) -> None:
    path, _ = published(tmp_path, config=config)
    with pytest.raises(CheckpointError, match=words):
        load_run(path)
    path.with_suffix(".yaml").unlink()
    with pytest.raises(CheckpointError, match="does not say where its SAE sits.*which is not there"):
        load_run(path)


def test_shapes_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    path, state = published(tmp_path)
    torch.save({**state, "decoder.bias": torch.zeros(3)}, path)
    with pytest.raises(CheckpointError, match=rf"the SAE at {A} has b_dec \[3\], expected \[16\]"):
        load_run(path)
    torch.save({**state, "encoder.weight": torch.zeros(40)}, path)
    with pytest.raises(CheckpointError, match="has an encoder weight that is no matrix"):
        load_run(path)


def test_a_folder_with_several_must_be_told_which(tmp_path: Path) -> None:
    published(tmp_path)
    assert list(load_run(tmp_path).saes) == [A]
    published(tmp_path, "local_similar_l0_layer_2")
    with pytest.raises(CheckpointError, match=r"several SAEs \(e2e_similar_ce_layer_1.pt, local_.*name one of the"):
        load_run(tmp_path)
