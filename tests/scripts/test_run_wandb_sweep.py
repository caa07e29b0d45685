"""Sweeps with the command lines of W&B: create one, run agents, and get one run per choice."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from e2e_sae.errors import UserError
from e2e_sae.scripts.train_tlens_saes.run_wandb_sweep import main, run_agents
from tests.tiny_runs import run_values, write_rows
from tests.wandb_client import client_environment, run_python
from tests.wandb_server import ENTITY, WandbServer

SCRIPTS = Path("e2e_sae/scripts/train_tlens_saes")


@pytest.fixture
def server() -> Iterator[WandbServer]:
    with WandbServer() as server:
        yield server


@pytest.fixture
def created(
    server: WandbServer, tmp_path: Path, repo: Path, tiny_folder: Callable[[str], Path]
) -> tuple[str, dict[str, Any]]:
    """A sweep over two coefficients, made by `wandb sweep`: (agent id, base config)."""
    values = run_values(tiny_folder("gpt2"), write_rows(tmp_path / "rows.parquet", 4), tmp_path / "out")
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(values))
    sweep = {
        "program": str(repo / SCRIPTS / "run_train_tlens_saes.py"),
        "method": "grid",
        "metric": {"name": "loss", "goal": "minimize"},
        "parameters": {
            "seed": {"value": 3},
            "loss": {"parameters": {"sparsity": {"parameters": {"coeff": {"values": [0.25, 4.0]}}}}},
        },
        "command": ["${env}", "${interpreter}", "${program}", "base.yaml", "sweep.yaml"],
    }
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    done = run_python(["-m", "wandb", "sweep", "--project", "swept", "sweep.yaml"], tmp_path, server.url)
    assert done.returncode == 0, done.stderr
    assert f"wandb agent {ENTITY}/swept/sweep0" in done.stdout + done.stderr
    return f"{ENTITY}/swept/sweep0", values


@pytest.mark.smoke
def test_a_sweep_gives_one_run_per_choice_each_with_the_whole_config(
    server: WandbServer, created: tuple[str, dict[str, Any]], tmp_path: Path, repo: Path
) -> None:
    agent_id, values = created
    script = str(repo / SCRIPTS / "run_wandb_sweep.py")
    done = run_python([script, agent_id], tmp_path, server.url, timeout=240, CUDA_VISIBLE_DEVICES="")
    log = tmp_path / "sweep_sweep0.log"
    assert done.returncode == 0, done.stderr + log.read_text()
    assert done.stdout == "agent on the CPU: log in sweep_sweep0.log\n"
    assert len(server.runs) == 2
    assert sorted(run.values["loss"]["sparsity"]["coeff"] for run in server.runs.values()) == [0.25, 4.0]
    for run in server.runs.values():
        assert (run.project, run.sweep, run.exit_code) == ("swept", "sweep0", 0)
        config = yaml.safe_load(run.files["final_config.yaml"])
        assert config["seed"] == 3
        assert config["loss"]["out_to_in"] == values["loss"]["out_to_in"]
        assert config["lr"] == values["lr"]
        assert run.values == config
        assert "loss" in run.history[-1]  # the metric that the sweep names
        assert "samples_4.pt" in run.files


@pytest.mark.slow
def test_agents_that_fail_make_the_command_fail(
    server: WandbServer, created: tuple[str, dict[str, Any]], tmp_path: Path, repo: Path
) -> None:
    script = str(repo / SCRIPTS / "run_wandb_sweep.py")
    done = run_python([script, f"{ENTITY}/swept/nosuch"], tmp_path, server.url, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 1
    assert "error: 1 of 1 agents failed: see sweep_nosuch.log" in done.stderr


@pytest.mark.slow
def test_ctrl_c_ends_the_agents_and_their_runs(
    server: WandbServer, created: tuple[str, dict[str, Any]], tmp_path: Path, repo: Path
) -> None:
    agent_id, values = created
    rows = write_rows(tmp_path / "many.parquet", 20_000)
    (tmp_path / "base.yaml").write_text(
        yaml.safe_dump({**values, "train_data": {**values["train_data"], "dataset_name": str(rows)}})
    )
    environment = {**os.environ, **client_environment(tmp_path, server.url), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(repo / SCRIPTS / "run_wandb_sweep.py"), agent_id]
    with subprocess.Popen(command, env=environment, cwd=tmp_path, stdout=subprocess.PIPE) as process:
        end = time.monotonic() + 90
        while not list(tmp_path.glob("out/*/wandb_run.json")) and time.monotonic() < end:
            time.sleep(0.2)
        time.sleep(3)
        process.send_signal(signal.SIGINT)
        assert process.wait(90) == 130
    (run_dir,) = (tmp_path / "out").iterdir()
    assert list(run_dir.glob("samples_*/resume.pt"))  # the run was asked to stop, and saved itself
    assert [run.exit_code for run in server.runs.values()] == [1]


def test_what_is_no_agent_id_or_no_gpu_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="'a b; c' is no agent id: expected what `wandb sweep` printed"):
        run_agents("a b; c", log_dir=tmp_path)
    assert main(["e/p/s", "99"]) == 2
    assert "error: no GPU [99]: this machine has" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["e/p/s", "0,x"])
    assert "'0,x' is no list of GPUs: expected such as 0,1,3" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
