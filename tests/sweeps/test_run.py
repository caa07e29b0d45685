"""A sweep in real processes: what is skipped, goes on, fails, is stopped; mostly with a program that trains nothing."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from e2e_sae.errors import RunFailed, UserError
from e2e_sae.scripts.cli import main
from e2e_sae.sweeps.executor import child_environment
from e2e_sae.sweeps.run import run_sweeps
from e2e_sae.train import train
from tests.sweeps.conftest import SweepFile
from tests.sweeps.test_plan import runs_of
from tests.tiny_runs import assert_same, console, weights

TRAIN = "e2e_sae/scripts/train_tlens_saes/run_train_tlens_saes.py"


def seeds(*values: int) -> dict[str, Any]:
    return {"seed": {"values": list(values)}}


def starts(out: Path) -> dict[int, list[str]]:
    """Returns how each seed's light program was started, in order: `config`, or `resume`."""
    found: dict[int, list[str]] = {}
    for file in sorted(out.glob("runs/*/run_1/starts.txt")):
        seed = yaml.safe_load((file.parent / "final_config.yaml").read_text())["seed"]
        found[seed] = [line.split()[0] for line in file.read_text().splitlines()]
    return found


def statuses(out: Path) -> dict[int, str]:
    table = pd.read_csv(out / "sweep.csv")
    return dict(zip(table["seed"].tolist(), table["status"].tolist(), strict=True))


def n_saved(out: Path) -> int:
    """Returns how many checkpoints there are."""
    return len(list(out.glob("runs/*/*/samples_*")))


def wait_for(claim: Callable[[], bool], what: str) -> None:
    for _ in range(6000):
        if claim():
            return
        time.sleep(0.02)
    raise AssertionError(f"{what} did not come about in two minutes")


def is_alive(pid: int) -> bool:
    """Says whether a process that is not our child runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


class SweepProcess:
    """`e2e-sae sweep` in a process of its own."""

    def __init__(self, repo: Path, out: Path, *arguments: str | Path):
        command = [sys.executable, "-m", "e2e_sae.scripts.cli", "sweep", *map(str, arguments), "--out", str(out)]
        pipe = subprocess.PIPE
        environment = {**os.environ, "PYTHONPATH": str(repo)}
        self.process = subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True)

    def end(self) -> tuple[int, str]:
        """Returns the exit code and what was written to stderr."""
        _, error = self.process.communicate(timeout=120)
        return self.process.returncode, error


# --- skip, go on, fail, try again ---


def test_failing_and_dying_runs_end_alone_and_are_tried_again(
    sweep_file: SweepFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_SWEEP_ID", "of another sweep")
    monkeypatch.delenv("OMP_NUM_THREADS")
    out = tmp_path / "out dir"
    out.mkdir()
    (out / "broken").touch()
    file = sweep_file(parameters=seeds(13, 66, 1, 2))
    with console() as said, pytest.raises(RunFailed) as caught:
        run_sweeps([file], out=out, jobs=2)
    first, *listed = str(caught.value).splitlines()
    assert first == f"2 of 4 runs failed; to try them again: e2e-sae sweep {file} --out '{out}' --jobs 2"
    assert [line.split("; log: ")[0].strip() for line in listed] == [
        "sweep seed=13: error: unlucky (exit code 1)",
        "sweep seed=66: killed by SIGKILL (out of memory?)",
    ]
    logs = [Path(line.split("; log: ")[1]) for line in listed]
    assert [log.read_text().splitlines()[0] for log in logs] == ["seed 13", "seed 66"]
    assert statuses(out) == {13: "failed", 66: "failed", 1: "finished", 2: "finished"}
    assert (out / "pareto.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "sweep.yaml").read_bytes() == file.read_bytes()
    assert any("sweep seed=2: CE increase 0.1667, L0 12.0, 22 alive" in line for line in said)
    cores = len(os.sched_getaffinity(0))
    seen = {file.read_text() for file in out.glob("runs/*/run_1/starts.txt")}
    assert seen == {f"config {max(1, cores // 2)} False\n"}, "half the cores each, and no W&B sweep of somebody else's"

    (out / "broken").unlink()
    with console() as said, pytest.raises(RunFailed, match="1 of 4 runs failed"):
        run_sweeps([file], out=out)
    assert starts(out) == {13: ["config", "resume"], 66: ["config", "resume"], 1: ["config"], 2: ["config"]}
    assert statuses(out)[13] == "finished"
    assert "2 of 4 runs had been finished before" in said


def test_added_values_add_runs_and_a_shared_run_is_trained_once(sweep_file: SweepFile, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run_sweeps([sweep_file(parameters=seeds(1))], out=out)
    files = [sweep_file(parameters=seeds(1, 2)), sweep_file(name="other", parameters=seeds(2, 3))]
    run_sweeps(files, out=out)
    assert starts(out) == {1: ["config"], 2: ["config"], 3: ["config"]}
    table = pd.read_csv(out / "sweep.csv")
    assert table["sweep"].tolist() == ["sweep", "sweep", "other", "other"]
    assert table["seed"].tolist() == [1, 2, 2, 3]
    assert len(set(table["run_dir"])) == 3
    assert all((out / run / "summary.json").is_file() for run in table["run_dir"].tolist())


def test_bayes_learns_from_its_runs_and_goes_on_where_it_was(sweep_file: SweepFile, tmp_path: Path) -> None:
    out = tmp_path / "out"
    # The light program's cost falls with the seed.
    changes = {"method": "bayes", "parameters": {"seed": {"min": 100, "max": 1000}}}
    metric = {"name": "performance/eval/ce_increase"}
    run_sweeps([sweep_file(**changes, metric=metric)], out=out, count=3)
    before = list(statuses(out))
    run_sweeps([sweep_file(**changes, metric=metric)], out=out, count=7)
    after = list(statuses(out))
    assert after[: len(before)] == before
    assert max(after) > max(before)
    assert all(len(how) == 1 for how in starts(out).values())
    with console() as said:
        run_sweeps([sweep_file(**changes, metric={"name": "ce_incraese"})], out=out, count=4)
    assert any("has no finite 'ce_incraese'" in line and "performance/eval/ce_increase" in line for line in said)


# --- stopping ---


@pytest.mark.parametrize(
    ("signum", "code"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)]
)
def test_a_signal_ends_the_runs_and_says_how_to_go_on(
    sweep_file: SweepFile, tmp_path: Path, repo: Path, signum: signal.Signals, code: int
) -> None:
    out, file = tmp_path / "out", sweep_file(parameters=seeds(1, 99, 2))
    sweep = SweepProcess(repo, out, file)
    wait_for(lambda: 99 in starts(out) or sweep.process.poll() is not None, "the second run")
    with pytest.raises(UserError, match=f"'{out}' is in use: another `e2e-sae sweep` runs in it"):
        run_sweeps([file], out=out)
    sweep.process.send_signal(signum)
    returned, error = sweep.end()
    assert returned == code, error
    assert error.strip() == f"interrupted by {signum.name}; go on with: e2e-sae sweep {file} --out {out}"
    assert statuses(out) == {1: "finished", 99: "interrupted"}
    (out / "enough").touch()
    run_sweeps([file], out=out)
    assert starts(out) == {1: ["config"], 99: ["config", "resume"], 2: ["config"]}


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at processes in /proc")
def test_runs_do_not_outlive_a_killed_sweep(sweep_file: SweepFile, tmp_path: Path, repo: Path) -> None:
    out = tmp_path / "out"
    sweep = SweepProcess(repo, out, sweep_file(parameters=seeds(99)))
    wait_for(lambda: 99 in starts(out) or sweep.process.poll() is not None, "the run")
    children = Path(f"/proc/{sweep.process.pid}/task/{sweep.process.pid}/children").read_text().split()
    (child,) = [int(pid) for pid in children]
    assert is_alive(child)
    sweep.process.kill()
    assert sweep.end()[0] == -signal.SIGKILL
    wait_for(lambda: not is_alive(child), "the end of the run's process")


# --- the real program ---


def test_a_run_of_a_sweep_is_the_run_of_its_merged_config(
    sweep_file: SweepFile, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # n_samples=50 is more than there are: that is found only when the data is read, in the run's own process.
    file = sweep_file(program=TRAIN, parameters={"n_samples": {"values": [50, 6]}})
    assert main(["sweep", str(file), "--out", str(tmp_path / "out"), "--jobs", "2", "--set", "lr=0.02"]) == 1
    said, error = capsys.readouterr()
    assert "error: 1 of 2 runs failed" in error
    assert "sweep n_samples=50: error: n_samples=50 is more than the" in error
    table = pd.read_csv(tmp_path / "out" / "sweep.csv")
    assert table["status"].tolist() == ["failed", "finished"]
    done: dict[str, Any] = table.to_dict("records")[1]
    reference = train(runs_of(file, ["lr=0.02"])[1].config.model_copy(update={"save_dir": tmp_path / "reference"}))
    assert_same(weights(tmp_path / "out" / done["run_dir"]), weights(reference))
    assert done["samples"] == 6
    assert f"{done['ce_increase']:.3f}" in said


@pytest.mark.slow
@pytest.mark.smoke
def test_killed_at_random_moments_a_sweep_ends_with_the_same_weights(
    sweep_file: SweepFile, base_values: dict[str, Any], tmp_path: Path, repo: Path
) -> None:
    data = {**base_values["train_data"], "n_epochs": 40}
    base = {**base_values, "n_samples": 600, "save_every_n_samples": 40, "train_data": data}
    file, out = sweep_file(program=TRAIN, base=base, parameters=seeds(0, 1)), tmp_path / "out"
    references = [train(r.config.model_copy(update={"save_dir": tmp_path / "reference"})) for r in runs_of(file)]
    for n_kills in range(3):
        sweep = SweepProcess(repo, out, file, "--jobs", "2")
        saved_before = n_saved(out)
        while n_saved(out) == saved_before and sweep.process.poll() is None:
            time.sleep(0.02)
        assert sweep.process.poll() is None, f"finished before kill {n_kills + 1}: {sweep.end()}"
        sweep.process.kill()  # the runs follow by themselves, and the next sweep waits for them
        sweep.end()
    code, error = SweepProcess(repo, out, file, "--jobs", "2").end()
    assert code == 0, error
    for reference, run in zip(references, pd.read_csv(out / "sweep.csv")["run_dir"], strict=True):
        assert_same(weights(out / run), weights(reference))


# --- mistakes, and what a run's process gets ---


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["none.yaml"], "config 'none.yaml' does not exist"),
        (["{file}", "{file}"], "the sweep files of one call need different names"),
        (["{file}", "--jobs", "0"], "--jobs and --count must be at least 1"),
        (["{file}", "--count", "-1"], "--jobs and --count must be at least 1"),
        (["{file}", "--out", "{file}"], "is a file, not a folder: choose another --out"),
        (["{file}", "--set", "n_sample=3"], "unknown config key 'n_sample'. Did you mean 'n_samples'"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(
    sweep_file: SweepFile, in_tmp_dir: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    file = sweep_file()
    before = sorted(in_tmp_dir.iterdir())
    assert main(["sweep", *(a.format(file=file) for a in arguments)]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert sorted(in_tmp_dir.iterdir()) == before


def test_several_gpus_are_taken_in_turn_and_a_chosen_one_is_left_alone() -> None:
    def gpu(slot: int, gpus: list[str], device: str = "auto") -> str | None:
        return child_environment({}, slot, 3, gpus, device).get("CUDA_VISIBLE_DEVICES")

    assert [gpu(slot, ["4", "GPU-7"]) for slot in range(3)] == ["4", "GPU-7", "4"]
    assert gpu(0, ["4", "5"], "cuda:1") is None
    assert gpu(0, ["4"]) is None
    assert child_environment({"OMP_NUM_THREADS": "7"}, 0, 2, [], "cpu")["OMP_NUM_THREADS"] == "7"
    assert "OMP_NUM_THREADS" not in child_environment({}, 0, 1, [], "cpu")
