"""The real W&B client against the stand-in server, at home in a folder of its own."""

import os
import subprocess
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.wandb_server import KEY


def client_environment(folder: Path, url: str, key: str | None = KEY) -> dict[str, str]:
    """Returns the variables that make `wandb` speak to a server at `url` and leave everything it writes in `folder`."""
    (folder / "home").mkdir(parents=True, exist_ok=True)
    return {
        "WANDB_BASE_URL": url,
        "WANDB_MODE": "online",
        "WANDB_API_KEY": key or "",
        "WANDB_ENTITY": "",
        "HOME": str(folder / "home"),
        "NETRC": str(folder / "home" / ".netrc"),
        "WANDB_DIR": str(folder),
        "WANDB_CACHE_DIR": str(folder / "wandb_cache"),
        "WANDB_CONFIG_DIR": str(folder / "wandb_config"),
        "WANDB_DATA_DIR": str(folder / "wandb_data"),
        "SAE_CACHE_DIR": str(folder / "sae_cache"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }


@contextmanager
def as_client(folder: Path, url: str, key: str | None = KEY, **more: str) -> Iterator[None]:
    """Makes this process such a client, with a W&B session of its own."""
    import wandb

    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # W&B's own
        for name, value in {**client_environment(folder, url, key), **more}.items():
            patch.setenv(name, value)
        if key is None:
            patch.delenv("WANDB_API_KEY")
        patch.chdir(folder)
        wandb.teardown()  # it keeps the settings of whatever came before
        try:
            yield
        finally:
            wandb.teardown()


def run_python(
    arguments: Sequence[str], folder: Path, url: str, key: str | None = KEY, timeout: float = 120, **more: str
) -> subprocess.CompletedProcess[str]:
    """Runs `python <arguments>` as such a client."""
    environment = {**os.environ, **client_environment(folder, url, key), **more}
    return subprocess.run(
        [sys.executable, *arguments],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        stdin=subprocess.DEVNULL,
    )
