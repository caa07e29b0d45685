"""What holds for the repository as a whole: names exist, files are valid, imports are light."""

import importlib
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

REPO = Path(__file__).resolve().parent.parent
DOCUMENTS = [p for p in (REPO / "README.md", *sorted(REPO.glob("docs/**/*.md"))) if p.is_file()]
SCRIPTS = sorted(p for p in (REPO / "e2e_sae" / "scripts").rglob("*.py") if p.name != "__init__.py")
YAML_FILES = sorted(p for folder in ("demos", "e2e_sae/scripts", "benchmarks") for p in (REPO / folder).rglob("*.yaml"))
LOGGED = {"performance/eval/ce_increase", "loss/eval/logits_kl"}
"""Log keys that a sweep may be after (`tests/test_evaluate.py` has all of them)."""
TOP_FOLDERS = ("e2e_sae/", "tests/", "demos/", "docs/", "benchmarks/", ".ci/", ".vscode/")


def _id(path: Path) -> str:
    return str(path.relative_to(REPO))


def _listed_files() -> list[Path]:
    """Returns the files of the repository that git does not ignore."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listing = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    if listing.returncode != 0:
        pytest.skip("not a git clone")
    return [REPO / name for name in listing.stdout.split("\0") if name and (REPO / name).is_file()]


def _make_targets() -> set[str]:
    return set(re.findall(r"^([a-z0-9-]+):", (REPO / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


def named_paths(text: str) -> list[str]:
    """Returns the local paths that a Markdown text names, as links or in code."""
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text)]
    local = [link for link in links if link and not re.match(r"[a-z]+:", link)]
    code = " ".join(re.findall(r"`([^`\n]+)`", text) + re.findall(r"```.*?```", text, re.DOTALL))
    tokens = [token.strip("\"',;:()[]=") for token in re.split(r"[\s=]+", code)]
    is_path = re.compile(r"[\w./-]+")
    return local + [t for t in tokens if t.startswith(TOP_FOLDERS) and is_path.fullmatch(t)]


def named_targets(text: str) -> list[str]:
    """Returns the make targets that a Markdown text names in code."""
    code = re.findall(r"`([^`\n]+)`", text) + re.findall(r"```.*?```", text, re.DOTALL)
    return re.findall(r"\bmake ([a-z][a-z0-9-]*)", "\n".join(code))


def test_named_paths_and_targets_are_found_in_links_code_and_fences() -> None:
    text = (
        "See [this](docs/a.md#part) or [that](https://x.org/y), `make demo` and make up your mind.\n"
        "Run `python e2e_sae/scripts/x.py <config.yaml>`, look into `out/run/`.\n"
        "```bash\nmake test-tl3 && e2e-sae train demos/e2e.yaml\n```\n"
    )
    assert named_paths(text) == ["docs/a.md", "e2e_sae/scripts/x.py", "demos/e2e.yaml"]
    assert named_targets(text) == ["demo", "test-tl3"]


@pytest.mark.parametrize("document", DOCUMENTS, ids=_id)
def test_every_path_and_make_target_in_the_documents_exists(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    missing = [p for p in named_paths(text) if not ((document.parent / p).exists() or (REPO / p).exists())]
    assert not missing, f"{document.name} names paths that do not exist: {missing}"
    unknown = set(named_targets(text)) - _make_targets()
    assert not unknown, f"{document.name} names make targets that do not exist: {sorted(unknown)}"


def test_the_makefile_has_every_promised_target() -> None:
    verbs = {"install", "install-dev", "demo", "format", "check", "type", "bench"}
    assert verbs | {"test", "test-all", "test-tl3"} <= _make_targets()


@pytest.mark.parametrize("script", SCRIPTS, ids=_id)
def test_every_script_can_be_imported(script: Path) -> None:
    importlib.import_module(".".join(script.relative_to(REPO).with_suffix("").parts))


@pytest.mark.parametrize(
    ("statement", "heavy"),
    [
        ("import e2e_sae", ("torch", "transformer_lens", "transformers", "wandb", "numpy", "pydantic")),
        ("import e2e_sae.config", ("transformer_lens", "transformers", "wandb")),
    ],
)
def test_importing_configs_and_the_package_is_light(statement: str, heavy: tuple[str, ...]) -> None:
    code = f"{statement}\nimport sys\nprint([m for m in {heavy!r} if m in sys.modules])"
    env = {k: v for k, v in os.environ.items() if not k.startswith("COV_")}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=REPO)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "[]"


def test_importing_the_package_writes_and_prints_nothing(tmp_path: Path) -> None:
    env = {**os.environ, "CI": "1", "PYTHONPATH": str(REPO), "PYTHONDONTWRITEBYTECODE": "1"}
    env.pop("GITHUB_WORKSPACE", None)
    before = {p.name for p in REPO.iterdir()}
    command = [sys.executable, "-c", "import e2e_sae, e2e_sae.log, e2e_sae.settings, e2e_sae.scripts.cli"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []
    assert "logs" not in {p.name for p in REPO.iterdir()} - before


@pytest.mark.parametrize("path", YAML_FILES, ids=_id)
def test_every_shipped_yaml_is_valid(path: Path, tmp_path: Path) -> None:
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    if "method" in values and "parameters" in values:
        from e2e_sae.sweeps.plan import plan_sweep
        from e2e_sae.sweeps.sweep_file import read_sweep

        # Finds program and base config, and validates every run.
        plan = plan_sweep(read_sweep(path), [], cost=lambda run: None, memory=tmp_path / "unused")
        assert plan.n_runs > 1
        assert values["metric"]["name"] in LOGGED, "a sweep improves something that is not logged"
    elif "saes" in values:
        from e2e_sae.config import Config

        Config.from_file(path)
    elif path.parent.name in ("train_mnist", "train_mlp_saes"):
        from e2e_sae.mlp_training.config import MaxActConfig, MLPConfig, MLPSAEsConfig

        kinds = {"mnist": MLPConfig, "mnist_saes": MLPSAEsConfig, "max_act_data_mnist": MaxActConfig}
        kinds[path.stem].from_file(path)
    elif path.name == "paper_runs.yaml":
        from e2e_sae.analysis.paper import PaperRuns

        PaperRuns.from_file(path)
    else:
        from e2e_sae.lm_training.config import LMConfig

        LMConfig.from_file(path)


def test_launch_configurations_name_files_and_commands_that_exist() -> None:
    import json

    entries = json.loads((REPO / ".vscode" / "launch.json").read_text(encoding="utf-8"))["configurations"]
    named = [entry["program"].removeprefix("${workspaceFolder}/") for entry in entries if "program" in entry]
    named += [arg for entry in entries for arg in entry["args"] if arg.endswith(".yaml")]
    assert [name for name in named if not (REPO / name).is_file()] == []
    modules = {entry["module"] for entry in entries if "module" in entry}
    assert all(importlib.util.find_spec(module) for module in modules)


def test_no_file_names_a_place_of_one_machine() -> None:
    # Joined here, so that this file does not find itself.
    begin, places = r"(?<![\w.$}>/-])/", ("wo" + "rk", "ro" + "ot", "ho" + r"me/\w+")
    anywhere = re.compile(f"{begin}(?:{'|'.join(places)})/")
    in_documents = re.compile(f"{anywhere.pattern}|{begin}{'tm' + 'p'}/")
    found: list[str] = []
    for path in _listed_files():
        if path.stat().st_size > 1_000_000:
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        is_document = path.suffix in {".md", ".yaml", ".yml", ".toml", ".json"} or path.name == "Makefile"
        pattern = in_documents if is_document else anywhere
        for number, line in enumerate(text.splitlines(), start=1):
            if pattern.search(line):
                found.append(f"{_id(path)}:{number}: {line.strip()[:100]}")
    assert not found, "\n" + "\n".join(found)


def test_pinned_versions_have_no_places_and_no_local_tags() -> None:
    for name in ("constraints.txt", "constraints-tl3.txt"):
        lines = [x for x in (REPO / name).read_text(encoding="utf-8").splitlines() if not x.startswith("#")]
        wrong = [line for line in lines if not re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.]*", line)]
        assert not wrong, f"{name}: expected 'name==version', found {wrong}"


def test_both_environments_share_every_version_but_transformer_lens() -> None:
    pins = [
        dict(re.findall(r"^([\w.-]+)==(.+)$", (REPO / name).read_text(encoding="utf-8"), re.MULTILINE))
        for name in ("constraints.txt", "constraints-tl3.txt")
    ]
    differing = {name for name in pins[0].keys() & pins[1].keys() if pins[0][name] != pins[1][name]}
    assert differing == {"transformer-lens"}


def test_every_dependency_is_pinned() -> None:
    import tomllib

    project = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = project["dependencies"] + project["optional-dependencies"]["dev"]
    names = {re.split(r"[<>=\[]", requirement)[0].lower().replace("_", "-") for requirement in wanted}
    lines = (REPO / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in lines}
    assert names <= pinned, f"not in constraints.txt: {sorted(names - pinned)}"
