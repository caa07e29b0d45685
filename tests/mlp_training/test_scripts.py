"""The three commands as a user runs them: with their own YAML files, and with mistakes."""

import subprocess
import sys
from pathlib import Path

import pytest

from e2e_sae.mlp_training.config import MaxActConfig, MLPSAEsConfig
from e2e_sae.mlp_training.stored import load_mlp, load_mlp_mod
from e2e_sae.scripts.train_mlp_saes import max_act_data_mnist, train_mnist_saes
from e2e_sae.scripts.train_mnist import run_train_mnist
from e2e_sae.scripts.yaml_command import yaml_command
from e2e_sae.trackers import read_metrics

SCRIPTS = Path(run_train_mnist.__file__).parent.parent


def test_each_script_takes_the_run_of_the_one_before(in_tmp_dir: Path):
    mlp_run = run_train_mnist.main(overrides=["model.hidden_sizes=[10]", "train.n_epochs=20"])
    assert mlp_run.parent == in_tmp_dir / "out"
    overrides = [f"saved_model_dir={mlp_run}", "train.n_epochs=2"]
    saes_run = train_mnist_saes.main(train_mnist_saes.DEFAULT_CONFIG, overrides)
    overrides = [f"infer.model_name={saes_run}", "model.hidden_sizes=[10]", "infer.n_elements_shown=1"]
    data = max_act_data_mnist.main(str(max_act_data_mnist.DEFAULT_CONFIG), overrides)
    assert data.layers["0"].firing_frequency.shape == (100,)
    assert (read_metrics(mlp_run / "metrics.jsonl"))[-1]["test/accuracy"] > 0.8


def run_script(script: str, *overrides: str, folder: Path) -> str:
    """Runs a script as a command in `folder`; it must end well and warn of nothing. Returns what it printed."""
    command = [sys.executable, str(SCRIPTS / script)]
    for override in overrides:
        command += ["--set", override]
    run = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert (run.returncode, run.stderr) == (0, "")
    return run.stdout


def test_without_a_saved_model_one_is_made_first(in_tmp_dir: Path):
    """As a command, in a process of its own, offline."""
    said = run_script("train_mlp_saes/max_act_data_mnist.py", "infer.n_elements_shown=1", "seed=3", folder=in_tmp_dir)
    (result,) = in_tmp_dir.glob("out/max-act_*")
    config = MaxActConfig.from_file(result / "final_config.yaml")
    assert config.infer.model_name is not None
    _, mlp, data = load_mlp_mod(config.infer.model_name)
    assert (mlp.sizes, data) == ([64, 100, 100, 10], "digits")
    saes = MLPSAEsConfig.from_file(config.infer.model_name / "final_config.yaml")
    assert saes.saved_model_dir is not None
    assert saes.seed == 3
    assert load_mlp(saes.saved_model_dir).mlp.sizes == mlp.sizes
    last = read_metrics(config.infer.model_name / "metrics.jsonl")[-1]
    assert last["test/accuracy-original"] > 0.9
    assert last["test/accuracy"] > 0.75
    assert f"test accuracy with sparsifiers {last['test/accuracy']:.4f}" in said


@pytest.mark.smoke
def test_wandb_gets_name_config_and_log_lines(in_tmp_dir: Path):
    """A process of its own, as a user has it; offline, W&B writes what it would send."""
    run_script("train_mnist/run_train_mnist.py", "wandb_project=digits-mlp", "train.n_epochs=1", folder=in_tmp_dir)
    (sent,) = in_tmp_dir.glob("wandb/offline-run-*/run-*.wandb")
    content = sent.read_bytes()
    for word in ("digits-mlp", "orig-train-lr-0.001_bs-64_hidden-100-100", "hidden_sizes", "final_config.yaml"):
        assert word.encode() in content
    for key in ("train/loss", "valid/accuracy", "test/accuracy"):
        assert key.encode() in content


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["no_such.yaml"], "error: config 'no_such.yaml' does not exist"),
        (["--set", "train.lr=1"], "error: unknown config key 'train.lr'"),
        (["--set", "data=nowhere"], "error: config key 'data': no such file or folder: 'nowhere'"),
    ],
)
def test_mistakes_end_with_code_2_and_one_line(
    arguments: list[str], words: str, in_tmp_dir: Path, capsys: pytest.CaptureFixture[str]
):
    code = yaml_command(run_train_mnist.main, "", run_train_mnist.DEFAULT_CONFIG, arguments)
    error = capsys.readouterr().err
    assert code == 2
    assert words in error
    assert error.count("\n") == 1
    assert "Traceback" not in error
    assert list(in_tmp_dir.iterdir()) == []
