"""The wheel holds what the clone holds: every sub-package, the YAML files, the type marker, the command."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from e2e_sae import __version__

REPO = Path(__file__).resolve().parent.parent


@pytest.mark.smoke
def test_the_wheel_holds_every_module_and_the_command(tmp_path: Path) -> None:
    # From a copy: building writes `build/` beside the sources.
    source = tmp_path / "source"
    names = ("e2e_sae", "pyproject.toml", "README.md", "LICENSE")
    for name in names:
        command = ["cp", "-R", str(REPO / name), str(source / name)]
        source.mkdir(exist_ok=True)
        subprocess.run(command, check=True)
    options = ["--no-deps", "--no-build-isolation", "--no-index", "-q", "-w", str(tmp_path / "wheels")]
    build = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", str(source), *options], capture_output=True, text=True
    )
    assert build.returncode == 0, build.stderr
    (wheel,) = (tmp_path / "wheels").glob("*.whl")
    assert wheel.name == f"e2e_sae-{__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        packed = set(archive.namelist())
        commands = archive.read(f"e2e_sae-{__version__}.dist-info/entry_points.txt").decode()
    files = {p for pattern in ("*.py", "*.yaml", "py.typed") for p in (REPO / "e2e_sae").rglob(pattern)}
    missing = {str(p.relative_to(REPO)) for p in files} - packed
    assert not missing, f"not in the wheel: {sorted(missing)}"
    assert "e2e-sae = e2e_sae.scripts.cli:main" in commands
    assert not [name for name in packed if name.startswith(("tests", "demos"))]
