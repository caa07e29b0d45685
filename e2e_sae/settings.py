"""Places on disk, read from the environment when asked and never at import."""

import os
from pathlib import Path

REPO_ROOT = Path(__file__).resolve().parent.parent
"""Folder that holds the package: the repository in a clone, site-packages in an installation."""


def cache_dir() -> Path:
    """Returns the folder for downloads: `SAE_CACHE_DIR`, else `e2e_sae` in the user's cache folder."""
    given = os.environ.get("SAE_CACHE_DIR")
    if given:
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "e2e_sae"
