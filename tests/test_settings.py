"""Places on disk."""

from e2e_sae.settings import REPO_ROOT


def test_repo_root_holds_the_package() -> None:
    assert (REPO_ROOT / "e2e_sae" / "settings.py").is_file()
