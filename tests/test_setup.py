"""What is put together before a run: data, held-out rows, SAEs from disk."""

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from e2e_sae.checkpoint import load_run
from e2e_sae.checkpoint.files import write_json, write_tensors
from e2e_sae.checkpoint.legacy import legacy_state_dict, write_legacy_saes
from e2e_sae.config import Config
from e2e_sae.errors import UserError
from e2e_sae.setup import set_up
from e2e_sae.train import train
from tests.tiny_runs import (
    E2E,
    N_CTX,
    assert_same,
    console,
    lines_of,
    run_config,
    weights,
    write_rows,
)

A, B = "blocks.1.hook_resid_pre", "blocks.2.hook_resid_pre"


@pytest.fixture
def model(tiny_folder: Callable[[str], Path]) -> Path:
    return tiny_folder("gpt2")


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rows.parquet", 20)


# --- data ---


def test_evaluating_on_the_training_rows_is_warned_of(tmp_path: Path, model: Path, rows: Path) -> None:
    data = {"dataset_name": str(rows), "n_ctx": N_CTX}
    with console() as said:
        set_up(run_config(model, rows, None, eval_data=data, eval_every_n_samples=0))
    assert any("train_data and eval_data read the same rows" in line for line in said)
    other = {"dataset_name": str(write_rows(tmp_path / "eval.parquet", 4, seed=1)), "n_ctx": N_CTX}
    with console() as said:
        set_up(run_config(model, rows, None, eval_data=other, eval_every_n_samples=0))
    assert not any("same rows" in line for line in said)


@pytest.mark.parametrize(("n_samples", "length"), [(8, 8), (None, 20)])
def test_a_k_that_would_not_come_down_in_the_run_is_refused(
    tmp_path: Path, model: Path, rows: Path, n_samples: int | None, length: int
) -> None:
    def config(k_anneal_samples: int) -> Config:
        sae = {"architecture": "topk", "k": 4, "k_anneal_samples": k_anneal_samples}
        return run_config(model, rows, tmp_path / "out", n_samples=n_samples, saes={"sae": sae})

    with pytest.raises(UserError) as caught:
        set_up(config(length + 1))
    expected = f"saes.sae.k_anneal_samples={length + 1} is longer than the run of {length} samples: k would not come"
    assert str(caught.value) == f"{expected} down to 4; make it shorter"
    assert not (tmp_path / "out").exists()
    set_up(config(length).model_copy(update={"save_dir": None}))


def test_epochs_multiply_the_samples(tmp_path: Path, model: Path, rows: Path) -> None:
    config = run_config(model, rows, tmp_path, train_data={"n_epochs": 2}, log_every_n_grad_steps=100)
    assert [line["samples"] for line in lines_of(train(config))] == [2, 40]


def test_local_files_do_not_care_about_streaming(tmp_path: Path, model: Path, rows: Path) -> None:
    a, b = (
        train(run_config(model, rows, tmp_path, n_samples=2, train_data={"streaming": streaming}))
        for streaming in (True, False)
    )
    assert_same(weights(a), weights(b))


def test_text_is_tokenised_by_the_models_own_tokenizer(tmp_path: Path, model: Path) -> None:
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 4)
    data = {"dataset_name": str(tmp_path / "text.txt"), "is_tokenized": False, "n_ctx": N_CTX}
    run = train(run_config(model, tmp_path / "text.txt", tmp_path / "out", train_data=data))
    # 176 characters, a token each, in rows of a BOS and 7 tokens; a document may add its end.
    assert lines_of(run)[-1]["samples"] in (25, 26)


# --- SAEs from disk ---


def legacy_file(path: Path, run: Path, names: list[str], dtype: torch.dtype = torch.float32) -> Path:
    saes = {name: stored.tensors for name, stored in load_run(run).saes.items() if name in names}
    write_legacy_saes(path, {name: {key: t.to(dtype) for key, t in tensors.items()} for name, tensors in saes.items()})
    return path


def published_file(path: Path, run: Path, name: str) -> Path:
    """Writes an SAE without its position and the config with it, as in `apollo-research/e2e-saes-gpt2`."""
    prefix = name.replace(".", "-") + "."
    state = legacy_state_dict({name: load_run(run).saes[name].tensors})
    torch.save({k.removeprefix(prefix).replace("encoder.0", "encoder"): t for k, t in state.items()}, path)
    path.with_suffix(".yaml").write_text(yaml.safe_dump({"saes": {"sae_positions": [name]}}))
    return path


def saelens_folder(path: Path, run: Path, name: str) -> Path:
    """Writes an SAE with its decoder normalised as SAELens would have it."""
    stored = load_run(run).saes[name]
    path.mkdir()
    write_json(path / "cfg.json", {"hook_name": name, "apply_b_dec_to_input": False, "d_in": 16, "d_sae": 32})
    unit = {"W_dec": torch.nn.functional.normalize(stored.tensors["W_dec"], dim=1)}
    write_tensors(path / "sae_weights.safetensors", stored.tensors | unit)
    return path


@pytest.fixture(scope="module")
def two_saes(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Callable[[str], Path]) -> Path:
    """A run with SAEs at A and B."""
    folder = tmp_path_factory.mktemp("two")
    rows = write_rows(folder / "rows.parquet", 4)
    run = train(run_config(tiny_folder("gpt2"), rows, folder, seed=7, saes={"sae_positions": [A, B]}))
    assert run is not None
    return run


@pytest.fixture(scope="module")
def one_sae(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Callable[[str], Path]) -> Path:
    """A run with an SAE at A."""
    folder = tmp_path_factory.mktemp("one")
    run = train(run_config(tiny_folder("gpt2"), write_rows(folder / "rows.parquet", 2), folder))
    assert run is not None
    return run


@pytest.fixture(scope="module")
def initial_b(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Callable[[str], Path]) -> dict[str, torch.Tensor]:
    """How an SAE at B begins."""
    folder = tmp_path_factory.mktemp("b")
    config = run_config(
        tiny_folder("gpt2"), write_rows(folder / "rows.parquet", 2), folder, lr=1e-30, saes={"sae_positions": [B]}
    )
    return weights(train(config))


def part(values: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    return {key: tensor for key, tensor in values.items() if key.startswith(name)}


@pytest.mark.parametrize("source", ["legacy", "run folder", "checkpoint folder"])
def test_loaded_saes_stay_as_they_are_and_only_the_others_train(
    tmp_path: Path, model: Path, rows: Path, one_sae: Path, initial_b: dict[str, torch.Tensor], source: str
) -> None:
    path = {
        "legacy": legacy_file(tmp_path / "samples_2.pt", one_sae, [A]),
        "run folder": one_sae,
        "checkpoint folder": one_sae / "samples_2",
    }[source]
    saes: dict[str, Any] = {"sae_positions": [A, B], "pretrained_sae_paths": str(path)}
    after = weights(train(run_config(model, rows, tmp_path / "out", n_samples=4, saes=saes)))
    assert_same(part(after, A), weights(one_sae))
    assert not any(torch.equal(after[key], tensor) for key, tensor in initial_b.items())


def test_of_a_mixed_list_later_files_win_and_nothing_left_to_train_is_an_error(
    tmp_path: Path, model: Path, rows: Path, one_sae: Path, two_saes: Path
) -> None:
    legacy = legacy_file(tmp_path / "samples_2.pt", one_sae, [A], torch.float64)
    saes: dict[str, Any] = {"sae_positions": [A, B], "pretrained_sae_paths": [str(two_saes), str(legacy)]}
    with pytest.raises(UserError, match="nothing is left to train"):
        train(run_config(model, rows, tmp_path / "out", saes=saes))
    assert not (tmp_path / "out").exists()
    # A learning rate of (almost) 0 shows what was loaded.
    values: dict[str, Any] = {"saes": {**saes, "retrain_saes": True}, "n_samples": 2, "lr": 1e-30}
    loaded = weights(train(run_config(model, rows, tmp_path / "out", **values)))
    assert_same(part(loaded, A), weights(one_sae))
    assert_same(part(loaded, B), part(weights(two_saes), B))
    assert all(tensor.dtype == torch.float32 for tensor in loaded.values())


@pytest.mark.parametrize("last", ["own", "legacy", "published", "saelens"])
def test_four_formats_in_one_list_and_the_last_one_wins(
    tmp_path: Path, model: Path, rows: Path, one_sae: Path, two_saes: Path, last: str
) -> None:
    made = {
        "own": one_sae / "samples_2",
        "legacy": legacy_file(tmp_path / "saes.pt", one_sae, [A]),
        "published": published_file(tmp_path / "e2e_similar_ce_layer_1.pt", one_sae, A),
        "saelens": saelens_folder(tmp_path / "1-res_sce-ajt", one_sae, A),
    }
    others = {
        "own": two_saes,
        "legacy": legacy_file(tmp_path / "others.pt", two_saes, [A, B]),
        "published": published_file(tmp_path / "other.pt", two_saes, A),
        "saelens": saelens_folder(tmp_path / "other", two_saes, A),
    }
    paths = [str(path) for path in [*others.values(), made[last]]]
    saes = {"sae_positions": [A, B], "pretrained_sae_paths": paths, "retrain_saes": True}
    loaded = set_up(run_config(model, rows, None, saes=saes)).member.model.saes_at()
    expected = load_run(one_sae).saes[A].tensors, load_run(two_saes).saes[B].tensors
    for sae, tensors in zip(loaded.values(), expected, strict=True):
        assert torch.equal(sae.W_enc, tensors["W_enc"])
        assert torch.equal(sae.b_enc, tensors["b_enc"])
        torch.testing.assert_close(sae.dict_elements, torch.nn.functional.normalize(tensors["W_dec"], dim=1).T)


def test_saes_at_positions_that_the_run_lacks_are_left_out_with_a_note(model: Path, rows: Path, two_saes: Path) -> None:
    saes = {"sae_positions": [A], "pretrained_sae_paths": str(two_saes), "retrain_saes": True}
    with console() as said:
        loaded = set_up(run_config(model, rows, None, saes=saes)).member.model.saes_at()
    assert [position.name for position in loaded] == [A]
    assert any(f"also has SAEs at {B}, where this run has none: left out" in line for line in said)


def test_a_file_that_was_saved_on_a_gpu_loads_without_one(
    tmp_path: Path, model: Path, rows: Path, one_sae: Path
) -> None:
    path = as_if_saved_on_cuda(legacy_file(tmp_path / "samples_2.pt", one_sae, [A]))
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="deserialize object on a CUDA device"):
            torch.load(path, weights_only=True)
    saes = {"sae_positions": [A], "pretrained_sae_paths": str(path), "retrain_saes": True}
    (loaded,) = set_up(run_config(model, rows, None, saes=saes)).member.model.saes_at().values()
    assert torch.equal(loaded.W_enc, load_run(one_sae).saes[A].tensors["W_enc"])
    assert loaded.device.type == "cpu"


def as_if_saved_on_cuda(path: Path) -> Path:
    """Changes the device that the file's pickle names (a string, in protocol 2) from `cpu` to `cuda:0`."""
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, content in records.items():
            if name.endswith("/data.pkl"):
                assert b"X\x03\x00\x00\x00cpu" in content
                content = content.replace(b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0")
            archive.writestr(name, content)
    return path


def test_frozen_saes_stay_in_the_forward_pass_and_in_the_losses(
    tmp_path: Path, model: Path, rows: Path, one_sae: Path, two_saes: Path
) -> None:
    def first_line(pretrained: Path) -> dict[str, Any]:
        """Returns the first batch's log of an e2e run with a frozen SAE at A and a fresh one at B."""
        saes = {"sae_positions": [A, B], "pretrained_sae_paths": str(pretrained)}
        return lines_of(train(run_config(model, rows, tmp_path / "out", n_samples=2, saes=saes, loss=E2E)))[0]

    ones, others = (first_line(legacy_file(tmp_path / "saes.pt", run, [A])) for run in (one_sae, two_saes))
    differing = {key for key in ones if isinstance(ones[key], float) and ones[key] != others[key]}
    assert "loss" in differing
    assert {f"loss/train/sparsity/{A}", "loss/train/logits_kl"} <= differing
    # The SAE at B, the same in both, reads what the frozen one passes on.
    assert f"loss/train/sparsity/{B}" in differing


def test_with_retrain_saes_what_was_loaded_trains_on(tmp_path: Path, model: Path, rows: Path, two_saes: Path) -> None:
    saes = {"sae_positions": [A, B], "pretrained_sae_paths": str(two_saes), "retrain_saes": True}
    after = weights(train(run_config(model, rows, tmp_path, n_samples=6, saes=saes)))
    before = weights(two_saes)
    assert not any(torch.equal(after[key], before[key]) for key in before)
