"""Paths in configs mean the YAML's own folder first, then the working directory; dtypes go by name."""

from pathlib import Path

import pytest
import torch

from e2e_sae.base_config import BaseConfig
from e2e_sae.errors import UserError
from e2e_sae.types import InputPath, LocalOrHub, OutputPath, PathOrList, StrDtype, StrOrList, torch_dtype


class Places(BaseConfig):
    model: InputPath | None = None
    out: OutputPath | None = None
    data: LocalOrHub | None = None
    files: PathOrList | None = None
    names: StrOrList = []
    dtype: StrDtype = "float32"


@pytest.fixture
def yaml_dir(in_tmp_dir: Path) -> Path:
    """A folder for the YAML file; the working directory is its parent."""
    folder = in_tmp_dir / "configs"
    folder.mkdir()
    return folder


def test_a_path_is_looked_up_beside_the_yaml_first(yaml_dir: Path) -> None:
    for folder in (yaml_dir, Path.cwd()):
        (folder / "lm").mkdir()
    assert Places.from_dict({"model": "lm"}, yaml_dir).model == yaml_dir / "lm"


def test_a_path_is_looked_up_in_the_working_directory_second(yaml_dir: Path) -> None:
    (Path.cwd() / "lm").mkdir()
    assert Places.from_dict({"model": "lm"}, yaml_dir).model == Path.cwd() / "lm"


def test_from_file_looks_beside_the_file(yaml_dir: Path) -> None:
    (yaml_dir / "lm").mkdir()
    (yaml_dir / "run.yaml").write_text("model: lm\n")
    assert Places.from_file("configs/run.yaml").model == yaml_dir / "lm"


def test_a_missing_path_shows_both_places(yaml_dir: Path) -> None:
    with pytest.raises(UserError) as caught:
        Places.from_dict({"model": "lm"}, yaml_dir)
    message = str(caught.value)
    assert f"'{yaml_dir / 'lm'}' and '{Path.cwd() / 'lm'}'" in message
    assert message.startswith("config key 'model': no such file or folder: 'lm' (looked at ")
    assert "\n" not in message


def test_a_missing_absolute_path_shows_one_place(yaml_dir: Path) -> None:
    with pytest.raises(UserError, match=r"looked at '/no/such/place'\)"):
        Places.from_dict({"model": "/no/such/place"}, yaml_dir)


def test_without_a_yaml_only_the_working_directory_counts(in_tmp_dir: Path) -> None:
    with pytest.raises(UserError) as caught:
        Places.from_dict({"model": "lm"})
    assert f"(looked at '{in_tmp_dir / 'lm'}')" in str(caught.value)


def test_output_paths_are_relative_to_the_working_directory_and_need_not_exist(yaml_dir: Path) -> None:
    assert Places.from_dict({"out": "runs"}, yaml_dir).out == Path.cwd() / "runs"


def test_home_is_expanded(monkeypatch: pytest.MonkeyPatch, in_tmp_dir: Path) -> None:
    monkeypatch.setenv("HOME", str(in_tmp_dir))
    (in_tmp_dir / "lm").mkdir()
    assert Places.from_dict({"model": "~/lm"}).model == in_tmp_dir / "lm"


def test_a_data_name_that_exists_is_local_and_stored_absolute(yaml_dir: Path) -> None:
    (yaml_dir / "text").mkdir()
    assert Places.from_dict({"data": "text"}, yaml_dir).data == str(yaml_dir / "text")


@pytest.mark.parametrize("name", ["gpt2", "apollo-research/Skylion007-openwebtext-tokenizer-gpt2", "stdlib"])
def test_a_data_name_that_does_not_exist_is_left_to_the_hub(in_tmp_dir: Path, name: str) -> None:
    assert Places.from_dict({"data": name}).data == name


@pytest.mark.parametrize("name", ["./data", "/data", "~/data", "a/b/c", "rows.parquet", "ids.u16", "text.txt"])
def test_a_data_name_shaped_like_a_path_must_exist(in_tmp_dir: Path, name: str) -> None:
    with pytest.raises(UserError, match="no such file or folder"):
        Places.from_dict({"data": name})


def test_one_path_or_name_is_wrapped_in_a_list(in_tmp_dir: Path) -> None:
    (in_tmp_dir / "sae.pt").touch()
    places = Places.from_dict({"files": "sae.pt", "names": "blocks.0.hook_resid_pre"})
    assert places.files == [in_tmp_dir / "sae.pt"]
    assert places.names == ["blocks.0.hook_resid_pre"]


def test_a_missing_path_in_a_list_carries_its_index(in_tmp_dir: Path) -> None:
    (in_tmp_dir / "a.pt").touch()
    with pytest.raises(UserError, match=r"config key 'files\.1': no such file or folder: 'b\.pt'"):
        Places.from_dict({"files": ["a.pt", "b.pt"]})


def test_stored_paths_are_plain_strings_that_load_again_from_anywhere(
    yaml_dir: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    (yaml_dir / "lm").mkdir()
    places = Places.from_dict({"model": "lm", "out": "runs"}, yaml_dir)
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    (Path.cwd() / "stored.yaml").write_text(places.to_yaml())
    assert Places.from_file("stored.yaml") == places


@pytest.mark.parametrize("name", ["float32", "float64", "bfloat16", "float16"])
def test_dtypes_go_by_name(name: StrDtype) -> None:
    assert torch_dtype(Places.from_dict({"dtype": name}).dtype) is getattr(torch, name)


def test_an_unknown_dtype_lists_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"key 'dtype': input should be 'float32', .*given: 'int8'"):
        Places.from_dict({"dtype": "int8"})
