"""Reading the paper's library's `.pt` files."""

from pathlib import Path

import pytest
import torch

from e2e_sae.checkpoint import load_run, newest_legacy_file
from e2e_sae.errors import CheckpointError


def state(name: str = "blocks-1-hook_resid_pre", d_in: int = 3, d_sae: int = 5) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    shapes = {
        "encoder.0.weight": (d_sae, d_in),
        "encoder.0.bias": (d_sae,),
        "decoder.weight": (d_in, d_sae),
        "decoder.bias": (d_in,),
    }
    return {f"{name}.{key}": torch.randn(shape, generator=g) for key, shape in shapes.items()}


def test_tensors_come_out_in_our_orientation_bit_for_bit(tmp_path: Path):
    stored = state() | state("blocks-2-hook_mlp_out")
    torch.save(stored, tmp_path / "samples_9.pt")
    saes = load_run(tmp_path / "samples_9.pt").saes
    assert list(saes) == ["blocks.1.hook_resid_pre", "blocks.2.hook_mlp_out"]
    sae = saes["blocks.1.hook_resid_pre"]
    assert (sae.info.d_in, sae.info.d_sae, sae.info.architecture) == (3, 5, "relu")
    assert torch.equal(sae.tensors["W_enc"], stored["blocks-1-hook_resid_pre.encoder.0.weight"].T)
    assert torch.equal(sae.tensors["W_dec"], stored["blocks-1-hook_resid_pre.decoder.weight"].T)
    assert torch.equal(sae.tensors["b_enc"], stored["blocks-1-hook_resid_pre.encoder.0.bias"])


def test_the_largest_trailing_number_is_the_newest(tmp_path: Path):
    for name in ("samples_9.pt", "samples_100.pt", "samples_20.pth"):
        torch.save(state(), tmp_path / name)
    assert newest_legacy_file(tmp_path).name == "samples_100.pt"
    assert load_run(tmp_path).n_samples == 100


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, "holds no state dict of SAEs"),
        ({"x": torch.zeros(1)}, "unexpected key 'x', expected '<position>.encoder.0.weight'"),
        ({"a.encoder.0.weight": torch.zeros(2, 3)}, "the SAE at a lacks encoder.0.bias, decoder.weight, decoder.bias"),
        (state("a") | {"a.decoder.bias": torch.zeros(4)}, r"the SAE at a has b_dec \[4\], expected \[3\]"),
    ],
)
def test_a_file_that_is_something_else_is_refused(change: dict[str, torch.Tensor], message: str, tmp_path: Path):
    torch.save(change, tmp_path / "samples_1.pt")
    with pytest.raises(CheckpointError, match=message):
        load_run(tmp_path / "samples_1.pt")
