"""Places on disk follow the environment at the time of asking."""

from pathlib import Path

import pytest

from e2e_sae.settings import REPO_ROOT, cache_dir


def test_repo_root_holds_the_package() -> None:
    assert (REPO_ROOT / "e2e_sae" / "settings.py").is_file()


def test_cache_dir_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("SAE_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "xdg" / "e2e_sae"
    monkeypatch.setenv("SAE_CACHE_DIR", str(tmp_path / "own"))
    assert cache_dir() == tmp_path / "own"


@pytest.mark.parametrize("ci", ["1", ""])
def test_the_variable_ci_changes_nothing(monkeypatch: pytest.MonkeyPatch, ci: str) -> None:
    before = cache_dir()
    monkeypatch.setenv("CI", ci)
    assert cache_dir() == before
