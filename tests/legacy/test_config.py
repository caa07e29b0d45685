"""The paper's library's config: every key, its default, whether null is allowed, and what is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from e2e_sae.base_config import deep_update
from e2e_sae.config import Config
from e2e_sae.data.dataset_config import DatasetConfig
from e2e_sae.errors import UserError
from e2e_sae.settings import REPO_ROOT
from tests.tiny_runs import write_rows

REQUIRED = "no default"
RUN = {
    "wandb_project": (None, True),
    "wandb_run_name": (None, True),
    "wandb_run_name_prefix": ("", False),
    "seed": (0, False),
    "tlens_model_name": (None, True),
    "tlens_model_path": (None, True),
    "n_samples": (None, True),
    "save_every_n_samples": (REQUIRED, True),
    "eval_every_n_samples": (None, True),
    "eval_n_samples": (REQUIRED, True),
    "batch_size": (REQUIRED, False),
    "effective_batch_size": (None, True),
    "lr": (REQUIRED, False),
    "lr_schedule": ("cosine", False),
    "min_lr_factor": (0.1, False),
    "warmup_samples": (0, False),
    "cooldown_samples": (0, False),
    "max_grad_norm": (None, True),
    "log_every_n_grad_steps": (20, False),
    "collect_act_frequency_every_n_samples": (20000, False),
    "act_frequency_n_tokens": (100000, False),
    "loss": (REQUIRED, False),
    "train_data": (REQUIRED, False),
    "eval_data": (None, True),
    "saes": (REQUIRED, False),
    "saes.dict_size_to_input_ratio": (1.0, False),
    "saes.pretrained_sae_paths": (None, True),
    "saes.retrain_saes": (False, False),
    "saes.sae_positions": (REQUIRED, False),
    "loss.sparsity": (REQUIRED, False),
    "loss.sparsity.coeff": (REQUIRED, False),
    "loss.sparsity.p_norm": (1.0, False),
    "loss.in_to_orig": (REQUIRED, True),
    "loss.out_to_orig": (REQUIRED, True),
    "loss.out_to_in": (REQUIRED, True),
    "loss.logits_kl": (REQUIRED, True),
    "train_data.dataset_name": (REQUIRED, False),
    "train_data.is_tokenized": (True, False),
    "train_data.tokenizer_name": (REQUIRED, False),
    "train_data.streaming": (True, False),
    "train_data.split": (REQUIRED, False),
    "train_data.n_ctx": (REQUIRED, False),
    "train_data.seed": (None, True),
    "train_data.column_name": ("input_ids", False),
}
"""Key: (default, whether null is allowed). Where it is null by default and one of two must be given, see below."""

OPTIONAL_HERE = {"save_every_n_samples", "eval_n_samples", "train_data.tokenizer_name", "train_data.split"} | {
    f"loss.{term}" for term in ("in_to_orig", "out_to_orig", "out_to_in", "logits_kl")
}
"""Keys that had to be there, and need not be now."""


def minimal() -> dict[str, Any]:
    data = {"dataset_name": "owner/name", "tokenizer_name": "gpt2", "split": "train", "n_ctx": 8}
    loss: dict[str, Any] = dict.fromkeys(("in_to_orig", "out_to_orig", "out_to_in", "logits_kl"))
    return {
        "tlens_model_name": "gpt2",
        "save_every_n_samples": None,
        "eval_n_samples": None,
        "batch_size": 2,
        "lr": 1e-3,
        "n_samples": 10,
        "loss": {"sparsity": {"coeff": 1.0}, **loss},
        "train_data": data,
        "saes": {"sae_positions": "blocks.1.hook_resid_pre"},
    }


def nested(key: str, value: Any) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def without(values: dict[str, Any], key: str) -> dict[str, Any]:
    first, _, rest = key.partition(".")
    kept = {k: v for k, v in values.items() if k != first}
    return kept | {first: without(values[first], rest)} if rest else kept


def read(config: Any, key: str) -> Any:
    for part in key.split("."):
        config = getattr(config, part)
    return config


@pytest.mark.parametrize("key", [key for key, (default, _) in RUN.items() if default != REQUIRED])
def test_a_key_that_is_left_out_has_its_default(key: str):
    values = minimal()
    if key in ("tlens_model_name", "n_samples"):  # given in the minimal config
        assert Config.model_fields[key].default is None
        return
    assert read(Config.from_dict(values), key) == RUN[key][0]


@pytest.mark.parametrize("key", [key for key, (default, _) in RUN.items() if default == REQUIRED])
def test_a_key_without_default_is_asked_for_unless_there_is_no_need(key: str):
    values = without(minimal(), key)
    if key in OPTIONAL_HERE:
        Config.from_dict(values)
        return
    with pytest.raises(UserError, match=f"missing config key '{key}"):
        Config.from_dict(values)


@pytest.mark.parametrize("key", RUN)
def test_null_is_taken_where_it_was(key: str):
    changes = nested(key, None)
    if key == "tlens_model_name":  # one of the two must be given
        changes["tlens_model_path"] = str(REPO_ROOT)
    values = deep_update(minimal(), changes)
    if RUN[key][1] or key in OPTIONAL_HERE - {"train_data.split"}:
        assert read(Config.from_dict(values), key) is None
    else:
        with pytest.raises(UserError, match=f"config key '{key}"):
            Config.from_dict(values)


def test_the_runs_are_saved_in_out_below_the_working_directory(in_tmp_dir: Path):
    assert Config.from_dict(minimal()).save_dir == in_tmp_dir / "out"
    assert Config.from_dict(minimal() | {"save_dir": None}).save_dir is None


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("lr", "5e-4", 0.0005),
        ("lr", "1", 1.0),
        ("n_samples", "400_000", 400000),
        ("n_samples", "4.0e+5", 400000),
        ("max_grad_norm", "10", 10.0),
        ("loss.sparsity.coeff", "'6'", 6.0),
        ("saes.dict_size_to_input_ratio", "60", 60.0),
        ("batch_size", "'8'", 8),
    ],
)
def test_numbers_are_lax(key: str, text: str, value: float):
    config = Config.from_dict(deep_update(minimal(), nested(key, yaml.safe_load(text))))
    assert read(config, key) == value
    assert type(read(config, key)) is type(value)


def test_scalars_are_wrapped_into_lists(tmp_path: Path):
    weights = tmp_path / "sae.pt"
    weights.touch()
    saes = {"sae_positions": "hook_resid_pre", "pretrained_sae_paths": weights}
    in_to_orig = {"total_coeff": 1, "hook_positions": "blocks.2.hook_resid_pre"}
    config = Config.from_dict(deep_update(minimal(), {"saes": saes, "loss": {"in_to_orig": in_to_orig}}))
    assert config.saes.sae_positions == ["hook_resid_pre"]
    assert config.saes.pretrained_sae_paths == [weights]
    assert config.loss.in_to_orig is not None
    assert config.loss.in_to_orig.hook_positions == ["blocks.2.hook_resid_pre"]


@pytest.mark.parametrize(
    ("old", "key", "value"),
    [
        ({"sae_position_name": "blocks.3"}, "saes.sae_positions", ["blocks.3"]),
        ({"sae_position_names": ["a", "b"]}, "saes.sae_positions", ["a", "b"]),
        ({"saes": {"sae_position_names": "a"}}, "saes.sae_positions", ["a"]),
        ({"loss": {"sparsity": {"coeff": 2}, "inp_to_out": {"coeff": 3}}}, "loss.out_to_in.coeff", 3.0),
        (
            {"loss": {"sparsity": {"coeff": 2}, "inp_to_orig": {"coeff": 3, "hook_positions": ["a"]}}},
            "loss.in_to_orig.total_coeff",
            3.0,
        ),
        ({"collect_output_metrics_every_n_samples": 0}, "lr", 1e-3),
        ({"layerwise": True}, "lr", 1e-3),
        ({"warmup_steps": 5}, "warmup_samples", 10),
        ({"warmup_steps": 5, "effective_batch_size": 6}, "warmup_samples", 30),
        ({"train": {"lr": "1e-2", "seed": 3}}, "lr", 0.01),
        ({"train": {"lr": "1e-2", "seed": 3}}, "seed", 3),
    ],
)
def test_old_keys_are_taken(old: dict[str, Any], key: str, value: Any):
    values = minimal()
    for section in ("saes", "loss"):
        if section in old or (section == "saes" and any("sae_position" in name for name in old)):
            del values[section]
    if "train" in old:
        del values["lr"]
    assert read(Config.from_dict(values | old), key) == value


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tlens_model_name": None}, "exactly one of tlens_model_name and tlens_model_path (given: neither)"),
        ({"tlens_model_path": str(REPO_ROOT)}, "exactly one of tlens_model_name and tlens_model_path (given: both)"),
        ({"effective_batch_size": 3}, "effective_batch_size=3 must be a multiple of batch_size=2"),
        ({"eval_every_n_samples": 4, "eval_n_samples": 2}, "there is nothing to evaluate on: give eval_data"),
        ({"cooldown_samples": 5}, "cooldown_samples=5 needs lr_schedule: linear"),
        ({"lr": 0}, "config key 'lr': input should be greater than 0"),
        ({"batch_size": 0}, "config key 'batch_size': input should be greater than 0"),
        ({"seed": -1}, "config key 'seed'"),
        ({"lr_schedule": "constant"}, "config key 'lr_schedule'"),
        ({"something": 1}, "unknown config key 'something'"),
        ({"loss": {"in_to_orig": {"coeff_total": 1}}}, "unknown config key 'loss.in_to_orig.coeff_total'"),
    ],
)
def test_what_was_refused_is_refused(changes: dict[str, Any], words: str):
    with pytest.raises(UserError) as caught:
        Config.from_dict(deep_update(minimal(), changes))
    assert words in str(caught.value)


def test_evaluating_only_at_the_end_and_on_everything_is_possible():
    data = minimal()["train_data"] | {"split": "validation"}
    config = Config.from_dict(minimal() | {"eval_every_n_samples": 0, "eval_data": data})
    assert (config.eval_every_n_samples, config.eval_n_samples) == (0, None)


def test_a_run_without_a_known_length_needs_n_samples_for_a_cosine_when_it_starts(
    tiny_folder: Callable[[str], Path], tmp_path: Path
):
    from e2e_sae.optim import make_schedule

    with pytest.raises(UserError, match="lr_schedule 'cosine' needs n_samples"):
        make_schedule("cosine", n_samples=None, effective_batch_size=1)
    rows = write_rows(tmp_path / "rows.parquet", 4)
    data = DatasetConfig(dataset_name=str(rows), n_ctx=8)
    assert Config.from_dict(minimal() | {"n_samples": None, "train_data": data}).n_samples is None


def test_relative_paths_may_start_at_the_clone(in_tmp_dir: Path):
    values = minimal() | {"tlens_model_name": None, "tlens_model_path": "e2e_sae/config.py"}
    assert Config.from_dict(values).tlens_model_path == REPO_ROOT / "e2e_sae" / "config.py"
    nearer = in_tmp_dir / "e2e_sae" / "config.py"
    nearer.parent.mkdir()
    nearer.touch()
    assert Config.from_dict(values).tlens_model_path == nearer


# --- the run's name


def test_the_generated_name_is_the_recorded_one():
    values = minimal() | {
        "lr": 5e-4,
        "saes": {"sae_positions": "blocks.6.hook_resid_pre", "dict_size_to_input_ratio": 60},
        "loss": {"sparsity": {"coeff": 1.5}, "out_to_in": {"coeff": 0}, "logits_kl": {"coeff": 1}},
    }
    name = "seed-0_lpcoeff-1.5_logits-kl-1.0_lr-0.0005_ratio-60.0_blocks.6.hook_resid_pre"  # [ran]
    assert Config.from_dict(values).run_name == name
    assert Config.from_dict(values | {"wandb_run_name": "", "wandb_run_name_prefix": "x-"}).run_name == f"x-{name}"
    assert Config.from_dict(values | {"wandb_run_name": "n", "wandb_run_name_prefix": "x-"}).run_name == "x-n"
    loss = {"out_to_in": {"coeff": 2}, "in_to_orig": {"total_coeff": 0.05, "hook_positions": "a"}}
    labels = "_lpcoeff-1.5_in-to-out-2.0_logits-kl-1.0_in-to-orig-0.05_lr-"
    assert labels in Config.from_dict(deep_update(values, {"loss": loss})).run_name


def test_a_name_has_at_most_200_characters():
    positions = [f"blocks.{i}.hook_resid_pre" for i in range(12)]
    config = Config.from_dict(deep_update(minimal(), {"saes": {"sae_positions": positions}}))
    assert len(config.run_name) == 200
    assert config.run_name.endswith("-blocks.6.hook_resi")
    assert len(Config.from_dict(minimal() | {"wandb_run_name": "x" * 300}).run_name) == 200
