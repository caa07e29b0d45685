"""Places on disk, and what the environment says."""

import os
from pathlib import Path

import pytest

from e2e_sae.settings import REPO_ROOT, cache_dir, load_env_file


def test_repo_root_holds_the_package() -> None:
    assert (REPO_ROOT / "e2e_sae" / "settings.py").is_file()


def test_an_env_file_wins_over_the_environment_except_where_it_is_empty(
    in_tmp_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WANDB_ENTITY", "WANDB_API_KEY"):
        monkeypatch.setenv(name, "before")
    (in_tmp_dir / ".env").write_text("WANDB_ENTITY=team  # ours\nWANDB_API_KEY=\n")
    (in_tmp_dir / "below").mkdir()
    monkeypatch.chdir(in_tmp_dir / "below")
    load_env_file()
    assert (os.environ["WANDB_ENTITY"], os.environ["WANDB_API_KEY"]) == ("team", "before")


def test_downloads_go_where_sae_cache_dir_says_or_else_into_the_users_cache(
    in_tmp_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAE_CACHE_DIR", "here")
    assert cache_dir() == in_tmp_dir.resolve() / "here"
    monkeypatch.setenv("SAE_CACHE_DIR", "")
    assert cache_dir().name == "e2e_sae"
    assert not cache_dir().is_relative_to(in_tmp_dir.resolve())
