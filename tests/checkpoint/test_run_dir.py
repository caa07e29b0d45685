import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from e2e_sae.checkpoint import load_run
from e2e_sae.checkpoint.files import read_json, read_tensors, write_json
from e2e_sae.checkpoint.records import CheckpointInfo, StoredModel, StoredSAEInfo
from e2e_sae.checkpoint.run_dir import RunDir, read_checkpoint, read_checkpoint_info, read_resume_state
from e2e_sae.errors import CheckpointError, MissingFileError, UserError
from e2e_sae.scripts.exit_codes import describe_failure
from tests.tiny_runs import files_in

SAE = "blocks.1.hook_resid_pre"
OTHER = "blocks.2.attn.hook_z"
MODEL = StoredModel(model_class="bridge", processing=None, dtype="float32", d_model=4, n_layers=3, d_vocab=50)


def tensors(scale: float = 1.0, d_in: int = 4, d_sae: int = 6) -> dict[str, Tensor]:
    shapes = {"W_enc": (d_in, d_sae), "b_enc": (d_sae,), "W_dec": (d_sae, d_in), "b_dec": (d_in,)}
    return {name: torch.full(shape, scale) for name, shape in shapes.items()}


def save(run_dir: RunDir, n_samples: int, resume_state: Any = None, d_in: int = 4) -> Path:
    saes = {
        name: StoredSAEInfo(architecture="relu", read=name, write=name, d_in=d_in, d_sae=6) for name in (SAE, OTHER)
    }
    info = CheckpointInfo(
        library_version="0",
        n_samples=n_samples,
        n_steps=n_samples // 2,
        model=MODEL,
        saes=saes,
        firing_data="some",
        firing_n_tokens=8,
        files={},
    )
    values = {name: tensors(n_samples, d_in=d_in) for name in saes}
    return run_dir.save(info, values, {name: torch.arange(6) for name in saes}, resume_state or {"at": n_samples})


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    return RunDir.create(tmp_path / "out", "run", "a: 1\n")


def test_the_config_is_the_first_thing_written(run_dir: RunDir) -> None:
    assert files_in(run_dir.path) == {"final_config.yaml": b"a: 1\n"}


def test_runs_started_in_the_same_second_get_folders_of_their_own(tmp_path: Path) -> None:
    paths = [RunDir.create(tmp_path, "run", f"n: {i}\n").path for i in range(20)]
    assert len(set(paths)) == 20
    assert [(path / "final_config.yaml").read_text() for path in paths] == [f"n: {i}\n" for i in range(20)]


@pytest.mark.parametrize(
    "name",
    [
        "a/b",
        "../../up",
        "blocks.*.hook_[a-c]?",
        "été 日本",
        "a:b|c<d>\"e'",
        "line\nbreak\ttab",
        "nul\0",
        ".hidden",
        ".",
        "",
    ],
)
def test_any_name_gives_one_folder_inside_save_dir_that_can_be_used(tmp_path: Path, name: str) -> None:
    run_dir = RunDir.create(tmp_path / "out", name, "a: 1\n")
    assert run_dir.path.parent == (tmp_path / "out").resolve()
    assert not run_dir.path.name.startswith(".")
    assert not set(run_dir.path.name) & set('/\\*?[]:|<>"\n\t\0')
    save(run_dir, 2)
    assert [path.name for path in RunDir.open(run_dir.path).checkpoints()] == ["samples_2"]
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_a_very_long_name_is_shortened_without_cutting_a_character(tmp_path: Path) -> None:
    name = RunDir.create(tmp_path, "é" * 400, "").path.name
    assert name.startswith("é" * 100 + "_20")
    assert len(name.encode()) < 255


def test_a_file_in_the_place_of_save_dir_is_told(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    for save_dir in (tmp_path / "out", tmp_path / "out" / "deeper"):
        with pytest.raises(UserError, match="is a file, not a folder: choose another save_dir"):
            RunDir.create(save_dir, "run", "")


def test_opening_what_is_no_run_folder_is_told(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="no such run folder: '.*nowhere'"):
        RunDir.open(tmp_path / "nowhere")
    with pytest.raises(MissingFileError, match="is no run folder: it has no final_config.yaml"):
        RunDir.open(tmp_path)


def test_a_checkpoint_comes_back_whole(run_dir: RunDir) -> None:
    path = save(run_dir, 4, {"loop": {"n": 3}, "t": torch.ones(2)})
    assert sorted(p.name for p in path.iterdir()) == [
        "blocks-1-hook_resid_pre.safetensors",
        "blocks-2-attn-hook_z.safetensors",
        "checkpoint.json",
        "firing.safetensors",
        "resume.pt",
    ]
    run = read_checkpoint(path)
    assert list(run.saes) == [SAE, OTHER]
    assert run.model == MODEL
    assert run.n_samples == 4
    assert run.config == {"a": 1}
    assert all(torch.equal(t, tensors(4)[name]) for name, t in run.saes[SAE].tensors.items())
    assert torch.equal(read_tensors(path / "firing.safetensors")[SAE], torch.arange(6))
    state = read_resume_state(path)
    assert state["loop"] == {"n": 3}
    assert torch.equal(state["t"], torch.ones(2))


def test_checkpoints_are_listed_by_number_newest_first_and_nothing_else_is(run_dir: RunDir) -> None:
    for n in (8, 16, 100, 2):
        save(run_dir, n)
    (run_dir.path / "samples_999").write_text("a file")
    (run_dir.path / "samples_x").mkdir()
    (run_dir.path / ".samples_200.tmp-1").mkdir()
    assert [path.name for path in run_dir.checkpoints()] == ["samples_100", "samples_16", "samples_8", "samples_2"]
    assert load_run(run_dir.path).n_samples == 100


def test_only_the_newest_two_keep_their_resume_state_and_the_others_stay_whole(run_dir: RunDir) -> None:
    for n in (2, 4, 6, 8):
        save(run_dir, n)
    kept = [path.name for path in run_dir.checkpoints() if (path / "resume.pt").exists()]
    assert kept == ["samples_8", "samples_6"]
    assert read_checkpoint(run_dir.path / "samples_2").n_samples == 2
    with pytest.raises(CheckpointError, match="has no resume state, which only the newest 2 of a run keep"):
        read_resume_state(run_dir.path / "samples_2")


@pytest.mark.parametrize("name", ["blocks-1-hook_resid_pre.safetensors", "firing.safetensors", "resume.pt"])
def test_one_flipped_bit_in_any_file_is_found(run_dir: RunDir, name: str) -> None:
    path = save(run_dir, 4)
    content = bytearray((path / name).read_bytes())
    content[-1] ^= 1
    (path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"samples_4' is damaged: {name} is not what was written"):
        read_checkpoint_info(path)


def test_a_missing_or_emptied_file_is_found(run_dir: RunDir) -> None:
    path = save(run_dir, 4)
    (path / "firing.safetensors").unlink()
    with pytest.raises(CheckpointError, match="firing.safetensors is not what was written"):
        read_checkpoint(path)
    (path / "checkpoint.json").write_text("")
    with pytest.raises(CheckpointError, match="checkpoint.json' is damaged"):
        read_checkpoint(path)
    (path / "checkpoint.json").unlink()
    with pytest.raises(CheckpointError, match="is incomplete: it has no checkpoint.json"):
        read_checkpoint(path)


def test_a_newer_format_is_refused_with_advice(run_dir: RunDir) -> None:
    path = save(run_dir, 4)
    values = read_json(path / "checkpoint.json")
    write_json(path / "checkpoint.json", {**values, "format_version": 99})
    with pytest.raises(UserError, match="format_version 99.*install a newer one"):
        read_checkpoint_info(path)
    write_json(path / "checkpoint.json", {**values, "n_samples": "many"})
    with pytest.raises(CheckpointError, match="samples_4' is damaged: .*n_samples"):
        read_checkpoint_info(path)


def test_going_back_removes_what_came_later_and_leftovers_of_a_killed_process(run_dir: RunDir) -> None:
    for n in (2, 4, 6):
        save(run_dir, n)
    run_dir.summary_file.write_text("{}")
    (run_dir.path / ".samples_8.tmp-123").mkdir()
    (run_dir.path / ".samples_4.old-123").mkdir()
    (run_dir.path / ".metrics.jsonl.tmp-123").write_text("")
    run_dir.go_back_to(run_dir.path / "samples_4")
    assert sorted(p.name for p in run_dir.path.iterdir()) == ["final_config.yaml", "samples_2", "samples_4"]
    run_dir.go_back_to(None)
    assert [p.name for p in run_dir.path.iterdir()] == ["final_config.yaml"]


def test_a_resume_state_that_cannot_be_written_leaves_the_earlier_checkpoints_as_they_were(run_dir: RunDir) -> None:
    save(run_dir, 2)
    save(run_dir, 4)
    before = files_in(run_dir.path)
    with pytest.raises((AttributeError, TypeError)):
        save(run_dir, 6, {"cannot be pickled": (i for i in range(3))})
    assert files_in(run_dir.path) == before
    assert sorted(p.name for p in run_dir.path.iterdir()) == ["final_config.yaml", "samples_2", "samples_4"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = shutil.which("mount")
    options = ["-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)]
    if mount is None or subprocess.run([mount, *options], capture_output=True, check=False).returncode:
        pytest.skip("a small file system cannot be mounted here (needs root)")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_full_disk_keeps_every_earlier_checkpoint_and_leaves_no_temporary_folder(small_disk: Path) -> None:
    run_dir = RunDir.create(small_disk, "run", "a: 1\n")
    save(run_dir, 2, d_in=200)
    filling, before = 0, files_in(run_dir.path)
    with pytest.raises(Exception, match="(?i)no space left") as caught:  # noqa: PT012
        for filling in range(4, 100, 2):
            before = files_in(run_dir.path)
            save(run_dir, filling, d_in=200)
    code, message = describe_failure(caught.value)
    assert code == 2
    assert "disk full" in message
    assert files_in(run_dir.path) == before
    assert [p.name for p in run_dir.path.iterdir() if p.name.startswith(".")] == []
    assert read_checkpoint(run_dir.checkpoints()[0]).n_samples == filling - 2
    assert read_resume_state(run_dir.checkpoints()[0]) == {"at": filling - 2}


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX limits")
@pytest.mark.parametrize("n_bytes", [500, 3_000, 12_000, 18_000])
def test_a_write_that_fails_at_any_file_keeps_every_earlier_checkpoint(run_dir: RunDir, n_bytes: int) -> None:
    # A limit on the size of files fails like a full disk, everywhere and without root.
    small = save(run_dir, 2)
    state = {"big": torch.zeros(4_000)}
    before = files_in(run_dir.path)
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, old[1]))
    try:
        with pytest.raises(Exception, match="(?i)file too large"):
            save(run_dir, 4, state, d_in=400)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)
    assert files_in(run_dir.path) == before
    assert run_dir.checkpoints() == [small]
    assert os.listdir(run_dir.path).count("samples_4") == 0
