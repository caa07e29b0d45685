"""Configs from dictionaries and YAML: coercion, overrides, and one clear line per problem."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt, ValidationError

from e2e_sae.base_config import BaseConfig, apply_overrides, deep_update, read_yaml
from e2e_sae.errors import MissingFileError, UserError


class Penalty(BaseConfig):
    coeff: PositiveFloat
    hooks: list[str] = []


class Run(BaseConfig):
    lr: float
    """Learning rate."""
    n_samples: PositiveInt = 1
    seed: NonNegativeInt | None = None
    shuffle: bool = True
    either: bool | int = 0
    penalty: Penalty | None = None
    penalties: list[Penalty] = []


def _message(values: dict[Any, Any]) -> str:
    with pytest.raises(UserError) as caught:
        Run.from_dict(values)
    return str(caught.value)


def _yaml(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


# --- values


def test_numbers_that_yaml_reads_as_strings_become_numbers(tmp_path: Path) -> None:
    # PyYAML follows YAML 1.1, where 5e-4 has no dot and is a string, and 400_000 is an integer.
    assert yaml.safe_load("5e-4") == "5e-4"
    run = Run.from_file(_yaml(tmp_path, "lr: 5e-4\nn_samples: 400_000\n"))
    assert (run.lr, run.n_samples) == (0.0005, 400000)


def test_a_config_cannot_be_changed() -> None:
    run = Run(lr=1.0)
    with pytest.raises(ValidationError, match="frozen"):
        run.lr = 2.0  # pyright: ignore[reportAttributeAccessIssue]


def test_yaml_round_trip_gives_an_equal_config(tmp_path: Path) -> None:
    run = Run(lr=5e-4, seed=3, penalty=Penalty(coeff=2.0, hooks=["blocks.0.hook_resid_pre"]))
    assert Run.from_file(_yaml(tmp_path, run.to_yaml())) == run


def test_to_dict_fills_in_every_default() -> None:
    assert set(Run(lr=1.0).to_dict()) == set(Run.model_fields)


# --- one line per problem


def test_an_unknown_key_is_shown_with_the_nearest_valid_one() -> None:
    assert _message({"lr": 1, "n_sample": 3}) == "unknown config key 'n_sample'. Did you mean 'n_samples'?"


def test_an_unknown_key_unlike_any_lists_the_valid_ones() -> None:
    assert _message({"lr": 1, "penalty": {"coeff": 1, "zzz": 1}}) == (
        "unknown config key 'penalty.zzz'. Valid keys: coeff, hooks."
    )


def test_nested_keys_are_named_with_dots_and_compared_with_their_own_level() -> None:
    message = _message({"lr": 1, "penalty": {"coef": 1}})
    assert message.splitlines() == [
        "missing config key 'penalty.coeff'",
        "unknown config key 'penalty.coef'. Did you mean 'coeff'?",
    ]


def test_problems_in_lists_carry_their_index() -> None:
    message = _message({"lr": 1, "penalties": [{"coeff": 1}, {"coeff": -1, "hook": []}]})
    assert message.splitlines() == [
        "config key 'penalties.1.coeff': input should be greater than 0 (given: -1)",
        "unknown config key 'penalties.1.hook'. Did you mean 'hooks'?",
    ]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({}, "missing config key 'lr'"),
        ({"lr": "fast"}, "config key 'lr': input should be a valid number"),
        ({"lr": "fast"}, "(given: 'fast')"),
        ({"lr": [1]}, "(given: a list)"),
        ({"lr": {"x": 1}}, "(given: a mapping)"),
        ({"lr": None}, "(given: None)"),
        ({"lr": float("nan")}, "config key 'lr': input should be a finite number (given: nan)"),
        ({"lr": float("inf")}, "config key 'lr': input should be a finite number (given: inf)"),
        ({"lr": 1, "n_samples": 0}, "config key 'n_samples': input should be greater than 0 (given: 0)"),
        ({"lr": 1, "n_samples": 1.5}, "config key 'n_samples': input should be a valid integer"),
        ({"lr": 1, "seed": -1}, "greater than or equal to 0 (given: -1)"),
        ({"lr": True}, "config key 'lr': a boolean does not belong here"),
        ({"lr": 1, "n_samples": True}, "config key 'n_samples': a boolean does not belong here"),
        ({"lr": 1, "penalty": True}, "config key 'penalty': a boolean does not belong here"),
        ({"lr": 1, "shuffle": "perhaps"}, "config key 'shuffle': input should be a valid boolean"),
        ({"lr": 1, "penalty": 3}, "config key 'penalty': expected a mapping of settings (given: 3)"),
        ({"lr": 1, 7: 1}, "config key '7': keys should be strings"),
    ],
)
def test_a_wrong_value_says_the_key_what_was_expected_and_what_was_given(values: dict[Any, Any], words: str) -> None:
    message = _message(values)
    assert words in message
    assert "\n" not in message
    assert "pydantic" not in message


def test_a_boolean_passes_where_one_belongs() -> None:
    run = Run.from_dict({"lr": 1, "shuffle": False, "either": True})
    assert (run.shuffle, run.either) == (False, True)


# --- files


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "holds nothing: expected 'key: value' lines"),
        ("- 1", "holds a list: expected 'key: value' lines"),
        ("just words", "holds a str"),
        ("lr: [1\n", "is not valid YAML at line 2, column 1"),
        ("lr: 1\n  n: 2\n", "is not valid YAML at line 2"),
        ("lr: 1\nseed: 2\nlr: 2\n", "is not valid YAML at line 3, column 1: the key 'lr' is given twice"),
        ("penalty: {coeff: 1, coeff: 2}\n", "the key 'coeff' is given twice"),
        ("lr: 2024-13-45\n", "holds a value that YAML cannot read: month must be in 1..12; quote it"),
        ("lr: !!python/object/apply:os.getcwd []\n", "could not determine a constructor for the tag"),
        ("lr: \x07\n", "is not valid YAML"),
    ],
)
def test_a_file_that_is_no_mapping_says_what_and_where(tmp_path: Path, text: str, words: str) -> None:
    path = _yaml(tmp_path, text)
    with pytest.raises(UserError) as caught:
        read_yaml(path)
    message = str(caught.value)
    assert message.startswith(f"config '{path}' ")
    assert words in message
    assert "\n" not in message


def test_a_file_that_is_not_text_says_so(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(b"PK\x03\x04\xff\xfe")
    with pytest.raises(UserError, match="is not a text file: expected YAML in UTF-8"):
        read_yaml(path)


def test_a_missing_file_and_a_folder_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match=r"config '.*no\.yaml' does not exist"):
        read_yaml(tmp_path / "no.yaml")
    with pytest.raises(MissingFileError, match="is a folder, not a YAML file"):
        read_yaml(tmp_path)


def test_merge_keys_of_yaml_work(tmp_path: Path) -> None:
    path = _yaml(tmp_path, "base: &b {lr: 1, n: 2}\nrun:\n  <<: *b\n  n: 3\n")
    assert read_yaml(path)["run"] == {"lr": 1, "n": 3}


# --- overrides


def test_overrides_reach_nested_keys_and_are_read_as_yaml(tmp_path: Path) -> None:
    path = _yaml(tmp_path, "lr: 1\npenalty: {coeff: 1, hooks: [a]}\n")
    run = Run.from_file(path, ["lr=5e-4", "penalty.coeff=3", "penalty.hooks=[b, c]", "seed=null", "shuffle=no"])
    assert run == Run(lr=5e-4, penalty=Penalty(coeff=3, hooks=["b", "c"]), seed=None, shuffle=False)


def test_the_later_override_wins() -> None:
    assert apply_overrides({"lr": 1}, ["lr=2", "lr=3"]) == {"lr": 3}


def test_an_override_opens_a_section_that_was_null_or_absent() -> None:
    assert apply_overrides({"a": None}, ["a.b.c=1", "d.e=2"]) == {"a": {"b": {"c": 1}}, "d": {"e": 2}}


def test_an_override_may_contain_further_equal_signs() -> None:
    assert apply_overrides({}, ["wandb_run_name=a=b"]) == {"wandb_run_name": "a=b"}


def test_overrides_leave_the_given_mapping_alone() -> None:
    values = {"a": {"b": 1}}
    apply_overrides(values, ["a.b=2", "a.c=3"])
    assert values == {"a": {"b": 1}}


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("lr", "override 'lr' is malformed: expected 'dotted.key=value'"),
        ("=3", "is malformed"),
        ("a..b=1", "is malformed"),
        ("lr=[", "override 'lr=[': the value is not valid YAML"),
        ("lr=2024-13-45", "the value is not valid YAML"),
        ("lr.x=1", "override 'lr.x=1': 'lr' is 0.1 and holds no settings"),
    ],
)
def test_a_malformed_override_is_quoted(override: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        apply_overrides({"lr": 0.1}, [override])
    assert words in str(caught.value)


def test_an_override_of_an_unknown_key_gets_the_nearest_valid_one(tmp_path: Path) -> None:
    path = _yaml(tmp_path, "lr: 1\n")
    with pytest.raises(UserError, match="unknown config key 'penalty.cofef'. Did you mean 'coeff'"):
        Run.from_file(path, ["penalty.coeff=1", "penalty.cofef=1"])


def test_deep_update_merges_mappings_and_replaces_everything_else() -> None:
    old = {"a": {"x": 1, "y": [1, 2]}, "b": 1}
    assert deep_update(old, {"a": {"y": [3]}, "b": {"z": 1}}) == {"a": {"x": 1, "y": [3]}, "b": {"z": 1}}
    assert old == {"a": {"x": 1, "y": [1, 2]}, "b": 1}
