"""The one thing that `pyproject.toml` cannot say: a wheel carries `demos/` and `benchmarks/` inside `e2e_sae/`.

So `e2e-sae demo` and `e2e-sae bench` run without a clone. An editable installation reads both where they are.
"""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
SHIPPED = ("demos/*.yaml", "demos/sweeps/*.yaml", "demos/analysis/*.yaml", "demos/stdlib_gpt2/*", "benchmarks/*.py")


class BuildWithFolders(build_py):
    """Copies the modules, then the files of the other folders."""

    def run(self) -> None:
        """Fills the build folder."""
        super().run()
        if self.editable_mode:
            return
        for file in sorted(path for pattern in SHIPPED for path in ROOT.glob(pattern)):
            target = Path(self.build_lib) / "e2e_sae" / file.relative_to(ROOT)
            self.mkpath(str(target.parent))
            self.copy_file(str(file), str(target))


setup(cmdclass={"build_py": BuildWithFolders})
