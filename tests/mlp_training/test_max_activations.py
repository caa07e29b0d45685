"""Max-activation data against brute force over single images."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from e2e_sae.data.images import load_images
from e2e_sae.errors import UserError
from e2e_sae.mlp_training.config import MaxActConfig, MLPConfig, MLPSAEsConfig
from e2e_sae.mlp_training.max_activations import _TopImages, max_acts, save_max_acts
from e2e_sae.mlp_training.train_mlp import train_mlp
from e2e_sae.mlp_training.train_sparsifiers import train_sparsifiers
from e2e_sae.models.mlp import MLPMod
from e2e_sae.saes.codebook import Codebook


@pytest.fixture(scope="module")
def saes_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SAEs on an MLP with one hidden layer, on the digits."""
    train = {"learning_rate": 1e-2, "batch_size": 256, "n_epochs": 1, "save_dir": str(tmp_path_factory.mktemp("out"))}
    mlp_run = train_mlp(MLPConfig.from_dict({"model": {"hidden_sizes": [8]}, "train": train}))
    values = {"saved_model_dir": str(mlp_run), "train": train | {"dict_eles_to_input_ratio": 2}}
    return train_sparsifiers(MLPSAEsConfig.from_dict(values))


def random_mod(kind: str) -> tuple[MLPMod, torch.Tensor]:
    torch.manual_seed(0)
    mod = MLPMod([5, 4], 6, 3, type_of_sparsifier="sae" if kind == "sae" else "codebook", k=3)
    if kind == "sae":
        with torch.no_grad():
            mod.sparsifiers["0"].b_enc[2] = -100.0  # pyright: ignore
    return mod, torch.rand(23, 6)


@pytest.mark.parametrize("kind", ["sae", "codebook"])
@pytest.mark.parametrize("batch_size", [1, 7, 100])
def test_top_images_and_frequencies_equal_brute_force(kind: str, batch_size: int):
    mod, pixels = random_mod(kind)
    found = max_acts(mod, pixels, n_top=4, batch_size=batch_size)
    assert list(found) == ["0", "1"]
    for i, layer in found.items():
        acts: list[dict[int, float]] = []
        for pixel in pixels:
            output = mod(pixel[None])
            c, sparsifier = output.cs[i], mod.sparsifiers[i]
            if isinstance(sparsifier, Codebook):
                cosines = torch.cosine_similarity(output.outs[i], sparsifier.codebook)
                acts.append({int(j): cosines[j].item() for j in cosines.argsort(descending=True)[:3]})
            else:
                assert c is not None
                acts.append({j: a for j, a in enumerate(c[0].tolist()) if a > 0})
        for j in range(len(layer.firing_frequency)):
            strongest = sorted((a[j] for a in acts if j in a), reverse=True)
            assert layer.firing_frequency[j].item() == pytest.approx(len(strongest) / 23)
            assert layer.top_acts[j].tolist() == pytest.approx((strongest + [0.0] * 4)[:4], abs=1e-5)
            images = [n for n in layer.top_images[j].tolist() if n >= 0]
            assert len(set(images)) == min(4, len(strongest))
            assert [acts[n][j] for n in images] == pytest.approx(strongest[: len(images)], abs=1e-5)
        assert layer.n_dead == sum(all(j not in a for a in acts) for j in range(len(layer.firing_frequency)))
    if kind == "sae":
        assert found["0"].n_dead >= 1, "the latent with a bias of -100"


def test_among_equals_the_earlier_image_comes_first_and_inactive_ones_never():
    acts = torch.tensor([[1.0, 0.0], [2.0, 0.0], [1.0, 5.0], [2.0, 0.0], [2.0, -1.0]])
    for batch_size in (1, 2, 5):
        top = _TopImages(3)
        for batch in acts.split(batch_size):
            top.add(batch, batch > 0)
        layer = top.result()
        assert layer.top_images.tolist() == [[1, 3, 4], [2, -1, -1]]
        assert layer.top_acts.tolist() == [[2, 2, 2], [5, 0, 0]]
        torch.testing.assert_close(layer.firing_frequency, torch.tensor([1.0, 0.2]))


def test_results_are_saved_with_a_picture_and_returned(saes_run: Path, tmp_path: Path):
    infer = {"model_name": str(saes_run), "save_dir": str(tmp_path), "split": "test", "n_top_images": 3}
    config = MaxActConfig.from_dict({"model": {"hidden_sizes": [8]}, "infer": infer})
    data = save_max_acts(config)
    names = ["final_config.yaml", "layer_0.png", "max_acts.safetensors", "summary.json"]
    assert sorted(path.name for path in data.folder.iterdir()) == names
    assert data.n_images == len(load_images("digits").test.labels)
    tensors = load_file(data.folder / "max_acts.safetensors")
    assert set(tensors) == {"0.top_acts", "0.top_images", "0.firing_frequency"}
    assert torch.equal(tensors["0.top_images"], data.layers["0"].top_images)
    assert data.layers["0"].top_images.shape == (16, 3)
    summary = json.loads((data.folder / "summary.json").read_text())
    assert summary["layers"]["0"]["n_dead"] == int((tensors["0.firing_frequency"] == 0).sum())
    assert (summary["n_images"], summary["split"]) == (data.n_images, "test")
    assert MaxActConfig.from_file(data.folder / "final_config.yaml") == config


def test_the_picture_shows_the_strongest_image_of_the_most_active_element_first(saes_run: Path, tmp_path: Path):
    import matplotlib.pyplot as plt

    infer = {"model_name": str(saes_run), "save_dir": str(tmp_path), "n_top_images": 1, "n_elements_shown": 1}
    data = save_max_acts(MaxActConfig.from_dict({"infer": infer}))
    layer = data.layers["0"]
    image = load_images("digits").train.pixels[layer.top_images[layer.firing_frequency.argmax(), 0]].reshape(8, 8)
    drawn = plt.imread(data.folder / "layer_0.png")[..., 0]
    # The axes' frame is the one dark rectangle: columns and rows that are dark along most of the picture's image.
    dark = drawn < 0.3
    rows, columns = dark.sum(1).argsort()[-2:], dark.sum(0).argsort()[-2:]
    (top, bottom), (left, right) = sorted(rows.tolist()), sorted(columns.tolist())
    height, width = bottom - top, right - left
    assert height > 40
    assert width > 40
    centres = [
        [drawn[top + int((r + 0.5) * height / 8), left + int((c + 0.5) * width / 8)] for c in range(8)]
        for r in range(8)
    ]
    torch.testing.assert_close(1 - torch.tensor(centres), image, atol=0.02, rtol=0)


def test_a_model_of_another_shape_is_an_error(saes_run: Path):
    config = MaxActConfig.from_dict({"model": {"hidden_sizes": [100]}, "infer": {"model_name": str(saes_run)}})
    with pytest.raises(UserError, match=r"model\.hidden_sizes is \[100\], but '.*' has \[8\]"):
        save_max_acts(config)
