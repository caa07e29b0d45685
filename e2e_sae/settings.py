"""Places on disk, and the settings that come from the environment instead of a config."""

import os
from pathlib import Path

REPO_ROOT = Path(__file__).resolve().parent.parent
"""Folder that holds the package: the repository in a clone, site-packages in an installation."""


def load_env_file() -> None:
    """Puts the `.env` of the working folder, or of one above it, into the environment; it wins over what is there.

    A key without a value says nothing: a copy of `.env.example` that is not filled in changes nothing.
    """
    from dotenv import dotenv_values, find_dotenv

    os.environ.update({key: value for key, value in dotenv_values(find_dotenv(usecwd=True)).items() if value})


def cache_dir() -> Path:
    """Returns the folder for downloads: `SAE_CACHE_DIR`, or the user's cache folder. It need not exist yet."""
    from platformdirs import user_cache_path

    chosen = os.environ.get("SAE_CACHE_DIR")
    return Path(chosen).expanduser().resolve() if chosen else user_cache_path("e2e_sae", appauthor=False)
