"""The one thing that `pyproject.toml` cannot say: a wheel carries `demos/` as `e2e_sae/demos/`.

So `e2e-sae demo` runs without a clone. An editable installation reads `demos/` where it is.
"""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

DEMOS = Path(__file__).resolve().parent / "demos"
SHIPPED = ("*.yaml", "sweeps/*.yaml", "stdlib_gpt2/*")


class BuildWithDemos(build_py):
    """Copies the modules, then the demo's files."""

    def run(self) -> None:
        """Fills the build folder."""
        super().run()
        if self.editable_mode:
            return
        for file in sorted(path for pattern in SHIPPED for path in DEMOS.glob(pattern)):
            target = Path(self.build_lib) / "e2e_sae" / file.relative_to(DEMOS.parent)
            self.mkpath(str(target.parent))
            self.copy_file(str(file), str(target))


setup(cmdclass={"build_py": BuildWithDemos})
