"""The demo notebook: what is stored is clean, and it runs from top to bottom, offline, in a kernel of its own."""

import ast
import base64
import importlib
import math
import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager

NOTEBOOK = Path(__file__).resolve().parent.parent / "demos" / "train_saes.ipynb"
PNG = b"\x89PNG"


@pytest.fixture
def notebook() -> Any:
    """The notebook as it is stored."""
    return nbformat.read(NOTEBOOK, as_version=4)


def code_of(notebook: Any) -> list[str]:
    """Returns the code cells as plain Python (`%pip` and the like become calls)."""
    transform = TransformerManager().transform_cell
    return [transform(cell.source) for cell in notebook.cells if cell.cell_type == "code"]


def test_the_notebook_is_valid_and_stores_no_outputs(notebook: Any):
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [(cell.outputs, cell.execution_count) for cell in code] == [([], None)] * len(code)
    assert [cell.id for cell in code if "parameters" in cell.metadata.get("tags", [])] == ["parameters"]


def test_everything_the_notebook_imports_is_there(notebook: Any):
    missing: list[str] = []
    for node in (node for source in code_of(notebook) for node in ast.walk(ast.parse(source))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                importlib.import_module(alias.name)
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None
            module = importlib.import_module(node.module)
            missing += [f"{node.module}.{a.name}" for a in node.names if not hasattr(module, a.name)]
    assert missing == []


def test_the_notebook_imports_its_config_and_training_as_the_papers_does(notebook: Any):
    script = "from e2e_sae.scripts.train_tlens_saes.run_train_tlens_saes import"
    source = "\n".join(code_of(notebook))
    assert f"{script} Config" in source
    assert f"{script} main as run_training" in source
    assert "run_training(config)" in source


def test_every_config_that_the_notebook_names_exists(notebook: Any, repo: Path):
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    named = set(re.findall(r"\w+\.yaml", text)) - {"my_run.yaml"}
    folders = (repo / "demos", repo / "e2e_sae" / "scripts" / "train_tlens_saes")
    assert "gpt2_e2e.yaml" in named
    assert [name for name in sorted(named) if not any((folder / name).is_file() for folder in folders)] == []


@pytest.mark.smoke
def test_the_notebook_runs_from_top_to_bottom(notebook: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from nbclient import NotebookClient

    # The kernel's own connection file and settings stay out of the user's home.
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "jupyter"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    (parameters,) = [cell for cell in notebook.cells if cell.id == "parameters"]
    parameters.source = "N_SAMPLES, N_EVAL_SAMPLES, SAVE_DIR = 64, 8, 'out'"
    place = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources=place).execute()

    outputs = {cell.id: cell.outputs for cell in notebook.cells if cell.cell_type == "code"}
    printed = {
        id: "".join(o.text for o in outs if o.output_type == "stream" and o.name == "stdout")
        for id, outs in outputs.items()
    }
    images = {
        id: [o.data["image/png"] for o in outs if "image/png" in o.get("data", {})] for id, outs in outputs.items()
    }
    # Nothing was to be installed: the library is here.
    assert printed["install"] == ""
    (run,) = (tmp_path / "out").iterdir()
    assert str(run) in printed["train"]
    numbers = [float(x) for x in re.findall(r"-?\d+\.\d+", printed["load"])]
    clean, spliced, cost = numbers
    assert all(math.isfinite(x) for x in numbers)
    # The embedded model knows its language (unigram entropy: 6.35 nats), and 64 samples do not make a good SAE.
    assert 0 < clean < 3.5 < spliced
    assert cost == pytest.approx(spliced - clean, abs=2e-3)
    fired = re.findall(r"latent +(\d+), active on +([\d.]+)% of held-out tokens: +\S+ \([\d.]+\)", printed["latents"])
    assert 0 < len({latent for latent, _ in fired}) == len(fired) <= 12
    assert all(float(share) <= 10.0 for _, share in fired)
    for cell in ("log", "latents-figure"):
        (image,) = images[cell]
        assert base64.b64decode(image).startswith(PNG)
        assert len(image) > 10_000, "the figure is empty"
    without, with_sae = re.split(r"^--- with the SAE$", printed["generate"], flags=re.MULTILINE)
    for text in (without, with_sae):
        _, continuation = text.split('class Reader:\n    """')
        assert continuation.strip()
    assert without.split("\n", 1)[1].strip() != with_sae.strip()
