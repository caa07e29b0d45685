"""The trainings on tiny images: loss terms by hand, what is saved loads again with the same numbers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from e2e_sae.base_config import deep_update
from e2e_sae.data.images import load_images
from e2e_sae.errors import CheckpointError, MissingFileError, RunFailed, UserError
from e2e_sae.mlp_training.config import MaxActConfig, MLPConfig, MLPSAEsConfig, SparsifierTrainConfig
from e2e_sae.mlp_training.run import accuracy
from e2e_sae.mlp_training.stored import load_mlp, load_mlp_mod
from e2e_sae.mlp_training.train_mlp import train_mlp
from e2e_sae.mlp_training.train_sparsifiers import loss_terms, total_loss, train_sparsifiers
from e2e_sae.models.mlp import MLP, MLPModOutput, insert_sparsifiers
from e2e_sae.trackers import read_metrics

TRAIN = {"learning_rate": 1e-2, "batch_size": 16, "n_epochs": 8}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> str:
    """120 noisy images of a bright row among four (the label), 24 of them for testing."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 120)
    pixels = rng.integers(0, 60, (120, 4, 3))
    pixels[np.arange(120), labels] += 190
    path = tmp_path_factory.mktemp("data") / "rows.npz"
    np.savez(path, images=pixels.astype(np.uint8), labels=labels)
    return str(path)


def mlp_config(images: str, save_dir: Path, **update: Any) -> MLPConfig:
    values = {"data": images, "model": {"hidden_sizes": [12, 8]}, "train": TRAIN | {"save_dir": str(save_dir)}}
    return MLPConfig.from_dict(deep_update(values, update))


def saes_config(mlp_run: Path, **train: Any) -> MLPSAEsConfig:
    values = TRAIN | {"save_dir": str(mlp_run.parent), "dict_eles_to_input_ratio": 2.0} | train
    return MLPSAEsConfig.from_dict({"saved_model_dir": str(mlp_run), "train": values})


@pytest.fixture(scope="module")
def mlp_run(images: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained MLP."""
    return train_mlp(mlp_config(images, tmp_path_factory.mktemp("out")))


def test_an_mlp_learns_and_its_file_gives_the_accuracies_that_were_logged(mlp_run: Path, images: str):
    assert sorted(path.name for path in mlp_run.iterdir()) == ["epoch_8.pt", "final_config.yaml", "metrics.jsonl"]
    assert mlp_run.name.startswith("orig-train-lr-0.01_bs-16_hidden-12-8_")
    lines = read_metrics(mlp_run / "metrics.jsonl")
    # 86 training images are 6 batches, the last one of 6: steps 10, 20, 30 and 40 are logged.
    at_tens = [86 + 4 * 16, 3 * 86 + 2 * 16, 5 * 86, 6 * 86 + 4 * 16]
    assert [line["samples"] for line in lines if "train/loss" in line] == at_tens
    assert [line["samples"] for line in lines if "valid/accuracy" in line] == [86 * epoch for epoch in range(1, 9)]
    mlp, data_name = load_mlp(mlp_run)
    data = load_images(data_name)
    assert data_name == images
    right = sum(int(mlp(x).argmax()) == int(y) for x, y in zip(*data.test, strict=True))
    assert lines[-1]["test/accuracy"] == right / 24 > 0.8
    valid = [line["valid/accuracy"] for line in lines if "valid/accuracy" in line]
    assert accuracy(mlp, data.valid, batch_size=3) == valid[-1]


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(mlp_run: Path, images: str, tmp_path: Path):
    state = torch.load(mlp_run / "epoch_8.pt", weights_only=True)
    for seed in (0, 1):
        torch.manual_seed(7 + seed)
        before = torch.get_rng_state()
        again = torch.load(train_mlp(mlp_config(images, tmp_path, seed=seed)) / "epoch_8.pt", weights_only=True)
        assert torch.equal(torch.get_rng_state(), before), "the caller's random numbers are left alone"
        assert state.keys() == again.keys()
        assert all(torch.equal(state[name], again[name]) for name in state) == (seed == 0)


def test_loss_terms_by_hand():
    clean = {"0": torch.tensor([[1.0, 2.0], [0.0, 0.0]]), "1": torch.tensor([[3.0], [1.0]])}
    output = MLPModOutput(
        outs={"0": torch.tensor([[1.0, 4.0], [0.0, 0.0]]), "1": torch.tensor([[3.0], [2.0]])},
        cs={"0": torch.tensor([[1.0, 4.0, 0.0], [0.0, 0.0, 9.0]])},
        sparsifier_outs={"0": torch.tensor([[1.0, 2.0], [2.0, 0.0]])},
    )
    train = SparsifierTrainConfig.from_dict(
        TRAIN | {"p_norm": 0.5, "sparsity_lambda": 0.1, "sparsifier_in_out_recon_loss_scale": 3}
    )
    terms = loss_terms(clean, output, train)
    # ||(1, 4, 0)||_0.5 = (1 + 2)^2 = 9 and ||(0, 0, 9)||_0.5 = 9; MSEs over images and width.
    values = {"new-orig-0": 4 / 4, "sae-orig-0": 4 / 4, "sae-new-0": 8 / 4, "sparsity-loss-0": 9.0, "new-orig-1": 1 / 2}
    assert {name: term.value.item() for name, term in terms.items()} == pytest.approx(values)
    assert total_loss(terms).item() == pytest.approx(1 + 1 + 3 * 2 + 0.1 * 9 + 0.5)


def test_p_is_0_6_unless_said_otherwise():
    assert SparsifierTrainConfig.from_dict(TRAIN).p_norm == 0.6


def test_only_a_codebooks_own_input_is_detached():
    train = SparsifierTrainConfig.from_dict(TRAIN | {"sparsifier_in_out_recon_loss_scale": 1})
    for c in (None, torch.ones(2, 3)):
        x = torch.randn(2, 4, requires_grad=True)
        x_hat = torch.randn(2, 4, requires_grad=True)
        output = MLPModOutput({"0": x, "1": torch.zeros(2, 1)}, {"0": c}, {"0": x_hat})
        terms = loss_terms({"0": torch.zeros(2, 4), "1": torch.zeros(2, 1)}, output, train)
        terms["sae-new-0"].value.backward()
        expected = 2 * (x_hat - x).detach() / 8
        torch.testing.assert_close(x_hat.grad, expected)
        if c is None:
            assert x.grad is None
        else:
            torch.testing.assert_close(x.grad, -expected)


def test_gradients_stay_finite_where_latents_are_zero():
    mlp = MLP([6], 4, 3).requires_grad_(False)
    mod = insert_sparsifiers(mlp, "sae", 2.0)
    x = torch.zeros(5, 4)
    with torch.no_grad():
        mod.sparsifiers["0"].b_enc.fill_(-100.0)  # pyright: ignore
    output = mod(x)
    assert output.cs["0"] is not None
    assert not output.cs["0"].any()
    train = SparsifierTrainConfig.from_dict(TRAIN | {"sparsity_lambda": 2.0})
    total_loss(loss_terms(mlp.layer_outputs(x), output, train)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in mod.sparsifiers.parameters())


@pytest.mark.parametrize("kind", ["sae", "codebook"])
def test_sparsifiers_learn_the_mlp_stays_and_the_file_gives_the_logged_accuracy(mlp_run: Path, kind: str):
    before = (mlp_run / "epoch_8.pt").read_bytes()
    clean = load_mlp(mlp_run)
    config = saes_config(mlp_run, type_of_sparsifier=kind, k=2, n_epochs=30, sparsity_lambda=1e-5)
    run_dir = train_sparsifiers(config)
    assert run_dir.name.startswith("sae_lambda-1e-05_lr-0.01_bs-16_")
    assert (mlp_run / "epoch_8.pt").read_bytes() == before
    state = torch.load(run_dir / "epoch_30.pt", weights_only=True)
    names = ["codebook"] if kind == "codebook" else list(TORCH_NAMES)
    assert sorted(state) == sorted(f"{i}.{name}" for i in (0, 1) for name in names)
    lines = read_metrics(run_dir / "metrics.jsonl")
    mod, mlp, data_name = load_mlp_mod(run_dir)
    assert all(torch.equal(a, b) for a, b in zip(mlp.parameters(), clean.mlp.parameters(), strict=True))
    data = load_images(data_name)
    assert lines[-1]["test/accuracy"] == accuracy(lambda x: mod(x).logits, data.test)
    assert lines[-1]["test/accuracy-original"] == accuracy(mlp, data.test)
    train_lines = [line for line in lines if "train/loss" in line]
    assert train_lines[-1]["train/loss"] < 0.5 * train_lines[0]["train/loss"]
    assert set(train_lines[0]) == {"samples", "epoch", "train/loss", "train/accuracy"} | legacy_keys(kind)


TORCH_NAMES = ("encoder.0.weight", "encoder.0.bias", "decoder.weight", "decoder.bias")


def legacy_keys(kind: str) -> set[str]:
    """The paper's library's keys for two hidden layers and the output."""
    keys = {f"train/loss-new-orig-{i}" for i in (0, 1, 2)}
    keys |= {f"train/loss-{name}-{i}" for name in ("sae-orig", "sae-new") for i in (0, 1)}
    of_saes = ("loss-sparsity-loss", "zero-counts", "fraction-zeros")
    return keys | ({f"train/{name}-{i}" for name in of_saes for i in (0, 1)} if kind == "sae" else set())


def test_logged_zeros_are_those_of_the_batch(mlp_run: Path):
    run_dir = train_sparsifiers(saes_config(mlp_run, sparsity_lambda=0.0))
    line = next(line for line in read_metrics(run_dir / "metrics.jsonl") if "train/loss" in line)
    for i, d_sae in (("0", 24), ("1", 16)):
        n_zeros = line[f"train/zero-counts-{i}"]
        assert 0 < n_zeros < 16 * d_sae
        assert line[f"train/fraction-zeros-{i}"] == n_zeros / (16 * d_sae)


def test_a_run_of_the_paper_librarys_loads(mlp_run: Path, images: str, tmp_path: Path):
    """Its config has no `data`, its state dict may lie beside older ones."""
    state = torch.load(mlp_run / "epoch_8.pt", weights_only=True)
    (tmp_path / "final_config.yaml").write_text("model: {hidden_sizes: [12, 8]}\nseed: 0\n")
    torch.save(state, tmp_path / "model_epoch_10.pt")
    torch.save({name: torch.zeros_like(t) for name, t in state.items()}, tmp_path / "model_epoch_9.pt")
    mlp, data = load_mlp(tmp_path)
    assert data == "digits"
    assert all(torch.equal(t, state[name]) for name, t in mlp.state_dict().items())
    assert not any(p.requires_grad for p in mlp.parameters())
    with pytest.raises(UserError, match=r"takes 12 pixels and the images of 'digits' have 64 \(8x8\): set data"):
        train_sparsifiers(saes_config(tmp_path))
    config = saes_config(tmp_path).model_copy(update={"data": images})
    assert (train_sparsifiers(config) / "epoch_8.pt").is_file()


def test_bad_runs_are_one_line_each(mlp_run: Path, tmp_path: Path):
    with pytest.raises(MissingFileError, match=r"is no run folder: it has no final_config\.yaml"):
        load_mlp(tmp_path)
    (tmp_path / "final_config.yaml").write_text("seed: 0\n")
    with pytest.raises(CheckpointError, match=r"holds no weights: expected epoch_<n>\.pt"):
        load_mlp(tmp_path)
    torch.save({"weight": torch.zeros(2)}, tmp_path / "epoch_1.pt")
    with pytest.raises(CheckpointError, match=r"holds no MLP: expected layers\.0\.linear\.weight .*got weight"):
        load_mlp(tmp_path)
    torch.save({"layers.0.linear.weight": torch.zeros(2, 2), "more": torch.zeros(1)}, tmp_path / "epoch_1.pt")
    with pytest.raises(CheckpointError, match=r"does not fit its final_config\.yaml: .*more"):
        load_mlp(tmp_path)
    (tmp_path / "epoch_1.pt").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match=r"epoch_1\.pt"):
        load_mlp(tmp_path)
    with pytest.raises(CheckpointError, match=r"holds no sparsifiers: expected a run of train_mnist_saes\.py"):
        load_mlp_mod(mlp_run)


def test_an_mlp_without_hidden_layers_cannot_be_sparsified(images: str, tmp_path: Path):
    run_dir = train_mlp(mlp_config(images, tmp_path, model={"hidden_sizes": None}, train={"n_epochs": 1}))
    assert "_hidden-None_" in run_dir.name
    with pytest.raises(UserError, match="has no hidden layer: there is nothing to sparsify"):
        train_sparsifiers(saes_config(run_dir))


def test_a_loss_that_is_not_finite_stops_the_run(images: str, tmp_path: Path):
    with pytest.raises(RunFailed, match=r"the loss is (nan|inf) at step \d+: lower train\.learning_rate"):
        train_mlp(mlp_config(images, tmp_path, train={"learning_rate": 1e30}))
    (run_dir,) = tmp_path.iterdir()
    assert sorted(path.name for path in run_dir.iterdir()) == ["final_config.yaml", "metrics.jsonl"]


def test_the_paper_librarys_yaml_files_are_valid(tmp_path: Path):
    """Every key of its three scripts, numbers as YAML 1.1 reads them."""
    train = {"learning_rate": "1e-3", "batch_size": 1024, "n_epochs": 8, "save_dir": str(tmp_path)}
    sparsifiers = {
        "type_of_sparsifier": "sae",
        "sparsity_lambda": 0.005,
        "dict_eles_to_input_ratio": 10,
        "sparsifier_in_out_recon_loss_scale": 0,
        "k": 128,
    }
    hidden = {"hidden_sizes": [100, 100]}
    files: list[tuple[Any, dict[str, Any]]] = [
        (MLPConfig, {"seed": 0, "model": hidden, "train": train, "wandb_project": "mlp-mnist-sae"}),
        (MLPSAEsConfig, {"seed": 0, "saved_model_dir": ".", "train": train | sparsifiers, "wandb_project": None}),
        (MaxActConfig, {"seed": 0, "model": hidden, "infer": {"batch_size": 1024, "model_name": "a_run"}}),
    ]
    (tmp_path / "models" / "a_run").mkdir(parents=True)
    for kind, values in files:
        (tmp_path / "legacy.yaml").write_text(yaml.safe_dump(values))
        config = kind.from_file(tmp_path / "legacy.yaml")
        assert kind.from_dict(json.loads(json.dumps(config.to_dict()))) == config
        if kind is MaxActConfig:
            assert config.infer.model_name == tmp_path / "models" / "a_run"
        else:
            assert config.train.learning_rate == 1e-3


@pytest.mark.parametrize(
    ("kind", "values", "words"),
    [
        (MLPConfig, {"model": {"hidden_sizes": [0]}, "train": TRAIN}, "'model.hidden_sizes.0'.*greater than 0"),
        (
            MLPConfig,
            {"model": {"hidden_sizes": []}, "train": TRAIN, "data": "mnist"},
            "no such file or folder: 'mnist'",
        ),
        (MLPSAEsConfig, {"train": TRAIN | {"type_of_sparsifier": "codebook"}}, r"'codebook' needs train\.k"),
        (MLPSAEsConfig, {"train": TRAIN | {"type_of_sparsifier": "topk"}}, "'train.type_of_sparsifier'"),
        (MLPSAEsConfig, {"train": TRAIN, "saved_model_dir": "no/such"}, "no such file or folder: 'no/such'"),
        (MaxActConfig, {"infer": {"model_name": "a_run"}}, "no such run folder: 'a_run'.*models"),
    ],
)
def test_mistakes_in_configs_are_named(kind: Any, values: dict[str, Any], words: str, in_tmp_dir: Path):
    with pytest.raises(UserError, match=words):
        kind.from_dict(values)
