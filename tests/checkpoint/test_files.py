import os
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch

from e2e_sae.checkpoint.files import (
    fingerprint,
    new_folder,
    read_json,
    read_pickled_tensors,
    read_tensors,
    write_json,
    write_tensors,
    write_text,
)
from e2e_sae.errors import CheckpointError
from tests.tiny_runs import files_in


def test_a_folder_appears_only_when_its_block_has_succeeded(tmp_path: Path) -> None:
    with new_folder(tmp_path / "made") as folder:
        (folder / "a").write_text("a")
        assert not (tmp_path / "made").exists()
    assert files_in(tmp_path) == {"made/a": b"a"}


def test_a_block_that_fails_leaves_nothing_and_keeps_the_old_folder(tmp_path: Path) -> None:
    with new_folder(tmp_path / "made") as folder:
        (folder / "a").write_text("old")
    for error in (ValueError("no"), KeyboardInterrupt()):
        with pytest.raises(type(error)):
            _fill_and_fail(tmp_path / "made", error)
        assert files_in(tmp_path) == {"made/a": b"old"}
        assert [p.name for p in tmp_path.iterdir()] == ["made"]


def test_a_folder_of_the_same_name_is_replaced_whole(tmp_path: Path) -> None:
    for name in ("a", "b"):
        with new_folder(tmp_path / "made") as folder:
            (folder / name).write_text(name)
    assert files_in(tmp_path) == {"made/b": b"b"}
    assert [p.name for p in tmp_path.iterdir()] == ["made"]


def test_what_a_killed_process_with_the_same_number_left_is_not_mixed_in(tmp_path: Path) -> None:
    leftover = tmp_path / f".made.tmp-{os.getpid()}"
    leftover.mkdir()
    (leftover / "half").write_text("half")
    with new_folder(tmp_path / "made") as folder:
        (folder / "a").write_text("a")
    assert files_in(tmp_path) == {"made/a": b"a"}


def test_text_is_replaced_at_once_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "new \ud800")  # cannot be encoded: a write that fails half-way
    assert files_in(tmp_path) == {"file": b"old"}
    write_text(path, "new")
    assert files_in(tmp_path) == {"file": b"new"}


def test_json_comes_back_and_damaged_json_is_told(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"x": [1, 2.5, None]})
    assert read_json(tmp_path / "a.json") == {"x": [1, 2.5, None]}
    (tmp_path / "a.json").write_text('{"x": [1')
    with pytest.raises(CheckpointError, match="a.json' is damaged"):
        read_json(tmp_path / "a.json")


def test_tensors_come_back_bit_for_bit_also_views(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 4).T, "n": torch.arange(3), "d": torch.randn(2, dtype=torch.float64)}
    write_tensors(tmp_path / "t.safetensors", tensors)
    read = read_tensors(tmp_path / "t.safetensors")
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensors[name]) and read[name].dtype == tensors[name].dtype for name in tensors)


def test_a_truncated_tensor_file_is_told(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    write_tensors(path, {"a": torch.randn(30)})
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="t.safetensors' is damaged or no safetensors file"):
        read_tensors(path)


def test_a_pickle_that_would_run_code_is_refused_and_runs_nothing(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "it ran"),)

    torch.save({"a": Payload()}, tmp_path / "evil.pt")
    with pytest.raises(CheckpointError, match="evil.pt' was refused"):
        read_pickled_tensors(tmp_path / "evil.pt")
    assert not (tmp_path / "it ran").exists()


@pytest.mark.parametrize("content", [b"", b"not torch", b"PK\x03\x04 a cut zip"])
def test_a_damaged_pt_file_is_told(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match="x.pt'"):
        read_pickled_tensors(tmp_path / "x.pt")


def test_a_fingerprint_is_size_and_crc32(tmp_path: Path) -> None:
    content = os.urandom((1 << 20) + 17)  # more than one block
    (tmp_path / "x").write_bytes(content)
    assert fingerprint(tmp_path / "x") == {"size": len(content), "crc32": zlib.crc32(content)}


def _fill_and_fail(path: Path, error: BaseException) -> None:
    with new_folder(path) as folder:
        (folder / "a").write_text("new")
        raise error
