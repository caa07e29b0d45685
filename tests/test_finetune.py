"""Fine-tuning: whatever SAE the library can load is trained on, in a run that says and resumes everything."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import e2e_sae.finetune
import e2e_sae.setup
from e2e_sae.checkpoint import load_run
from e2e_sae.config import Config
from e2e_sae.convert import convert_to_legacy
from e2e_sae.errors import UserError
from e2e_sae.evaluate_run import evaluate_run_dir
from e2e_sae.finetune import finetune, finetune_config
from e2e_sae.losses import LossConfigs
from e2e_sae.models.lm import load_lm
from e2e_sae.scripts.cli import main
from e2e_sae.setup import set_up
from e2e_sae.train import resume_training, train
from tests.checkpoint import test_saelens as saelens
from tests.killed_runs import assert_ended_alike, killed
from tests.tiny_runs import (
    E2E_DS,
    LOCAL,
    N_CTX,
    assert_same,
    console,
    lines_of,
    run_config,
    run_values,
    weights,
    write_rows,
)

A, B = "blocks.1.hook_resid_pre", "blocks.2.hook_resid_pre"
CE, L0 = "performance/eval/ce_increase", f"sparsity/train/L_0/{A}"


@pytest.fixture(scope="module")
def model(tiny_folder: Callable[[str], Path]) -> Path:
    return tiny_folder("gpt2")


def trained(model: Path, folder: Path, **changes: Any) -> Path:
    """Trains a local SAE on 16 samples and returns its run folder."""
    folder.mkdir(exist_ok=True)
    settings: dict[str, Any] = {
        "n_samples": 16,
        "train_data": {"holdout_fraction": 0.1},
        "wandb_run_name": "old",
        "max_grad_norm": 3.0,
        "dtype": "float64",
        "log_every_n_grad_steps": 100,
        "save_every_n_samples": 100,
        **changes,
    }
    run = train(run_config(model, write_rows(folder / "rows.parquet", 24), folder / "out", **settings))
    assert run is not None
    return run


@pytest.fixture(scope="module")
def relu(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(model, tmp_path_factory.mktemp("relu"), loss={**LOCAL, "out_to_in": {"coeff": 2.0}})


@pytest.fixture(scope="module")
def topk(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    saes = {"sae_positions": [A, B], "sae": {"architecture": "topk", "k": 4, "subtract_b_dec": True}}
    return trained(model, tmp_path_factory.mktemp("topk"), saes=saes, loss={"out_to_in": {"coeff": 1.0}})


# --- what is trained ---


def test_the_sae_its_model_and_data_are_the_runs_and_the_rest_is_the_papers(relu: Path, tmp_path: Path) -> None:
    old = Config.from_file(relu / "final_config.yaml")
    config = finetune_config(load_run(relu), overrides=[f"save_dir={tmp_path}"])
    assert config.loss == LossConfigs.from_dict(
        {
            "sparsity": {"coeff": 0.1},
            "out_to_in": {"coeff": 2.0},
            "logits_kl": {"coeff": 1.0},
            "kl_balance": "mse",
        }
    )
    # 5 % of 16 samples, in whole steps of 2.
    assert (config.lr, config.n_samples, config.eval_every_n_samples) == (5e-5, 2, 0)
    assert (config.lr_schedule, config.min_lr_factor, config.cooldown_samples) == ("linear", 0.0, 2)
    assert config.wandb_run_name == f"finetuned_{relu.name}"
    kept = ("lm", "train_data", "batch_size", "max_grad_norm", "seed", "device", "save_every_n_samples")
    assert all(getattr(config, key) == getattr(old, key) for key in kept)
    assert (config.saes.sae, config.saes.retrain_saes) == (old.saes.sae, True)
    assert config.saes.pretrained_sae_paths == [relu / "samples_16"]


def test_it_begins_with_the_stored_saes_and_ends_as_the_command_says(
    topk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = topk
    overrides = [f"save_dir={tmp_path}", "n_samples=12", "lr=0.01", "save_every_n_samples=4"]
    start = weights(source)
    parts = set_up(finetune_config(load_run(source), overrides=overrides).model_copy(update={"save_dir": None}))
    begun = {
        f"{position.name}/{name}": tensor
        for position, sae in parts.member.model.saes_at().items()
        for name, tensor in sae.stored_tensors.items()
    }
    assert all(torch.equal(begun[key], start[key]) for key in start)

    arguments = [argument for override in overrides for argument in ("--set", override)]
    assert main(["finetune", str(source), *arguments]) == 0
    said = capsys.readouterr().out
    (run,) = tmp_path.iterdir()
    before, after = evaluate_run_dir(source)[CE], evaluate_run_dir(run)[CE]
    assert f"before: CE increase {before:.4f}, L0 " in said
    assert f"after:  CE increase {after:.4f}, L0 " in said
    assert before != after
    assert load_run(run).saes.keys() == load_run(source).saes.keys()
    assert [sae.info for sae in load_run(run).saes.values()] == [sae.info for sae in load_run(source).saes.values()]

    again = killed(run, tmp_path / "killed", keep=-1)
    resume_training(again)
    assert_ended_alike(again, run)


def test_the_language_model_is_loaded_once_and_k_has_fallen_already(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saes = {"sae": {"architecture": "topk", "k": 4, "k_start": 9, "k_anneal_samples": 16}}
    source = trained(model, tmp_path / "old", saes=saes, loss={"out_to_in": {"coeff": 1.0}})
    loaded: list[Any] = []

    def load_once(*arguments: Any) -> Any:
        loaded.append(arguments)
        return load_lm(*arguments)

    for module in (e2e_sae.finetune, e2e_sae.setup):
        monkeypatch.setattr(module, "load_lm", load_once)
    with console():
        done = finetune(source, overrides=[f"save_dir={tmp_path / 'out'}"])
    assert len(loaded) == 1
    assert max(line[L0] for line in lines_of(done.run_dir)) <= 4 < lines_of(source)[0][L0]
    # It is what it would have been with a model of its own.
    config = Config.from_file(done.run_dir / "final_config.yaml", [f"save_dir={tmp_path / 'alone'}"])
    assert_same(weights(done.run_dir), weights(train(config)))


def test_a_folder_of_the_papers_library_is_improved_too(model: Path, tmp_path: Path) -> None:
    source = trained(model, tmp_path / "old", dtype="float32")
    legacy = convert_to_legacy(source, tmp_path / "legacy")
    rows = write_rows(tmp_path / "other.parquet", 12)
    (tmp_path / "c.yaml").write_text(
        yaml.safe_dump(
            {
                "tlens_model_path": str(model),
                "train_data": {"dataset_name": rows.name, "n_ctx": N_CTX, "holdout_fraction": 0.2},
                "n_samples": 4,
            }
        )
    )
    before = evaluate_run_dir(source, [f"train_data.dataset_name={rows}", "train_data.holdout_fraction=0.2"])
    with console():
        done = finetune(legacy, tmp_path / "c.yaml", [f"save_dir={tmp_path / 'out'}"])
    assert done.before.ce_increase == pytest.approx(before[CE], abs=1e-6)
    config = Config.from_file(done.run_dir / "final_config.yaml")
    assert config.train_data.dataset_name == str(rows)
    assert config.batch_size == 2
    assert config.loss.sparsity.coeff == 0.1


def test_a_saelens_folder_says_what_is_missing_until_nothing_is(model: Path, tmp_path: Path) -> None:
    folder = saelens.write(tmp_path / "sae", {**saelens.FLAT, "model_name": None})
    rows = write_rows(tmp_path / "rows.parquet", 12)
    given: list[str] = ["tlens_model_class=auto", f"save_dir={tmp_path / 'out'}", "device=cpu"]
    steps = [
        ("does not say which language model it belongs to: set tlens_model_name or", f"tlens_model_path={model}"),
        ("does not say how strongly sparsity was penalised: give loss.sparsity.coeff", "loss.sparsity.coeff=0.2"),
        ("does not say which data to train on: give 'train_data' in --config", f"train_data.dataset_name={rows}"),
        ("does not say how many sequences go in a batch: give 'batch_size'", "batch_size=2"),
        ("does not say how long it was trained: give n_samples", "n_samples=4"),
        (
            "there is nothing to evaluate on: give eval_data, or set train_data.holdout",
            "train_data.holdout_fraction=0.2",
        ),
    ]
    for words, more in steps:
        with pytest.raises(UserError) as caught:
            finetune(folder, overrides=given)
        assert words in str(caught.value)
        assert "\n" not in str(caught.value)
        given += [more, *([f"train_data.n_ctx={N_CTX}"] if "dataset_name" in more else [])]
    with console():
        done = finetune(folder, overrides=given)
    assert load_run(done.run_dir).saes[A].info.d_sae == 40


def test_a_wandb_run_is_fetched_and_one_that_cannot_be_had_is_one_line(
    relu: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    monkeypatch.setenv("SAE_CACHE_DIR", str(tmp_path / "cache"))
    with pytest.raises(UserError) as caught:
        finetune("someone/project/abc123")
    assert str(caught.value).startswith(
        "'someone/project/abc123' is neither a file or folder nor a W&B run that can be had: W&B cannot be reached"
    )
    assert "\n" not in str(caught.value)
    with pytest.raises(
        UserError, match="^'gone' is neither a file or folder nor a W&B run that can be had: 'gone' is no"
    ):
        finetune("gone")
    monkeypatch.setattr(e2e_sae.finetune, "fetch_wandb_run", {"someone/project/abc123": relu}.__getitem__)
    with console():
        done = finetune("someone/project/abc123", overrides=[f"save_dir={tmp_path}"])
    assert done.before.ce_increase == pytest.approx(evaluate_run_dir(relu)[CE])


# --- the sparsity ---


def test_l0_is_held_by_a_target_on_what_it_was(relu: Path, topk: Path, tmp_path: Path) -> None:
    with console():
        done = finetune(relu, overrides=[f"save_dir={tmp_path}", "n_samples=6"], hold_l0=True)
    sparsity = Config.from_file(done.run_dir / "final_config.yaml").loss.sparsity
    assert sparsity.target_l0 == pytest.approx(done.before.l0[A])
    assert sparsity.coeff == 0.1
    with console(), pytest.raises(UserError, match="--hold-l0 goes with one SAE, here are 2"):
        finetune(topk, overrides=[f"save_dir={tmp_path}"], hold_l0=True)


def with_settings(run: Path, folder: Path, last_line: str = "", **changes: Any) -> Path:
    """Copies a run whose config says something else."""
    copy = folder / "copy"
    shutil.copytree(run, copy)
    values = {**yaml.safe_load((copy / "final_config.yaml").read_text()), **changes}
    (copy / "final_config.yaml").write_text(yaml.safe_dump(values))
    with (copy / "metrics.jsonl").open("a") as file:
        file.write(last_line)
    return copy


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"loss": {"sparsity": {"coeff": 2.0, "final_coeff": 3.0, "warmup_samples": 9}}}, {"coeff": 3.0}),
        ({"loss": {"sparsity": {"coeff": 2.0, "target_l0": 9.0}}}, {"coeff": 0.7, "target_l0": 9.0}),
        (
            {
                "loss": {"sparsity": {"coeff": 2.0, "p_norm": 0.5}},
                "phases": [{"until": 0.5}, {"loss": {"sparsity": {"coeff": 4.0}}}],
            },
            {"coeff": 4.0, "p_norm": 0.5},
        ),
    ],
    ids=["a line", "a target", "phases"],
)
def test_the_coefficient_is_the_one_that_the_run_ended_with(
    changes: dict[str, Any], expected: dict[str, Any], relu: Path, tmp_path: Path
) -> None:
    line = f'{{"samples": 16, "sparsity/coeff/{A}": 0.7}}\n'
    copy = with_settings(relu, tmp_path, line, **changes)
    config = finetune_config(load_run(copy), overrides=[f"save_dir={tmp_path}"])
    assert config.loss.sparsity == LossConfigs.from_dict({"sparsity": expected}).sparsity
    assert config.phases is None


# --- mistakes and choices ---


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["saes.retrain_saes=false"], "finetune takes the SAEs as they are stored: leave 'saes' out"),
        (["save_dir=null"], "finetune measures the SAE at the end and keeps it: leave out save_dir and"),
        (["eval_every_n_samples=null"], "finetune measures the SAE at the end and keeps it: leave out save_dir and"),
        (["train_data.holdout_fraction=null"], "there is nothing to evaluate on: give eval_data, or set train_data.h"),
        (["loss.logits_kl=null"], "kl_balance: mse weighs logits_kl against out_to_in and needs both"),
        (["tlens_model_path=gone"], "config key 'tlens_model_path': no such file or folder: 'gone'"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(
    overrides: list[str], words: str, relu: Path, in_tmp_dir: Path
) -> None:
    with pytest.raises(UserError) as caught:
        finetune(relu, overrides=overrides)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list(in_tmp_dir.iterdir())


def test_saes_of_two_kinds_are_refused(topk: Path, tmp_path: Path) -> None:
    run = load_run(topk)
    info = run.saes[B].info
    other = info.model_copy(update={"options": {**info.options, "k": 2}})
    run.saes[B] = run.saes[B].__class__(other, run.saes[B].tensors)
    with pytest.raises(UserError, match=rf"has SAEs of different kinds \(k at {A} and at {B}\)"):
        finetune_config(run)


def test_what_the_user_says_goes_over_the_defaults(relu: Path, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("lr: 1e-3\nloss: {kl_balance: null, logits_kl: {coeff: 3}}\nwarmup_samples: 2\n")
    config = finetune_config(load_run(relu), tmp_path / "c.yaml", ["n_samples=8", "loss.out_to_in=null"])
    assert config.loss == LossConfigs.from_dict({"sparsity": {"coeff": 0.1}, "logits_kl": {"coeff": 3.0}})
    assert (config.lr, config.warmup_samples, config.cooldown_samples) == (1e-3, 2, 6)
    cosine = finetune_config(load_run(relu), overrides=["lr_schedule=cosine"])
    assert (cosine.cooldown_samples, cosine.min_lr_factor) == (0, 0.0)


# --- stored SAEs in other runs ---


def test_the_configs_in_the_documentation_are_valid(repo: Path, relu: Path) -> None:
    texts = (repo / "docs/finetuning.md").read_text().split("```yaml\n")[1:]
    values = [yaml.safe_load(text.split("```")[0].replace("out/<run>", str(relu))) for text in texts]
    phased, ds = [Config.from_dict(one, base_dir=repo / "demos") for one in values]
    assert [config.is_local for config in phased.phase_configs] == [True, False]
    assert phased.final_loss.kl_balance == "mse"
    assert ds.saes.pretrained_sae_paths == [relu]


def test_e2e_ds_begins_with_a_local_sae(relu: Path, model: Path, tmp_path: Path) -> None:
    config = run_config(
        model,
        write_rows(tmp_path / "rows.parquet", 8),
        tmp_path / "out",
        loss={**E2E_DS, "in_to_orig": {"total_coeff": 1.0, "hook_positions": [B]}},
        saes={"pretrained_sae_paths": str(relu), "retrain_saes": True},
        dtype="float64",
        # The first step of a warm-up has learning rate 0.
        warmup_samples=4,
        save_every_n_samples=2,
    )
    run = train(config)
    assert run is not None
    first, last, start = weights(run / "samples_2"), weights(run), weights(relu)
    assert all(torch.equal(first[key], start[key]) for key in start)
    assert not any(torch.equal(last[key], start[key]) for key in start)


@pytest.mark.parametrize(
    ("option", "words", "retrain"),
    [
        ({"k": 3}, "k: 4 -> 3", False),
        ({"k": 3}, "k: 4 -> 3", True),
        ({"subtract_b_dec": False}, "subtract_b_dec: True -> False", False),
        ({"decoder_norm": "free"}, "decoder_norm: in_forward -> free", True),
        ({"decoder_norm": "projected", "encoder_init": "transposed"}, None, False),
    ],
)
def test_options_that_change_what_a_stored_sae_computes_are_told(
    option: dict[str, Any], words: str | None, retrain: bool, topk: Path, model: Path, tmp_path: Path
) -> None:
    values = run_values(model, write_rows(tmp_path / "rows.parquet", 8), None, dtype="float64", n_samples=2)
    kind = {"architecture": "topk", "k": 4, "subtract_b_dec": True, **option}
    # An SAE more, so that something is left to train.
    values["saes"] |= {"sae_positions": [A, "blocks.0.hook_resid_pre"], "sae": kind}
    values["saes"] |= {"pretrained_sae_paths": str(topk), "retrain_saes": retrain}
    config = Config.from_dict(values)
    if words is not None and not retrain:
        with pytest.raises(UserError) as caught:
            set_up(config)
        said = [str(caught.value)]
        assert "set them in saes.sae as they were, or let it train on with saes.retrain_saes: true" in said[0]
    else:
        with console() as said:
            set_up(config)
    told = [line for line in said if f"the SAE at {A} in '{topk}'" in line]
    assert len(told) == (words is not None)
    assert all(f"other options ({words})" in line for line in told)
