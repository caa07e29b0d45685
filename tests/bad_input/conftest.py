"""The command line on mistakes: exit code 2, one line on stderr, nothing written."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from e2e_sae.scripts.cli import main
from tests.bad_input.bench import Bench


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """The working folder with the valid config."""
    return Bench(tmp_path_factory.mktemp("bad_input"))


@pytest.fixture(scope="session")
def trained(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of the valid config, trained by the command line: the base case is really valid."""
    save_dir = tmp_path_factory.mktemp("trained")
    assert main(["train", str(bench.config), "--set", f"save_dir={save_dir}"]) == 0
    (run,) = save_dir.iterdir()
    return run


@pytest.fixture
def refused(bench: Bench, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command line that must be refused and returns its message."""

    def run(*argv: Any) -> str:
        before = bench.listing()
        capsys.readouterr()
        code = main([str(argument) for argument in argv])
        err = capsys.readouterr().err
        assert code == 2, err
        assert "Traceback" not in err
        assert err.startswith("error: "), err
        assert err.count("\n") == 1, err
        assert bench.listing() == before, "something was written or removed"
        return err

    return run
