"""The sample configs and sweeps have the paper's library's values, and `paper/` those of the paper's tables."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from e2e_sae.config import Config
from e2e_sae.settings import REPO_ROOT
from e2e_sae.sweeps.plan import plan_sweep
from e2e_sae.sweeps.sweep_file import read_sweep

FOLDER = REPO_ROOT / "e2e_sae" / "scripts" / "train_tlens_saes"
PAPER = sorted((FOLDER / "paper").glob("*.yaml"))

OPENWEBTEXT = ("apollo-research/Skylion007-openwebtext-tokenizer-gpt2", "gpt2", 1024)
PILE = (
    "apollo-research/monology-pile-uncopyrighted-tokenizer-EleutherAI-gpt-neox-20b",
    "EleutherAI/gpt-neox-20B",
    2048,
)
STORIES = ("apollo-research/roneneldan-TinyStories-tokenizer-gpt2", "gpt2", 512)
GPT2 = {
    "tlens_model_name": "gpt2-small", "n_samples": 400_000, "act_frequency_n_tokens": 500_000, "batch_size": 8,
    "effective_batch_size": 16, "lr": 5e-4, "max_grad_norm": 10, "data": OPENWEBTEXT, "splits": ("train", "train"),
    "position": "blocks.6.hook_resid_pre", "ratio": 60,
}  # fmt: skip
TINYSTORIES = {
    "tlens_model_name": "roneneldan/TinyStories-1M", "n_samples": 400_000, "act_frequency_n_tokens": 500_000,
    "batch_size": 20, "effective_batch_size": 20, "lr": 1e-3, "max_grad_norm": 1, "data": STORIES,
    "splits": ("train", "validation"), "position": "blocks.4.hook_resid_pre", "ratio": 50,
}  # fmt: skip
PYTHIA = {
    "tlens_model_name": "pythia-14m", "n_samples": 200_000, "act_frequency_n_tokens": 1_000_000, "batch_size": 8,
    "effective_batch_size": 8, "lr": 5e-4, "max_grad_norm": None, "data": PILE, "splits": ("train", "train"),
    "position": "blocks.3.hook_resid_pre", "ratio": 60,
}  # fmt: skip
# Coefficients: sparsity, (total, first downstream layer), out_to_in, logits_kl.
SAMPLES = {
    "gpt2_local": (GPT2, "gpt2-layerwise_play", (6.0, None, 1.0, None)),
    "gpt2_e2e": (GPT2, "gpt2-e2e_play", (1.5, None, 0.0, 1.0)),
    "gpt2_e2e_recon": (GPT2, "gpt2-e2e", (1.5, (2.5, 7), 0.0, 0.5)),
    "pythia_14m_e2e": (PYTHIA, "pythia-14m", (1.0, None, 0.0, 1.0)),
    "tinystories_1M_e2e": (TINYSTORIES, "tinystories-1m-2", (3.0, None, 0.0, 1.0)),
    "tinystories_1M_local": (TINYSTORIES, "tinystories-1m_play", (0.01, None, 1.0, None)),
}

# Table (2: similar CE, 3: similar L0), layer, type: lambda, L0, thousands alive, CE increase, run.
ROWS = {
    (2, 2, "local"): (0.8, 73.5, 41, 0.016, "ue3lz0n7"),
    (2, 2, "e2e"): (0.5, 33.4, 22, 0.020, "ovhfts9n"),
    (2, 2, "e2e_ds"): (10, 36.2, 18, 0.015, "visi12en"),
    (2, 6, "local"): (4, 69.4, 26, 0.144, "1jy3m5j0"),
    (2, 6, "e2e"): (3, 27.5, 22, 0.145, "zgdpkafo"),
    (2, 6, "e2e_ds"): (50, 36.8, 15, 0.124, "2lzle2f0"),
    (2, 10, "local"): (6, 162.7, 33, 0.122, "m2hntlav"),
    (2, 10, "e2e"): (1.5, 62.3, 25, 0.131, "8crnit9h"),
    (2, 10, "e2e_ds"): (1.75, 70.2, 25, 0.144, "cvj5um2h"),
    (3, 2, "local"): (4, 18.4, 18, 0.101, "6vtk4k51"),
    (3, 2, "e2e"): (1.5, 18.6, 20, 0.043, "bst0prdd"),
    (3, 2, "e2e_ds"): (35, 17.9, 15, 0.039, "e26jflpq"),
    (3, 6, "local"): (6, 42.8, 21, 0.228, "jup3glm9"),
    (3, 6, "e2e"): (1.5, 39.7, 25, 0.099, "tvj2owza"),
    (3, 6, "e2e_ds"): (50, 36.8, 15, 0.124, "2lzle2f0"),
    (3, 10, "local"): (10, 74.9, 28, 0.202, "5vmpdgaz"),
    (3, 10, "e2e"): (1.5, 62.3, 25, 0.131, "8crnit9h"),
    (3, 10, "e2e_ds"): (1.75, 70.2, 25, 0.144, "cvj5um2h"),
}
DOWNSTREAM_COEFF = {2: 2.5, 6: 2.5, 10: 0.05}
N_GPT2_BLOCKS = 12


def expected(model: dict[str, Any], project: str | None, coeffs: tuple[Any, ...]) -> dict[str, Any]:
    """Returns the whole config that a row of a table stands for."""
    sparsity, downstream, out_to_in, kl = coeffs
    name, tokenizer, n_ctx = model["data"]
    data = {"dataset_name": name, "tokenizer_name": tokenizer, "n_ctx": n_ctx, "is_tokenized": True, "streaming": True}
    in_to_orig = None
    if downstream is not None:
        total, first = downstream
        hooks = [f"blocks.{i}.hook_resid_pre" for i in range(first, N_GPT2_BLOCKS)]
        in_to_orig = {"total_coeff": total, "hook_positions": hooks}
    own = {key: value for key, value in model.items() if key not in ("data", "splits", "position", "ratio")}
    values = own | {
        "wandb_project": project, "seed": 0, "save_every_n_samples": None, "eval_every_n_samples": 40_000,
        "eval_n_samples": 500, "log_every_n_grad_steps": 20, "collect_act_frequency_every_n_samples": 40_000,
        "lr_schedule": "cosine", "min_lr_factor": 0.1, "warmup_samples": 20_000,
        "loss": {
            "sparsity": {"p_norm": 1, "coeff": sparsity}, "in_to_orig": in_to_orig, "out_to_orig": None,
            "out_to_in": {"coeff": out_to_in}, "logits_kl": None if kl is None else {"coeff": kl},
        },
        "train_data": data | {"split": model["splits"][0]}, "eval_data": data | {"split": model["splits"][1]},
        "saes": {"sae_positions": [model["position"]], "dict_size_to_input_ratio": model["ratio"]},
    }  # fmt: skip
    return Config.from_dict(values).to_dict()


@pytest.mark.parametrize("name", SAMPLES)
def test_sample_configs_have_the_values_of_the_papers_library(name: str):
    assert Config.from_file(FOLDER / f"{name}.yaml").to_dict() == expected(*SAMPLES[name])


def paper_file(table: int, layer: int, kind: str) -> str:
    """A row that is in both tables has one file."""
    other = 5 - table
    is_shared = ROWS[table, layer, kind] == ROWS[other, layer, kind]
    return f"similar_{'ce_and_l0' if is_shared else {2: 'ce', 3: 'l0'}[table]}_layer_{layer}_{kind}.yaml"


def test_there_is_one_file_for_each_run_of_the_tables():
    assert len({row[-1] for row in ROWS.values()}) == 15
    assert {path.name for path in PAPER} == {paper_file(*key) for key in ROWS}


@pytest.mark.parametrize("key", ROWS, ids=lambda key: "table{}-layer{}-{}".format(*key))
def test_paper_configs_are_the_rows_of_the_tables(key: tuple[int, int, str]):
    table, layer, kind = key
    lambda_, l0, n_alive, ce, run = ROWS[key]
    coeffs = {
        "local": (lambda_, None, 1.0, None),
        "e2e": (lambda_, None, 0.0, 1.0),
        "e2e_ds": (lambda_, (DOWNSTREAM_COEFF[layer], layer + 1), 0.0, 0.5),
    }[kind]
    path = FOLDER / "paper" / paper_file(table, layer, kind)
    model = GPT2 | {"position": f"blocks.{layer}.hook_resid_pre"}
    assert Config.from_file(path).to_dict() == expected(model, None, coeffs)
    head = " ".join(line for line in path.read_text().splitlines() if line.startswith("#"))
    assert f"layer {layer}, {kind.replace('_ds', '+downstream')}; run sparsify/gpt2/{run}." in head
    assert f"L0 {l0}, {n_alive}k alive, CE increase {ce:.3f}" in head
    assert {2: "similar CE", 3: "similar L0"}[table] in head


# Base config, what varies, what is fixed.
SWEEPS: dict[str, tuple[str, dict[str, list[Any]], dict[str, Any]]] = {
    "gpt2_local_sweep": (
        "gpt2_local",
        {"seed": [0, 1], "loss.sparsity.coeff": [1, 3, 6, 10, 15, 20, 30]},
        {"lr": 5e-4, "saes.sae_positions": ["blocks.10.hook_resid_pre"], "saes.dict_size_to_input_ratio": 60},
    ),
    "gpt2_e2e_sweep": (
        "gpt2_e2e",
        {"loss.sparsity.coeff": [0.08, 0.2, 0.8, 2]},
        {"lr": 5e-4, "saes.sae_positions": ["blocks.2.hook_resid_pre"], "saes.dict_size_to_input_ratio": 60},
    ),
    "gpt2_e2e_recon_sweep": (
        "gpt2_e2e_recon",
        {"loss.sparsity.coeff": [0.8, 2.5, 5], "loss.in_to_orig.total_coeff": [0.05, 0.1]},
        {
            "lr": 5e-4,
            "loss.in_to_orig.hook_positions": ["blocks.11.hook_resid_pre"],
            "loss.logits_kl.coeff": 0.5,
            "saes.sae_positions": ["blocks.10.hook_resid_pre"],
            "saes.dict_size_to_input_ratio": 60,
        },
    ),
    "tinystories_1M_e2e_sweep": (
        "tinystories_1M_e2e",
        {"lr": [1e-2, 5e-3, 1e-3], "loss.sparsity.coeff": [50, 30, 20], "saes.dict_size_to_input_ratio": [5, 10]},
        {"n_samples": 450_000, "saes.sae_positions": ["blocks.1.hook_resid_pre"]},
    ),
    "tinystories_1M_local_sweep": (
        "tinystories_1M_local",
        {
            "loss.sparsity.coeff": [0.001, 0.005, 0.008, 0.01, 0.02, 0.05],
            "saes.dict_size_to_input_ratio": [5, 20, 60, 100],
        },
        {"lr": 1e-3, "saes.sae_positions": ["blocks.4.hook_resid_pre"]},
    ),
}
NAMES = {"gpt2_local_sweep": "gpt2_local", "gpt2_e2e_sweep": "gpt2-e2e", "tinystories_1M_e2e_sweep": "logits_kl"}


@pytest.mark.parametrize("name", SWEEPS)
def test_sweeps_vary_what_those_of_the_papers_library_vary(name: str, tmp_path: Path):
    base, varied, fixed = SWEEPS[name]
    sweep = read_sweep(FOLDER / f"{name}.yaml")
    assert sweep.base_file == FOLDER / f"{base}.yaml"
    assert sweep.program == FOLDER / "run_train_tlens_saes.py"
    assert sweep.config.method == "grid"
    if name in NAMES:
        assert sweep.config.name == NAMES[name]
    assert sweep.config.project == yaml.safe_load((FOLDER / f"{base}.yaml").read_text())["wandb_project"]
    values = {parameter.name: parameter.grid() for parameter in sweep.parameters}
    assert values == varied | {key: [value] for key, value in fixed.items()}
    n_runs = 1
    for choices in varied.values():
        n_runs *= len(choices)
    assert plan_sweep(sweep, [], lambda run: None, tmp_path / "unused").n_runs == n_runs
