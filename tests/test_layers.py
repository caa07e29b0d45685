"""Imports point up the page: a module imports only what stands above it in `LAYERS`.

Read from the syntax tree, so that imports inside functions count as well.
"""

import ast
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "e2e_sae"

LAYERS = [
    # Ground: no torch, nothing at import.
    "errors",
    "settings",
    "lazy",
    "log",
    "progress",
    "interrupts",
    "wandb_session",
    "seeds",
    "stopwatch",
    "types",
    "base_config",
    # Vocabulary.
    "acts",
    "hooks",
    "distributed",
    # Arithmetic.
    "compiling",
    "precision",
    "ops",
    # Components.
    "saes",
    "data",
    "losses",
    "sparsity_control",
    "metrics",
    "muon",
    "optim",
    "update_rules",
    "guarded_optimizer",
    "weight_average",
    "revival",
    "dead_latents",
    # The whole run as data. What a model is, as settings, stands above the code that loads one.
    "models.lm_config",
    "member_overrides",
    "saes_config",
    "phase_config",
    "config",
    "phases",
    "group",
    "run_types",
    "checkpoint",
    "convert",
    "token_dataset",
    "trackers",
    "wandb_tracker",
    "tracked_run",
    # The language model and everything that runs it.
    "models",
    "lm_training",
    "mlp_training",
    "evaluate",
    "data_init",
    # A run: its members, how it begins, the loop, its summary.
    "member",
    "health",
    "resume",
    "setup",
    "evaluate_run",
    "train",
    "finetune",
    "plotting",
    "sweeps",
    "analysis",
    "demo",
    "bench",
    "new_config",
    # Import paths of the paper's library.
    "legacy",
    "loader",
    "utils",
    "models.sparsifiers",
    # Commands.
    "scripts",
]
"""Top to bottom. A folder's name covers its files; a file that has its own line stands where that line is.
Files of one line may import each other."""


class Import(NamedTuple):
    """One imported module of the package (dotted, without `e2e_sae.`), and the line that imports it."""

    module: str
    line: int


def layer_of(module: str) -> int:
    """Returns the position of the most specific line of `LAYERS` that covers a module.

    Raises:
        LookupError: no line covers it.
    """
    parts = module.split(".")
    for n in range(len(parts), 0, -1):
        name = ".".join(parts[:n])
        if name in LAYERS:
            return LAYERS.index(name)
    raise LookupError(
        f"module 'e2e_sae.{module}' stands in no layer: add '{parts[0]}' to LAYERS in tests/test_layers.py, "
        "below everything it imports and above everything that imports it"
    )


def imports_of(source: str, known: set[str]) -> list[Import]:
    """Returns the package's modules that a source text imports, at any depth.

    Args:
        source: Python code.
        known: names of the package's modules; tells `from e2e_sae.data import batches` (a module) from
            `from e2e_sae.errors import UserError` (a name in one).
    """
    found: list[Import] = []
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            joined = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [j if j.removeprefix("e2e_sae.") in known else node.module for j in joined]
        modules = dict.fromkeys(n.removeprefix("e2e_sae.") for n in names if n.startswith("e2e_sae."))
        found += [Import(module, node.lineno) for module in modules]  # pyright: ignore[reportAttributeAccessIssue]
    return found


def violations(module: str, source: str, known: set[str]) -> list[str]:
    """Returns one line per import that points down the page."""
    own = layer_of(module)
    return [
        f"e2e_sae/{module.replace('.', '/')}.py:{line}: '{LAYERS[own]}' must not import '{imported}': "
        f"'{LAYERS[layer_of(imported)]}' stands below it"
        for imported, line in imports_of(source, known)
        if layer_of(imported) > own
    ]


def package_modules() -> dict[str, Path]:
    """Returns the file of every module; the package's own `__init__` is its face and stands outside."""
    modules: dict[str, Path] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name:
            modules[name] = path
    return modules


def test_imports_point_up_the_page() -> None:
    modules = package_modules()
    found = [
        line
        for name, path in modules.items()
        for line in violations(name, path.read_text(encoding="utf-8"), set(modules))
    ]
    assert not found, "\n" + "\n".join(found)


def test_no_file_is_called_utils() -> None:
    # `e2e_sae/utils.py` may exist as a legacy re-export and nothing else (design, decision 14).
    rooms = [p.name for p in PACKAGE.rglob("*.py") if p.stem in {"helpers", "misc"} or p.stem == "utils"]
    assert rooms in ([], ["utils.py"]), f"name what is in it: {rooms}"


@pytest.mark.parametrize(
    "source",
    [
        "from e2e_sae.train import train",
        "import e2e_sae.train",
        "from e2e_sae.models import runner",
        "def f():\n    if True:\n        from e2e_sae.models.runner import Runner",
    ],
)
def test_an_import_that_points_down_is_caught(source: str) -> None:
    found = violations("losses", source, {"train", "models", "models.runner"})
    line = source.count("\n") + 1
    assert len(found) == 1
    assert found[0].startswith(f"e2e_sae/losses.py:{line}: 'losses' must not import")
    assert found[0].endswith("stands below it")


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("losses", "from e2e_sae.errors import UserError\nimport torch\nfrom torch import train"),
        ("config", "from e2e_sae.models.lm_config import ProcessingConfig"),
        ("config", "from e2e_sae.models import lm_config"),
        ("models.runner", "from e2e_sae.models.lm import load_lm"),
        ("scripts.cli", "from e2e_sae import __version__"),
    ],
)
def test_an_import_that_points_up_or_sideways_passes(module: str, source: str) -> None:
    assert violations(module, source, {"models", "models.lm", "models.lm_config"}) == []


def test_a_file_with_its_own_line_stands_there_and_not_with_its_folder() -> None:
    assert layer_of("models.lm_config") < layer_of("config") < layer_of("models.lm")
    assert violations("models.lm_config", "from e2e_sae.models.lm import load_lm", {"models.lm"}) != []


def test_a_module_without_a_layer_says_where_to_add_it() -> None:
    with pytest.raises(LookupError, match=r"'e2e_sae\.newroom\.thing' stands in no layer: add 'newroom' to LAYERS"):
        layer_of("newroom.thing")
