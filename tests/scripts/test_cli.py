"""The `e2e-sae` command: what it parses, what it passes on, what it prints."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from e2e_sae import __version__
from e2e_sae.scripts.cli import build_parser, main


def _install_module(monkeypatch: pytest.MonkeyPatch, name: str, **functions: Any) -> None:
    """Puts a stand-in where the command looks for its work: passing arguments on is what is tested."""
    module = ModuleType(name)
    vars(module).update(functions)
    monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture
def train_calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    calls: list[tuple[Any, ...]] = []

    def fake(config: Any, *, overrides: Any, resume: Any) -> None:
        calls.append((config, overrides, resume))

    _install_module(monkeypatch, "e2e_sae.scripts.train_tlens_saes.run_train_tlens_saes", main=fake)
    return calls


def test_train_passes_on_config_overrides_and_resume(train_calls: list[tuple[Any, ...]]) -> None:
    assert main(["train", "a.yaml", "--set", "lr=1e-3", "--set", "seed=1", "--resume", "out/r"]) == 0
    assert train_calls == [("a.yaml", ["lr=1e-3", "seed=1"], [Path("out/r")])]


def test_train_needs_no_config_to_resume(train_calls: list[tuple[Any, ...]]) -> None:
    assert main(["train", "--resume", "out/r"]) == 0
    assert train_calls == [(None, [], [Path("out/r")])]


def test_train_resumes_several_runs_and_knows_a_config_behind_them(
    train_calls: list[tuple[Any, ...]], tmp_path: Path
) -> None:
    config = tmp_path / "c.yaml"
    config.touch()
    assert main(["train", "--resume", "out/r", "out/s"]) == 0
    assert main(["train", "--resume", "out/r", str(config)]) == 0
    assert train_calls == [(None, [], [Path("out/r"), Path("out/s")]), (config, [], [Path("out/r")])]


def test_train_without_config_and_resume_is_a_mistake(
    train_calls: list[tuple[Any, ...]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train"]) == 2
    assert "expected a CONFIG file, or --resume RUN_DIR" in capsys.readouterr().err
    assert train_calls == []


def test_evaluate_prints_the_metrics_and_writes_them_as_json(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = {"performance/eval/ce_increase": 0.125, "n": 3, "broken": float("nan")}

    def fake(run_dir: Path, *, overrides: list[str]) -> dict[str, Any]:
        assert (run_dir, overrides) == (Path("run"), ["batch_size=2"])
        return metrics

    _install_module(monkeypatch, "e2e_sae.evaluate_run", evaluate_run_dir=fake)
    out = tmp_path / "metrics.json"
    assert main(["evaluate", "run", "--json", str(out), "--set", "batch_size=2"]) == 0
    assert json.loads(out.read_text()) == {**metrics, "broken": None}
    assert re.search(r"^performance/eval/ce_increase +0\.125$", capsys.readouterr().out, re.MULTILINE)


def test_evaluate_refuses_a_json_file_in_a_folder_that_is_not_there_before_working(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", "run", "--json", str(tmp_path / "no" / "m.json")]) == 2
    assert "does not exist" in capsys.readouterr().err


def test_demo_passes_on_its_folder_and_overrides(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Path, list[str]]] = []
    _install_module(monkeypatch, "e2e_sae.demo", run_demo=lambda out, overrides: calls.append((out, overrides)))
    assert main(["demo"]) == main(["demo", "--out", "elsewhere", "--set", "n_samples=8"]) == 0
    assert calls == [(Path("out"), []), (Path("elsewhere"), ["n_samples=8"])]


@pytest.mark.parametrize("command", ["train", "evaluate", "demo", "new-config"])
def test_every_subcommand_has_help_and_debug(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        build_parser().parse_args([command, "--help"])
    assert "--debug" in capsys.readouterr().out


def test_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"e2e-sae {__version__}\n"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "required: COMMAND"),
        (["trian", "a.yaml"], "invalid choice: 'trian'"),
        (["evaluate"], "required: RUN_DIR"),
        (["train", "a.yaml", "--sett", "x=1"], "unrecognized arguments: --sett"),
    ],
)
def test_a_malformed_command_line_exits_with_2(argv: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(argv)
    assert words in capsys.readouterr().err


def test_help_and_mistakes_import_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from e2e_sae.scripts.cli import main\n"
        "assert main(['train']) == 2\n"
        "print([m for m in ('torch', 'transformer_lens', 'wandb', 'numpy', 'pydantic') if m in sys.modules])"
    )
    # Coverage of subprocesses would import what is being looked for.
    env = {k: v for k, v in os.environ.items() if not k.startswith("COV_")}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "[]"
