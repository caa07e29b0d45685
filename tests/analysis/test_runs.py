"""The table of runs from disk, and filters of it."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from e2e_sae.analysis.found_runs import mean_grad_norm
from e2e_sae.analysis.runs import only_where, runs_table
from e2e_sae.checkpoint.legacy import write_legacy_saes
from e2e_sae.errors import UserError
from e2e_sae.train import train
from tests.tiny_runs import E2E, LOCAL, console, lines_of, run_config, write_rows

A, B = "blocks.1.hook_resid_pre", "blocks.2.hook_resid_pre"


def make_run(folder: Path, *, finished: bool = True, **changes: Any) -> Path:
    """Writes a run folder as the library leaves it, without tensors, and returns it."""
    folder.mkdir(parents=True)
    config: dict[str, Any] = {
        "seed": 0,
        "lr": 0.01,
        "n_samples": 100,
        "tlens_model_path": "/models/tiny",
        "saes": {"sae_positions": [A], "d_sae": 32, "sae": {"architecture": "relu"}},
        "loss": {"sparsity": {"coeff": 0.5}, "out_to_in": {"coeff": 1.0}},
    }
    (folder / "final_config.yaml").write_text(yaml.safe_dump({**config, **changes}))
    summary = {"samples": 100, "performance/eval/ce_increase": 0.5, f"sparsity/eval/L_0/{A}": 8.0}
    (folder / "metrics.jsonl").write_text(json.dumps({"samples": 100, "grad_norm": 2.0}) + "\n")
    checkpoint = folder / "samples_100"
    checkpoint.mkdir()
    sae = {"architecture": "relu", "read": A, "write": A, "d_in": 16, "d_sae": 32}
    model = {
        "model_class": "hooked",
        "processing": None,
        "dtype": "float32",
        "d_model": 16,
        "n_layers": 3,
        "d_vocab": 50,
    }
    info = {
        "library_version": "1",
        "n_samples": 100,
        "n_steps": 1,
        "firing_data": "",
        "firing_n_tokens": 1,
        "files": {},
    }
    (checkpoint / "checkpoint.json").write_text(
        json.dumps({"format_version": 2, **info, "model": model, "saes": {A: sae}})
    )
    if finished:
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


@pytest.fixture(scope="module")
def trained(tiny_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two SAEs on the tiny GPT-2, evaluated."""
    folder = tmp_path_factory.mktemp("trained")
    config = run_config(
        tiny_folder("gpt2"),
        write_rows(folder / "rows.parquet", 16),
        folder / "runs",
        saes={"sae_positions": [A, B], "dict_size_to_input_ratio": None, "d_sae": {A: 24, B: 32}},
        loss={**LOCAL, "logits_kl": {"coeff": 0.5}},
        train_data={"holdout_fraction": 0.25},
        eval_every_n_samples=0,
        max_grad_norm=1.0,
        n_samples=10,
    )
    path = train(config)
    assert path is not None
    return path


def test_a_trained_run_is_a_row_for_each_sae(trained: Path) -> None:
    first, second = runs_table([trained]).to_dict("records")
    summary = json.loads((trained / "summary.json").read_text())
    assert [(row["sae_pos"], row["layer"], row["d_sae"], row["ratio"]) for row in (first, second)] == [
        (A, 1, 24, 1.5),
        (B, 2, 32, 2.0),
    ]
    assert first["source"] == str(trained)
    assert first["name"] == "run"
    assert (first["run_type"], first["kind"], first["n_samples"]) == ("e2e+local", "e2e+local", 10)
    assert (first["sparsity_coeff"], first["kl_coeff"], first["out_to_in_coeff"]) == (0.1, 0.5, 1.0)
    assert math.isnan(first["in_to_orig_coeff"])
    assert first["CE_increase"] == second["CE_increase"] == summary["performance/eval/ce_increase"]
    assert first["n_tokens"] == summary["total_tokens"]
    for row in (first, second):
        name, layer = row["sae_pos"], row["layer"]
        assert row["L0"] == summary[f"sparsity/eval/L_0/{name}"]
        assert row["alive_dict_elements"] == summary[f"sparsity/alive_dict_elements_final/{name}"]
        assert row["out_to_in"] == row[f"recon_loss_layer-{layer}"] == summary[f"loss/eval/out_to_in/{name}"]
        for column, stem in (
            ("explained_var", "loss/eval/{}/explained_variance/{}"),
            ("explained_var_ln", "loss/eval/{}/explained_variance_ln/{}"),
        ):
            assert row[column] == row[f"{column}_layer-{layer}"] == summary[stem.format("out_to_in", name)]
            end = summary[stem.format("in_to_orig", "blocks.2.hook_resid_post")]
            assert row[f"{column}_layer-3"] == end
        assert row["quality_explained_var"] == summary[f"quality/eval/explained_variance/{name}"]
        end = summary["quality/eval/explained_variance/blocks.2.hook_resid_post"]
        assert row["quality_explained_var_layer-3"] == end
    assert math.isnan(second["recon_loss_layer-1"])  # nothing happens before the SAE
    norms = [line["grad_norm"] for line in lines_of(trained) if line["samples"] > 1]  # after a tenth of 10
    assert first["mean_grad_norm"] == pytest.approx(sum(norms) / len(norms))


def test_a_sweep_folder_gives_its_finished_runs_once(tmp_path: Path) -> None:
    done = make_run(tmp_path / "sweep" / "runs" / "a_1" / "seed-0_2026-01-01_00-00-00")
    make_run(tmp_path / "sweep" / "runs" / "b_2" / "seed-0_2026-01-01_00-00-00", seed=1)
    open_run = make_run(tmp_path / "sweep" / "runs" / "c_3" / "run", finished=False)
    (tmp_path / "sweep" / "lm").mkdir()
    (tmp_path / "sweep" / "lm" / "final_config.yaml").write_text("epochs: 1\n")
    with console() as said:
        table = runs_table([tmp_path / "sweep", done, str(done)])
    assert said == [f"1 unfinished runs are left out: {open_run}"]
    assert table["name"].tolist() == ["seed-0", "seed-0"]
    assert table["seed"].tolist() == [0, 1]
    assert table["id"].is_unique
    assert table["id"].str.fullmatch("[0-9a-f]{8}").all()
    assert table["mean_grad_norm"].tolist() == [2.0, 2.0]
    with pytest.raises(UserError, match=f"none of these runs is finished: {open_run}"):
        runs_table([open_run])


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"loss": {"logits_kl": {"coeff": 1.0}}}, ("e2e", "relu", "e2e")),
        ({"loss": {**E2E, "in_to_orig": {"total_coeff": 2.5, "hook_positions": ["x"]}}}, ("e2e+ds", "relu", "e2e+ds")),
        (
            {"saes": {"sae_positions": A, "d_sae": 8, "sae": {"architecture": "topk", "k": 4}}},
            ("local", "topk", "topk local"),
        ),
        (
            {"saes": {"sae_positions": A, "d_sae": 8, "sae": {"architecture": "/my/own.py:Mine"}}},
            ("local", "Mine", "Mine local"),
        ),
        (
            {"phases": [{"until": 0.5, "loss": None}, {"loss": {"logits_kl": {"coeff": 1.0}}}]},
            ("local then e2e+local", "relu", "local then e2e+local"),
        ),
        (
            {"phases": [{"until": 0.5}, {"loss": {"logits_kl": {"coeff": 1.0}, "out_to_in": None}}]},
            ("local then e2e", "relu", "local then e2e"),
        ),
        ({"phases": [{"until": 0.5}, {"lr": 0.001}]}, ("local", "relu", "local")),
    ],
)
def test_the_kind_says_what_was_trained_how(tmp_path: Path, changes: dict[str, Any], expected: tuple[str, ...]) -> None:
    (row,) = runs_table([make_run(tmp_path / "run", **changes)]).to_dict("records")
    assert (row["run_type"], row["architecture"], row["kind"]) == expected


def test_k_of_several_is_the_largest_and_times_come_from_the_folder(tmp_path: Path) -> None:
    sae = {"architecture": "hierarchical_topk", "ks": [4, 8, 16]}
    run = make_run(tmp_path / "run", saes={"sae_positions": [A], "d_sae": 32, "sae": sae})
    (run / "timing.json").write_text(json.dumps({"seconds": 12.5, "tokens_per_second": 80.0, "members": 3}))
    (row,) = runs_table([run]).to_dict("records")
    assert (row["k"], row["seconds"], row["tokens_per_second"], row["members"]) == (16, 12.5, 80.0, 3)


def test_runs_of_the_papers_library_have_settings_and_no_measurements(tmp_path: Path) -> None:
    shapes = {"W_enc": (16, 64), "b_enc": (64,), "W_dec": (64, 16), "b_dec": (16,)}
    run = tmp_path / "run_2024-05-01_10-00-00"
    run.mkdir()
    write_legacy_saes(run / "samples_400000.pt", {B: {name: torch.zeros(shape) for name, shape in shapes.items()}})
    config = {"tlens_model_name": "gpt2-small", "lr": 5e-4, "saes": {"sae_positions": "blocks.2"}, "loss": E2E}
    (run / "final_config.yaml").write_text(yaml.safe_dump(config))
    for source in (run, run / "samples_400000.pt"):
        (row,) = runs_table([source]).to_dict("records")
        assert (row["sae_pos"], row["layer"], row["d_sae"], row["ratio"], row["run_type"]) == (B, 2, 64, 4.0, "e2e")
        assert row["model_name"] == "gpt2-small"
        assert all(math.isnan(row[name]) for name in ("L0", "CE_increase", "mean_grad_norm", "seconds"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty", None, "holds no run: expected final_config.yaml in it, or in folders below it"),
        ("lm", "epochs: 3", "is no run of SAEs: its config has no 'saes'"),
        ("outer/lm", "epochs: 3", "holds no run of SAEs, only other runs"),
        ("notes.csv", "x", "is no run: expected a run folder, a folder of such, or a .pt file"),
    ],
)
def test_what_is_no_run_is_told(tmp_path: Path, name: str, content: str | None, message: str) -> None:
    path = tmp_path / name
    if path.suffix:
        path.write_text(content or "")
    else:
        path.mkdir(parents=True)
        if content is not None:
            (path / "final_config.yaml").write_text(content)
    with pytest.raises(UserError, match=message):
        runs_table([tmp_path / Path(name).parts[0]])


def test_the_mean_gradient_norm_leaves_out_the_beginning() -> None:
    points = [(5_000, 100.0), (10_000, 50.0), (10_016, 2.0), (400_000, 4.0)]
    assert mean_grad_norm(points, 400_000) == 3.0
    assert mean_grad_norm([(10, 9.0), (11, 1.0), (100, 2.0)], 100) == 1.5
    assert math.isnan(mean_grad_norm([], 100))


def table() -> Any:
    import pandas as pd

    rows = [
        ("relu", "local", 0.1, None),
        ("relu", "e2e", 0.2, None),
        ("topk", "e2e", 0.2, 16.0),
        ("topk", "e2e", 0.4, 32.0),
    ]
    return pd.DataFrame(rows, columns=["architecture", "run_type", "lr", "k"])


@pytest.mark.parametrize(
    ("conditions", "kept"),
    [
        ([], [0, 1, 2, 3]),
        (["architecture=relu"], [0, 1]),
        (["architecture=topk", "lr=2e-1"], [2]),
        (["k=16", "k=32.0"], [2, 3]),
        (["k=null", " run_type = e2e "], [1]),
    ],
)
def test_filters_keep_the_rows_that_meet_all_of_them(conditions: list[str], kept: list[int]) -> None:
    expected = table().iloc[kept].reset_index(drop=True)
    assert only_where(table(), conditions).equals(expected)


@pytest.mark.parametrize(
    ("conditions", "message"),
    [
        (["architecture"], "--where 'architecture' is malformed: expected COLUMN=VALUE"),
        (["architecure=relu"], "the runs have no column 'architecure'. Did you mean 'architecture'"),
        (["lr=fast"], "--where lr=fast: the column holds numbers"),
        (["k=17"], "no run has k=17; there are: null, 16, 32"),
        (["architecture=relu", "k=16"], "no run is left by --where architecture=relu and --where k=16"),
    ],
)
def test_a_filter_that_keeps_nothing_is_told(conditions: list[str], message: str) -> None:
    with pytest.raises(UserError) as error:
        only_where(table(), conditions)
    assert str(error.value).startswith(message)
