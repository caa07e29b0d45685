"""The git hook: `make hooks` installs it where it can, and it runs what `make check` runs."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

REPO = Path(__file__).resolve().parent.parent
CONFIG = REPO / ".pre-commit-config.yaml"
# `make test VENV=...` exports its own variables.
ENV = {k: v for k, v in os.environ.items() if not k.startswith(("GIT_", "COV_", "MAKE", "MFLAGS", "VENV"))}


def _run(*command: str, cwd: Path) -> str:
    home = {"HOME": str(cwd), "PRE_COMMIT_HOME": str(cwd / "store"), "GIT_CONFIG_GLOBAL": os.devnull}
    done = subprocess.run(command, cwd=cwd, env={**ENV, **home}, capture_output=True, text=True)
    assert done.returncode == 0, f"{command} failed:\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A folder with the Makefile and the hook's config, whose `.venv` is the running environment; not yet in git."""
    folder = tmp_path / "copy"
    folder.mkdir()
    for name in ("Makefile", CONFIG.name):
        shutil.copy(REPO / name, folder / name)
    (folder / ".venv").symlink_to(sys.prefix, target_is_directory=True)
    return folder


def test_the_hooks_config_is_valid_and_downloads_nothing(tmp_path: Path):
    _run(sys.executable, "-m", "pre_commit", "validate-config", str(CONFIG), cwd=tmp_path)
    repos = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))["repos"]
    assert [repo["repo"] for repo in repos] == ["local"]
    (hook,) = repos[0]["hooks"]
    assert (hook["entry"].split()[0], hook["entry"].split()[-1]) == ("make", "check")


def test_a_commit_of_code_runs_make_check_and_one_of_text_does_not(copy: Path):
    _run("git", "init", "-q", cwd=copy)
    _run("make", "hooks", cwd=copy)
    # A stand-in for the real checks, which need the whole repository.
    (copy / "Makefile").write_text("check:\n\t@echo checked >> runs.txt\n", encoding="utf-8")
    commit = ("git", "-c", "user.name=a", "-c", "user.email=a@b.c", "commit", "-q", "-m", "x")
    for name, n_runs in (("a.py", 1), ("notes.md", 1), ("b.py", 2)):
        (copy / name).write_text("", encoding="utf-8")
        _run("git", "add", name, CONFIG.name, cwd=copy)
        _run(*commit, cwd=copy)
        assert (copy / "runs.txt").read_text(encoding="utf-8") == "checked\n" * n_runs, name


def _without_git(copy: Path) -> None:
    """Leaves the folder as it is: unpacked from an archive."""


def _with_a_hooks_path(copy: Path) -> None:
    _run("git", "init", "-q", cwd=copy)
    _run("git", "config", "core.hooksPath", "my-hooks", cwd=copy)


def _without_pre_commit(copy: Path) -> None:
    _run("git", "init", "-q", cwd=copy)
    (copy / ".venv").unlink()


@pytest.mark.parametrize(
    ("prepare", "words"),
    [
        (_without_git, ""),
        (_with_a_hooks_path, "note: core.hooksPath is set, no git hook installed\n"),
        (_without_pre_commit, "note: no git hook installed\n"),
    ],
)
def test_where_no_hook_can_be_installed_nothing_fails(copy: Path, prepare: Callable[[Path], None], words: str):
    prepare(copy)
    assert _run("make", "hooks", cwd=copy) == words
    assert not (copy / "my-hooks").exists()
    assert not (copy / ".git" / "hooks" / "pre-commit").exists()


def test_an_environment_that_is_not_the_default_installs_no_hook(copy: Path):
    _run("git", "init", "-q", cwd=copy)
    assert _run("make", "hooks", f"VENV={sys.prefix}", cwd=copy) == ""
    assert not (copy / ".git" / "hooks" / "pre-commit").exists()
