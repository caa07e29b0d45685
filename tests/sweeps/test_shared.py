"""`e2e-sae sweep --shared`: which runs train together, and that each is what it would have been on its own."""

import signal
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from e2e_sae.config import Config
from e2e_sae.errors import RunFailed, UserError
from e2e_sae.group import member_configs
from e2e_sae.scripts.cli import main
from e2e_sae.sweeps.groups import shared_groups
from e2e_sae.sweeps.plan import plan_sweep
from e2e_sae.sweeps.run import run_sweeps
from e2e_sae.sweeps.sweep_file import read_sweep
from e2e_sae.train import train
from tests.sweeps.conftest import SweepFile
from tests.sweeps.test_plan import runs_of
from tests.sweeps.test_run import TRAIN, SweepProcess, n_saved, seeds, starts, statuses, wait_for
from tests.tiny_runs import assert_same, console, lines_of, weights

POSITIONS = {"parameters": {"sae_positions": {"values": ["blocks.1.hook_resid_pre", "blocks.2.hook_resid_pre"]}}}


@pytest.fixture
def unshuffled(base_values: dict[str, Any]) -> dict[str, Any]:
    """A base config with which the seed does not change the rows."""
    return {**base_values, "train_data": {**base_values["train_data"], "shuffle": False}}


def groups_of(sweep_dir: Path, files: list[Path], n_at_most: int = 0) -> list[list[str]]:
    """Returns the varied values of each group's runs."""
    plans = [plan_sweep(read_sweep(file, 2), [], lambda run: None, sweep_dir / "memory.json") for file in files]
    groups = shared_groups(plans, sweep_dir, n_at_most)
    return [[" ".join(map(str, n.run.varied.values())) for n in group] for group in groups]


def folders_of_processes(out: Path) -> list[int]:
    """Returns how many runs each process had that began some."""
    found = [len(member_configs(Config.from_file(file))) for file in out.glob("runs/*/members.yaml")]
    return sorted(found)


# --- who trains together ---


def test_runs_that_differ_in_what_members_may_train_together_and_others_do_not(
    sweep_file: SweepFile, tmp_path: Path
) -> None:
    values = {"lr": {"values": [0.1, 0.2]}, "batch_size": {"values": [1, 2]}}
    one = sweep_file(name="one", parameters=values)
    assert groups_of(tmp_path, [sweep_file(name="x", parameters={**values, "lr": {"value": 1}})]) == [["1"], ["2"]]
    both = [
        sweep_file(name="a", parameters={"lr": {"values": [1, 2]}}),
        sweep_file(name="b", parameters={"saes": POSITIONS}),
    ]
    together = ["1", "2", "blocks.1.hook_resid_pre", "blocks.2.hook_resid_pre"]
    assert groups_of(tmp_path, both) == [together]
    assert groups_of(tmp_path, both, 3) == [together[:3], together[3:]]
    assert len(groups_of(tmp_path, [one])) == 1  # --count 2: of one batch size


def test_a_seed_that_brings_other_rows_trains_alone_unless_the_data_have_their_own(
    sweep_file: SweepFile, base_values: dict[str, Any], unshuffled: dict[str, Any], tmp_path: Path
) -> None:
    with console() as said:
        assert groups_of(tmp_path, [sweep_file(parameters=seeds(1, 2))]) == [["1"], ["2"]]
    assert any("give train_data.seed" in line for line in said)
    seeded = {**base_values, "train_data": {**base_values["train_data"], "seed": 3}}
    for base in (unshuffled, seeded):
        with console() as said:
            assert groups_of(tmp_path, [sweep_file(base=base, parameters=seeds(1, 2))]) == [["1", "2"]]
        assert said == []


def test_runs_of_bayes_stay_alone(sweep_file: SweepFile, unshuffled: dict[str, Any], tmp_path: Path) -> None:
    bayes = {"method": "bayes", "metric": {"name": "x"}, "parameters": {"lr": {"min": 0.1, "max": 0.2}}}
    files = [sweep_file(base=unshuffled, name="b", **bayes), sweep_file(base=unshuffled, parameters=seeds(1, 2))]
    assert [len(group) for group in groups_of(tmp_path, files)] == [2, 1, 1]


# --- in processes ---


def test_a_failing_run_of_a_group_fails_alone_and_is_tried_again(
    sweep_file: SweepFile, unshuffled: dict[str, Any], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "broken").touch()
    files = [
        sweep_file(base=unshuffled, parameters=seeds(3, 13, 1)),
        sweep_file(base=unshuffled, name="other", parameters=seeds(1, 2)),
    ]
    with console(), pytest.raises(RunFailed) as caught:
        run_sweeps(files, out=out, jobs=2, shared=3)
    first, listed = str(caught.value).splitlines()
    assert first.endswith(f"to try them again: e2e-sae sweep {files[0]} {files[1]} --out {out} --jobs 2 --shared 3")
    assert listed.strip().startswith("sweep seed=13: unlucky (exit code 1); log: ")
    (log,) = out.glob("runs/*seed=13*/console.log")
    assert "trained together with others: see" in log.read_text()
    assert folders_of_processes(out) == [3], "the fourth was alone, the second 1 is the first"
    table = pd.read_csv(out / "sweep.csv")
    assert table["seed"].tolist() == [3, 13, 1, 1, 2], "in the order of the plans"
    assert statuses(out) == {3: "finished", 13: "failed", 1: "finished", 2: "finished"}

    (out / "broken").unlink()
    with console() as said:
        run_sweeps(files, out=out, shared=0)
    assert starts(out) == {3: ["config"], 13: ["config", "resume"], 1: ["config"], 2: ["config"]}
    assert set(statuses(out).values()) == {"finished"}
    assert "3 of 5 runs had been finished before" in said


@pytest.mark.slow
def test_a_signal_ends_the_groups_and_the_same_command_goes_on_together(
    sweep_file: SweepFile, unshuffled: dict[str, Any], tmp_path: Path, repo: Path
) -> None:
    out, file = tmp_path / "out", sweep_file(base=unshuffled, parameters=seeds(1, 99, 2))
    sweep = SweepProcess(repo, out, file, "--shared")
    wait_for(lambda: 99 in starts(out) or sweep.process.poll() is not None, "the second run")
    sweep.process.send_signal(signal.SIGTERM)
    code, error = sweep.end()
    assert code == 143, error
    assert error.strip().endswith(f"go on with: e2e-sae sweep {file} --out {out} --shared")
    assert statuses(out) == {1: "finished", 99: "interrupted", 2: "interrupted"}
    (out / "enough").touch()
    run_sweeps([file], out=out, shared=0)
    assert starts(out) == {1: ["config"], 99: ["config", "resume"], 2: ["resume"]}
    assert "goes on" not in (out / "sweep.csv").read_text()


def test_the_runs_of_a_shared_sweep_are_those_of_their_own_configs(
    sweep_file: SweepFile, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = sweep_file(program=TRAIN, parameters={"saes": POSITIONS})
    out = tmp_path / "out"
    assert main(["sweep", str(file), "--out", str(out), "--shared"]) == 0, capsys.readouterr().err
    assert folders_of_processes(out) == [2]
    table = pd.read_csv(out / "sweep.csv")
    assert table["status"].tolist() == ["finished"] * 2
    for run, run_dir in zip(runs_of(file), table["run_dir"].tolist(), strict=True):
        reference = train(run.config.model_copy(update={"save_dir": tmp_path / "reference"}))
        assert_same(weights(out / run_dir), weights(reference))
        assert lines_of(out / run_dir) == lines_of(reference)


@pytest.mark.slow
@pytest.mark.smoke
def test_killed_at_random_moments_a_shared_sweep_ends_with_the_same_weights(
    sweep_file: SweepFile, base_values: dict[str, Any], tmp_path: Path, repo: Path
) -> None:
    data = {**base_values["train_data"], "n_epochs": 40}
    base = {**base_values, "n_samples": 600, "save_every_n_samples": 40, "train_data": data}
    file, out = sweep_file(program=TRAIN, base=base, parameters={"saes": POSITIONS}), tmp_path / "out"
    references = [train(r.config.model_copy(update={"save_dir": tmp_path / "reference"})) for r in runs_of(file)]
    for n_kills in range(3):
        sweep = SweepProcess(repo, out, file, "--shared")
        saved_before = n_saved(out)
        wait_for(lambda n=saved_before, p=sweep.process: n_saved(out) > n or p.poll() is not None, "another save")
        assert sweep.process.poll() is None, f"finished before kill {n_kills + 1}: {sweep.end()}"
        sweep.process.kill()  # the runs follow by themselves, and the next sweep waits for them
        sweep.end()
    code, error = SweepProcess(repo, out, file, "--shared").end()
    assert code == 0, error
    for reference, run in zip(references, pd.read_csv(out / "sweep.csv")["run_dir"], strict=True):
        assert_same(weights(out / run), weights(reference))


# --- mistakes ---


def test_a_base_config_with_members_is_refused(
    sweep_file: SweepFile, base_values: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="a run of a sweep has no members"):
        run_sweeps([sweep_file(base={**base_values, "members": [{"lr": 1}]})], out=tmp_path / "out")
    with pytest.raises(UserError, match=r"--shared must be at least 1, or without a number \(given: -1\)"):
        run_sweeps([sweep_file()], out=tmp_path / "out", shared=-1)
    assert not (tmp_path / "out").exists()
