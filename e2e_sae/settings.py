"""Places on disk, the same whatever the environment says."""

from pathlib import Path

REPO_ROOT = Path(__file__).resolve().parent.parent
"""Folder that holds the package: the repository in a clone, site-packages in an installation."""
