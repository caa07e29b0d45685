"""Places that cannot be written, full disks, and `new-config` on what is no model."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from e2e_sae.scripts.cli import main
from tests.analysis.tiny_studies import random_decoder, write_legacy_run
from tests.bad_input.bench import Bench, checkpoints


@pytest.mark.parametrize(
    ("save_dir", "words"),
    [
        ("FOLDER/a_file", "save_dir 'FOLDER/a_file' is a file, not a folder: choose another save_dir"),
        ("FOLDER/a_file/runs", "save_dir 'FOLDER/a_file/runs' is a file, not a folder: choose another save_dir"),
        ("FOLDER/" + "x" * 300, "cannot be written (File name too long): choose another save_dir"),
        # Not even root can make a folder there.
        ("/proc/runs", "save_dir '/proc/runs' cannot be written (No such file or directory): choose another"),
    ],
    ids=["a file", "under a file", "too long", "no place for folders"],
)
def test_a_save_dir_that_cannot_be_written_is_refused(
    bench: Bench, refused: Callable[..., str], save_dir: str, words: str
) -> None:
    if save_dir.startswith("/proc") and not sys.platform.startswith("linux"):
        pytest.skip("/proc is Linux's")
    message = refused("train", bench.config, *bench.sets([f"save_dir={save_dir}"]))
    assert words.replace("FOLDER", str(bench.folder)) in message


@pytest.mark.parametrize("command", [["analyse"], ["interpret", "--offline"]])
def test_an_out_that_is_a_file_is_refused(
    bench: Bench, refused: Callable[..., str], command: list[str], tmp_path: Path
) -> None:
    run = write_legacy_run(tmp_path / "run", "local", random_decoder(4))
    message = refused(command[0], run, *command[1:], "--out", bench.folder / "a_file")
    assert message == f"error: --out '{bench.folder / 'a_file'}' is a file, not a folder: choose another --out\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["gpt3"], "no model 'gpt3': neither a local folder nor a known name. Did you mean 'gpt2"),
        (["FOLDER/empty_folder"], "empty_folder' has no config.json: expected a Hugging Face model folder"),
        (["FOLDER/a_file"], "a_file' is no model: expected a Hugging Face folder or a legacy .pt file"),
        (
            ["FOLDER/gpt2", "-o", "FOLDER/config.yaml"],
            "config.yaml' exists and is not overwritten: choose another name",
        ),
        (["FOLDER/gpt2", "-o", "FOLDER/nowhere/c.yaml"], "the folder 'FOLDER/nowhere' does not exist"),
    ],
)
def test_new_config_refuses_what_is_no_model_and_what_it_cannot_write(
    bench: Bench, refused: Callable[..., str], arguments: list[str], words: str
) -> None:
    folder = str(bench.folder)
    message = refused("new-config", *(a.replace("FOLDER", folder) for a in arguments))
    assert words.replace("FOLDER", folder) in message


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB: room for a config, a log and one checkpoint of the valid run, not for two."""
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        mount = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], capture_output=True, text=True
        )
    except FileNotFoundError:
        pytest.skip("there is no mount command here")
    if mount.returncode != 0:
        pytest.skip(f"a small file system cannot be mounted here: {mount.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_stops_the_run_with_one_line_and_what_was_saved_can_be_used(
    bench: Bench, small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(bench.config), "--set", f"save_dir={small_disk}"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: disk full or over quota")
    assert "what was saved before is intact, make room and run it again" in err
    assert "(a training goes on with: e2e-sae train --resume RUN_DIR)" in err
    assert err.count("\n") == 1
    (run,) = small_disk.iterdir()
    assert [path.name for path in checkpoints(run)] == ["samples_8"]
    assert sorted(path.name for path in run.iterdir()) == ["final_config.yaml", "metrics.jsonl", "samples_8"]
    assert main(["evaluate", str(run)]) == 0
    subprocess.run(["mount", "-o", "remount,size=1m", str(small_disk)], check=True)
    assert main(["train", "--resume", str(run)]) == 0
    assert [path.name for path in checkpoints(run)] == ["samples_16", "samples_8"]
    assert [json.loads(line)["samples"] for line in (run / "metrics.jsonl").read_text().splitlines()] == [4, 16]


def test_a_file_that_may_not_grow_is_a_full_disk_too_and_leaves_no_half_checkpoint(
    bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    resource = pytest.importorskip("resource", reason="limits of file sizes are POSIX'")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        code = main(["train", str(bench.config), "--set", f"save_dir={tmp_path / 'out'}"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    err = capsys.readouterr().err
    assert code == 2, err
    assert err.startswith("error: disk full or over quota")
    assert err.count("\n") == 1
    (run,) = (tmp_path / "out").iterdir()
    assert sorted(path.name for path in run.iterdir()) == ["final_config.yaml", "metrics.jsonl"]
