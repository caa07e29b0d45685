"""`paper_user_script.py` runs as it is: on the paper's library's own runs, and on runs that it trains."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.legacy import paper_user_script as script
from tests.tiny_models import random_tokens
from tests.tiny_runs import N_CTX, write_rows

CASES = ["local", "e2e", "e2e_ds", "mixed_multi"]
PRE = "blocks.1.hook_resid_pre"
BLOCKS = range(3)


@pytest.fixture(scope="module")
def golden(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the paper's library's runs, with a tokenizer where their configs have a placeholder."""
    folder = tmp_path_factory.mktemp("golden")
    for name in ("lm", "tokenizer", *(f"{case}/run" for case in CASES)):
        shutil.copytree(shared / "golden" / name, folder / name, copy_function=shutil.copyfile)
    config = folder / "lm" / "final_config.yaml"
    config.write_text(config.read_text().replace("TOKENIZER_DIR", str(folder / "tokenizer")))
    return folder


def check(found: dict[str, Any]) -> None:
    """What holds for every model."""
    torch.testing.assert_close(found["norms"], torch.ones_like(found["norms"]))
    torch.testing.assert_close(found["same_logits"], found["orig_logits"])
    assert not torch.allclose(found["new_logits"], found["orig_logits"])
    acts = found["acts"]
    torch.testing.assert_close(found["from_sae"], (acts.output, acts.c))
    torch.testing.assert_close(found["by_hand"], acts.output)
    # The first SAE reads what the clean model has.
    torch.testing.assert_close(found["local_acts"].input, acts.input)
    logs = found["logs"]
    assert logs["performance/eval/difference_ce_loss"] == pytest.approx(
        logs["performance/eval/orig_model_ce_loss"] - logs["performance/eval/sae_model_ce_loss"], abs=1e-5
    )
    assert found["loss"].shape == (1,)
    assert len(found["with_saes"]) == len(found["without"])


@pytest.mark.parametrize("case", CASES)
def test_the_script_uses_the_papers_own_runs(case: str, golden: Path, shared: Path):
    from safetensors.torch import load_file

    tokens = load_file(shared / "golden" / "tokens.safetensors")["eval"][-6:].long()
    found = script.use_run(golden / case / "run", tokens, prompt="The king")
    check(found)
    expected = load_file(shared / "golden" / case / "last_eval_batch_logits.safetensors")
    clean = next(v for k, v in expected.items() if k in ("clean", "orig", "clean_logits", "orig_logits"))
    spliced = next(v for k, v in expected.items() if k in ("spliced", "new", "spliced_logits", "new_logits"))
    torch.testing.assert_close(found["orig_logits"].cpu(), clean, atol=1e-4, rtol=0)
    torch.testing.assert_close(found["new_logits"].cpu(), spliced, atol=1e-4, rtol=0)
    assert found["with_saes"].startswith("The king")
    assert found["ids"].shape == (6, 5)
    state = torch.load(golden / case / "run" / "samples_144.pt", weights_only=True)
    key = next(k for k in state if k.endswith("decoder.weight"))
    assert found["norms"].shape == (state[key].shape[1],)


def legacy_values(model: Path, rows: Path, save_dir: Path, loss: dict[str, Any]) -> dict[str, Any]:
    """A config with the paper's library's keys only, all five losses among them."""
    data = {
        "dataset_name": str(rows), "is_tokenized": True, "tokenizer_name": str(model), "streaming": False,
        "split": "train", "n_ctx": N_CTX, "seed": None, "column_name": "input_ids",
    }  # fmt: skip
    terms = dict.fromkeys(("in_to_orig", "out_to_orig", "out_to_in", "logits_kl")) | loss
    return {
        "wandb_project": None, "wandb_run_name": None, "wandb_run_name_prefix": "mine_", "seed": 0,
        "tlens_model_name": None, "tlens_model_path": str(model), "save_dir": str(save_dir), "n_samples": 8,
        "save_every_n_samples": None, "eval_every_n_samples": 4, "eval_n_samples": 4, "batch_size": 2,
        "effective_batch_size": 4, "lr": 5e-3, "lr_schedule": "cosine", "min_lr_factor": 0.1, "warmup_samples": 4,
        "cooldown_samples": 0, "max_grad_norm": 10, "log_every_n_grad_steps": 1,
        "collect_act_frequency_every_n_samples": 4, "act_frequency_n_tokens": 16,
        "loss": {"sparsity": {"coeff": 1.5, "p_norm": 1.0}, **terms}, "train_data": data, "eval_data": data,
        "saes": {
            "dict_size_to_input_ratio": 2.0, "pretrained_sae_paths": None, "retrain_saes": False,
            "sae_positions": PRE,
        },
    }  # fmt: skip


def log_keys(m: str, terms: list[str], with_logits: bool) -> set[str]:
    """The paper's library's keys of a line, by its documentation."""
    keys = {f"loss/{m}/sparsity/{PRE}", f"sparsity/{m}/L_0/{PRE}", f"sparsity/{m}/frac_zeros/{PRE}"}
    for term in terms:
        kinds = ("", "explained_variance/", "explained_variance_std/", "explained_variance_ln/")
        keys |= {f"loss/{m}/{term.replace('?', kind)}" for kind in (*kinds, "explained_variance_ln_std/")}
    if with_logits:
        names = [f"{model}_{what}" for model in ("orig_model", "sae_model") for what in ("ce_loss", "top1_accuracy")]
        names += ["difference_ce_loss", "difference_top1_accuracy"]
        names += ["orig_vs_sae_top1_consistency", "orig_vs_sae_statistical_distance"]
        keys |= {f"loss/{m}/logits_kl", *(f"performance/{m}/{name}" for name in names)}
    return keys


@pytest.mark.parametrize("kind", ["e2e", "local"])
def test_the_script_trains_and_uses_its_own_run(kind: str, tiny_folder: Callable[[str], Path], tmp_path: Path):
    loss = {"out_to_in": {"coeff": 0.0}, "logits_kl": {"coeff": 1.0}} if kind == "e2e" else {"out_to_in": {"coeff": 1}}
    rows = write_rows(tmp_path / "rows.parquet", 1000)
    values = legacy_values(tiny_folder("gpt2"), rows, tmp_path / "out", loss)
    run_dir = script.train_from_python(values)
    name = "mine_seed-0_lpcoeff-1.5_logits-kl-1.0" if kind == "e2e" else "mine_seed-0_lpcoeff-1.5_in-to-out-1.0"
    assert run_dir.name.startswith(f"{name}_lr-0.005_ratio-2.0_{PRE}_2")
    check(script.use_run(run_dir, random_tokens(2, N_CTX), prompt="abc"))

    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    train = log_keys("train", [f"out_to_in/?{PRE}"], with_logits=kind == "e2e")
    resid = [f"in_to_orig/?blocks.{i}.hook_resid_post" for i in BLOCKS]
    evaluation = log_keys("eval", [f"out_to_in/?{PRE}", *resid], with_logits=True)
    general = {"loss", "grad_updates", "total_tokens", "lr"}
    assert general | train | evaluation <= lines[0].keys()
    assert "grad_norm" not in lines[0], "the first batch alone makes no optimizer step"
    assert "grad_norm" in lines[-1]
    has_train_output = any(key.startswith("performance/train/") for key in lines[0])
    assert has_train_output == (kind == "e2e")
    assert any(f"sparsity/alive_dict_elements/{PRE}" in line for line in lines)
    assert lines[-1]["samples"] == 8
    assert lines[-1]["total_tokens"] == 8 * N_CTX


def test_the_script_trains_from_a_file_with_lax_numbers(tiny_folder: Callable[[str], Path], tmp_path: Path):
    rows = write_rows(tmp_path / "rows.parquet", 1000)
    values = legacy_values(tiny_folder("gpt2"), rows, tmp_path / "out", {"out_to_in": {"coeff": 1}})
    values |= {"n_samples": 1000, "batch_size": 100, "effective_batch_size": None, "eval_every_n_samples": None}
    run_dir = script.train_from_yaml(values, tmp_path / "run.yaml")
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["samples"] == 1000
