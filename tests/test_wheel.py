"""The wheel holds what the clone holds, and works without it: installed into an environment of its own."""

import json
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from e2e_sae import __version__

REPO = Path(__file__).resolve().parent.parent
SITE_PACKAGES = Path(pytest.__file__).resolve().parent.parent


def _run(*command: str | Path, cwd: Path) -> str:
    """Runs a command that knows nothing of the clone, and returns what it prints."""
    hidden = ("PYTHONPATH", "COV_", "COVERAGE_")
    env = {k: v for k, v in os.environ.items() if not k.startswith(hidden)}
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{command} failed:\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def listed() -> list[str]:
    """The repository's files, as git lists them, relative to its root."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listing = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    if listing.returncode != 0:
        pytest.skip("not a git clone")
    return [name for name in listing.stdout.split("\0") if name and (REPO / name).is_file()]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, listed: list[str]) -> Path:
    """A copy of the repository: building writes beside the sources."""
    folder = tmp_path_factory.mktemp("source") / "e2e_sae"
    for name in listed:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPO / name, folder / name)
    return folder


def build_wheel(source: Path, into: Path) -> Path:
    """Builds a wheel from a folder or an sdist with this environment's setuptools."""
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check", "-q", "-w")
    _run(sys.executable, "-m", "pip", "wheel", source, *options, into, cwd=into.parent)
    (wheel,) = into.glob("*.whl")
    return wheel


def content(wheel: Path) -> list[str]:
    """Returns the names in a wheel, sorted, duplicates included."""
    with zipfile.ZipFile(wheel) as archive:
        return sorted(archive.namelist())


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel."""
    return build_wheel(source, tmp_path_factory.mktemp("wheel") / "wheels")


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a fresh environment with the wheel; its dependencies are borrowed from the running one."""
    folder = tmp_path_factory.mktemp("environment") / "venv"
    venv.create(folder, with_pip=False, symlinks=os.name != "nt")
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    purelib = Path(_run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip())
    # A path that a .pth file adds has its own .pth files left unread: an editable installation stays out.
    (purelib / "borrowed.pth").write_text(f"{SITE_PACKAGES}\n", encoding="utf-8")
    options = ("--no-deps", "--no-index", "--no-compile", "--disable-pip-version-check", "-q")
    _run(sys.executable, "-m", "pip", "--python", python, "install", *options, wheel, cwd=folder)
    return python


def test_the_wheel_holds_the_package_the_demo_the_benchmarks_and_nothing_else(wheel: Path, listed: list[str]):
    info = f"e2e_sae-{__version__}.dist-info"
    package = [name for name in listed if name.startswith("e2e_sae/")]
    demos = [f"e2e_sae/{name}" for name in listed if name.startswith("demos/") and not name.endswith(".ipynb")]
    benchmarks = [f"e2e_sae/{name}" for name in listed if name.startswith("benchmarks/") and name.endswith(".py")]
    metadata = ["METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE", "top_level.txt"]
    assert content(wheel) == sorted([*package, *demos, *benchmarks, *(f"{info}/{name}" for name in metadata)])
    assert {"e2e_sae/py.typed", "e2e_sae/demos/stdlib_gpt2/model.safetensors"} <= set(content(wheel))
    assert wheel.name == f"e2e_sae-{__version__}-py3-none-any.whl"


def test_a_wheel_from_the_sdist_is_the_same(source: Path, wheel: Path, tmp_path: Path):
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(tmp_path)!r})"
    _run(sys.executable, "-c", code, cwd=source)
    (sdist,) = tmp_path.glob("*.tar.gz")
    assert content(build_wheel(sdist, tmp_path / "wheels")) == content(wheel)


def test_the_installed_package_imports_and_finds_its_demo_without_the_clone(python: Path, tmp_path: Path):
    code = (
        "import json, e2e_sae; from e2e_sae import SAETransformer, Config; from e2e_sae.demo import demo_dir\n"
        "config = Config.from_file(demo_dir() / 'local.yaml')\n"
        "print(json.dumps([e2e_sae.__file__, str(demo_dir()), str(config.tlens_model_path)]))"
    )
    places = [Path(place) for place in json.loads(_run(python, "-c", code, cwd=tmp_path))]
    environment = python.parent.parent
    assert [place for place in places if not place.is_relative_to(environment)] == []
    assert places[1] == places[0].parent / "demos"
    assert list(tmp_path.iterdir()) == []


def test_the_installed_command_lists_its_benchmarks_without_the_clone(python: Path, tmp_path: Path):
    assert "demo-e2e+ds" in _run(python.parent / "e2e-sae", "bench", "--list", cwd=tmp_path)


@pytest.mark.smoke
def test_the_installed_command_runs_the_demo_and_trains_its_configs_in_an_empty_folder(python: Path, tmp_path: Path):
    command = python.parent / "e2e-sae"
    few = ("--set", "n_samples=16", "--set", "eval_n_samples=8", "--set", "act_frequency_n_tokens=1000")
    _run(command, "demo", *few, cwd=tmp_path)
    assert (tmp_path / "out" / "demo.png").is_file()
    assert len(list((tmp_path / "out").glob("*/final_config.yaml"))) == 3
    configs = Path(_run(python, "-c", "from e2e_sae.demo import demo_dir; print(demo_dir())", cwd=tmp_path).strip())
    _run(command, "train", configs / "e2e.yaml", *few, "--set", "save_dir=runs", cwd=tmp_path)
    (run,) = (tmp_path / "runs").iterdir()
    assert "performance/eval/ce_increase" in _run(command, "evaluate", run, "--set", "eval_n_samples=8", cwd=tmp_path)
    # Nothing is written into the installation: it may be read-only.
    assert not [path for path in configs.rglob("*") if path.name in {"out", "runs"}]
