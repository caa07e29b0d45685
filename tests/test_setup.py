"""What is put together before a run: data, held-out rows, SAEs from disk."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from e2e_sae.checkpoint import load_run
from e2e_sae.errors import UserError
from e2e_sae.setup import set_up
from e2e_sae.train import train
from tests.tiny_runs import (
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
    state: dict[str, torch.Tensor] = {}
    for name in names:
        tensors = load_run(run).saes[name].tensors
        key = name.replace(".", "-")
        for theirs, ours in [("encoder.0", "enc"), ("decoder", "dec")]:
            state[f"{key}.{theirs}.weight"] = tensors[f"W_{ours}"].T.contiguous().to(dtype)
            state[f"{key}.{theirs}.bias"] = tensors[f"b_{ours}"].to(dtype)
    torch.save(state, path)
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


def test_with_retrain_saes_what_was_loaded_trains_on(tmp_path: Path, model: Path, rows: Path, two_saes: Path) -> None:
    saes = {"sae_positions": [A, B], "pretrained_sae_paths": str(two_saes), "retrain_saes": True}
    after = weights(train(run_config(model, rows, tmp_path, n_samples=6, saes=saes)))
    before = weights(two_saes)
    assert not any(torch.equal(after[key], before[key]) for key in before)
