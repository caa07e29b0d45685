"""An interrupted run ends where it would have ended: the same weights bit for bit, the same log."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from logging import Handler
from pathlib import Path
from typing import Any

import pytest
import yaml

from e2e_sae.checkpoint.files import fingerprint, read_pickled_tensors, write_pickled
from e2e_sae.checkpoint.run_dir import RunDir, read_checkpoint_info
from e2e_sae.config import Config
from e2e_sae.errors import CheckpointError, Interrupted, UserError
from e2e_sae.log import logger
from e2e_sae.scripts.cli import main
from e2e_sae.train import resume_training, train
from tests.killed_runs import assert_ended_alike, killed
from tests.tiny_runs import (
    E2E,
    E2E_DS,
    LOCAL,
    N_CTX,
    assert_same,
    console,
    files_in,
    lines_of,
    run_config,
    run_values,
    weights,
    write_rows,
)

A, B = "blocks.1.hook_resid_pre", "blocks.2.hook_resid_pre"


@pytest.fixture(scope="module")
def model(tiny_folder: Callable[[str], Path]) -> Path:
    return tiny_folder("gpt2")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    """A local run of 8 steps, saved after steps 3, 6 and 8, with a window of firing counts open at each save."""
    folder = tmp_path_factory.mktemp("finished")
    config = run_config(
        model,
        write_rows(folder / "rows.parquet", 16),
        folder,
        save_every_n_samples=6,
        collect_act_frequency_every_n_samples=2,
        act_frequency_n_tokens=5 * N_CTX,
        eval_every_n_samples=8,
        eval_data={"dataset_name": str(write_rows(folder / "eval.parquet", 3, seed=1)), "n_ctx": N_CTX},
    )
    run = train(config)
    assert run is not None
    return run


def corrupt(checkpoint: Path) -> None:
    file = next(checkpoint.glob("blocks-*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


# --- from a checkpoint ---


def test_a_killed_run_ends_with_the_same_weights_and_log(finished: Path, tmp_path: Path) -> None:
    run = killed(finished, tmp_path, keep=2)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"samples": 18, "half a li')
    with console() as said:
        assert resume_training(run) == run
    assert "resuming from samples_12" in said
    assert_ended_alike(run, finished)
    saved = [path.name for path in RunDir(run).checkpoints()]
    assert saved == ["samples_16", "samples_12", "samples_6"]


def test_time_spent_before_the_kill_counts(finished: Path, tmp_path: Path) -> None:
    run = killed(finished, tmp_path, keep=2)
    state = RunDir(run).checkpoints()[0] / "resume.pt"
    resume = read_pickled_tensors(state)
    resume["loop"]["seconds"] = 1000.0
    write_pickled(state, resume)
    info = json.loads((state.parent / "checkpoint.json").read_text())
    info["files"]["resume.pt"] = fingerprint(state)
    (state.parent / "checkpoint.json").write_text(json.dumps(info))
    resume_training(run)
    timing, lines = json.loads((run / "timing.json").read_text()), lines_of(run)
    assert 1000 < timing["seconds"] < 1100
    assert timing["tokens_per_second"] == pytest.approx(lines[-1]["total_tokens"] / timing["seconds"])
    assert timing["members"] == 1


def test_resume_state_is_kept_by_the_newest_two_only(finished: Path, tmp_path: Path) -> None:
    kept = [path.name for path in RunDir(finished).checkpoints() if (path / "resume.pt").exists()]
    assert kept == ["samples_16", "samples_12"]
    with pytest.raises(CheckpointError, match="samples_6' has no resume state"):
        resume_training(killed(finished, tmp_path, keep=1))


@pytest.mark.parametrize(
    "changes",
    [
        # 9 rows twice: batches straddle the epochs, and the checkpoint at 12 lies inside the second.
        {"loss": LOCAL, "train_data": {"n_epochs": 2}, "effective_batch_size": 4, "warmup_samples": 4},
        {"loss": E2E_DS, "train_data": {"n_epochs": 2, "holdout_fraction": 0.2}, "eval_every_n_samples": 4},
        {"loss": E2E, "train_data": {"n_epochs": 2}, "max_grad_norm": 0.1, "dtype": "float64"},
        {"loss": {**E2E, "logits_kl": {"coeff": 1.0, "position_fraction": 0.3}}, "train_data": {"n_epochs": 2}},
        {"loss": LOCAL, "train_data": {"n_epochs": 2}, "saes": {"sae_positions": [A, "blocks.1.attn.hook_z"]}},
    ],
    ids=["local, accumulation", "e2e+ds, held-out rows", "e2e, float64", "e2e, some positions", "per-head SAE"],
)
def test_every_kind_of_run_goes_on_in_the_middle_of_an_epoch(
    tmp_path: Path, model: Path, changes: dict[str, Any]
) -> None:
    changes = {"saes": {"sae_positions": [A, B]}, **changes}
    config = run_config(
        model,
        write_rows(tmp_path / "rows.parquet", 9),
        tmp_path / "out",
        save_every_n_samples=4,
        collect_act_frequency_every_n_samples=6,
        act_frequency_n_tokens=3 * N_CTX,
        **changes,
    )
    reference = train(config)
    assert reference is not None
    run = killed(reference, tmp_path / "killed", keep=-1)
    assert lines_of(run) == lines_of(reference)
    resume_training(run)
    assert_ended_alike(run, reference)


def test_a_damaged_newest_checkpoint_is_told_and_the_one_before_is_taken(finished: Path, tmp_path: Path) -> None:
    run = killed(finished, tmp_path, keep=3)
    corrupt(run / "samples_16")
    with console() as said:
        resume_training(run)
    assert any("samples_16' is damaged" in line and "trying the one before" in line for line in said)
    assert "resuming from samples_12" in said
    assert_ended_alike(run, finished)
    read_checkpoint_info(run / "samples_16")


def test_a_finished_run_whose_last_checkpoint_is_damaged_is_finished_again(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    corrupt(run / "samples_16")
    resume_training(run)
    assert_ended_alike(run, finished)


@pytest.mark.parametrize("left", ["no checkpoint", "only a damaged one"])
def test_without_a_whole_checkpoint_the_run_starts_over_in_the_same_folder(
    finished: Path, tmp_path: Path, left: str
) -> None:
    run = killed(finished, tmp_path, keep=0 if left == "no checkpoint" else 1)
    for checkpoint in RunDir(run).checkpoints():
        (checkpoint / "checkpoint.json").unlink()
    (run / ".samples_6.tmp-123").mkdir()
    with console() as said:
        assert resume_training(run) == run
    assert any("has no whole checkpoint: starting over in the same folder" in line for line in said)
    assert_ended_alike(run, finished)


def test_resuming_a_finished_run_says_so_changes_nothing_and_ends_with_code_0(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files_in(finished)
    with console():
        assert main(["train", "--resume", str(finished)]) == 0
    assert "this run is finished" in capsys.readouterr().out
    assert files_in(finished) == before


def test_a_run_whose_summary_alone_is_missing_only_gets_its_summary(finished: Path, tmp_path: Path) -> None:
    run = killed(finished, tmp_path, keep=3)
    resume_training(run)
    assert_ended_alike(run, finished)


# --- with a config ---


def stored_config(run: Path, **changes: Any) -> Config:
    values = yaml.safe_load((run / "final_config.yaml").read_text())
    return Config.from_dict({**values, **changes})


def test_a_config_that_changes_the_mathematics_is_refused_and_nothing_is_touched(
    finished: Path, tmp_path: Path
) -> None:
    run = killed(finished, tmp_path, keep=2)
    before = files_in(run)
    with pytest.raises(UserError, match="changes what is computed \\(lr: 0.01 -> 0.02; seed: 0 -> 1\\)"):
        resume_training(run, stored_config(run, lr=0.02, seed=1))
    for change in ({"batch_size": 4}, {"n_samples": 14}, {"loss": E2E}, {"saes": {"sae_positions": B}}):
        with pytest.raises(UserError, match="start a new run, or resume without a config"):
            resume_training(run, stored_config(run, **change))
    assert files_in(run) == before


def test_a_config_that_logs_saves_or_evaluates_otherwise_is_taken(finished: Path, tmp_path: Path) -> None:
    run = killed(finished, tmp_path, keep=2)
    changes: dict[str, Any] = {
        "log_every_n_grad_steps": 100,
        "save_every_n_samples": 2,
        "eval_every_n_samples": None,
        "save_dir": str(tmp_path / "elsewhere"),
    }
    resume_training(run, stored_config(run, **changes))
    assert_same(weights(run), weights(finished))
    assert [line["samples"] for line in lines_of(run)] == [2, 4, 6, 8, 10, 12, 16]
    assert (run / "samples_14").is_dir()
    assert not (tmp_path / "elsewhere").exists()


def test_data_that_are_gone_are_told_before_anything_is_touched(finished: Path, tmp_path: Path) -> None:
    run = killed(finished, tmp_path, keep=2)
    config_file = run / "final_config.yaml"
    config_file.write_text(config_file.read_text().replace("rows.parquet", "gone.parquet"))
    before = files_in(run)
    with pytest.raises(UserError, match="gone.parquet"):
        resume_training(run)
    assert files_in(run) == before


# --- by signals ---


@contextmanager
def signal_at(words: str, signum: signal.Signals) -> Iterator[None]:
    """Sends this process a signal when the library says these words."""
    handler = Handler()
    handler.emit = lambda record: signal.raise_signal(signum) if words in record.getMessage() else None
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def test_an_interruption_inside_a_group_saves_after_its_step_and_moves_no_later_save(
    tmp_path: Path, model: Path
) -> None:
    rows = write_rows(tmp_path / "rows.parquet", 16)
    config = run_config(
        model,
        rows,
        tmp_path / "out",
        effective_batch_size=4,
        save_every_n_samples=8,
        eval_every_n_samples=10,
        train_data={"holdout_fraction": 0.1},
    )
    reference = train(config)
    assert reference is not None
    # Evaluated at 2 and at 12 samples, the latter being the end of the third step.
    with console(), signal_at("evaluation at 2 ", signal.SIGTERM), pytest.raises(Interrupted) as caught:
        train(config)
    assert caught.value.signum == signal.SIGTERM
    run = caught.value.run_dir
    assert run is not None
    assert f"interrupted by SIGTERM; go on with: e2e-sae train --resume {run}" in str(caught.value)
    assert [path.name for path in RunDir(run).checkpoints()] == ["samples_4"]
    resume_training(run)
    assert_ended_alike(run, reference)
    saved = [path.name for path in RunDir(reference).checkpoints()]
    assert [path.name for path in RunDir(run).checkpoints()] == [*saved, "samples_4"]


def test_an_interruption_in_the_last_step_leaves_only_the_summary_to_make(tmp_path: Path, model: Path) -> None:
    config = run_config(
        model,
        write_rows(tmp_path / "rows.parquet", 8),
        tmp_path / "out",
        eval_every_n_samples=0,
        train_data={"holdout_fraction": 0.3},
    )
    reference = train(config)
    assert reference is not None
    with console(), signal_at("evaluation at ", signal.SIGINT), pytest.raises(Interrupted) as caught:
        train(config)
    run = caught.value.run_dir
    assert run is not None
    assert not (run / "summary.json").exists()
    resume_training(run)
    assert_ended_alike(run, reference)


def test_without_a_save_dir_an_interruption_ends_without_a_word_about_resuming(tmp_path: Path, model: Path) -> None:
    config = run_config(
        model,
        write_rows(tmp_path / "rows.parquet", 8),
        None,
        eval_every_n_samples=2,
        train_data={"holdout_fraction": 0.3},
    )
    with console(), signal_at("evaluation at 2 ", signal.SIGINT), pytest.raises(Interrupted) as caught:
        train(config)
    assert str(caught.value) == "interrupted by SIGINT"


# --- real processes ---


class Command:
    """`e2e-sae train` in a process of its own."""

    def __init__(self, arguments: list[str], repo: Path):
        command = [sys.executable, "-m", "e2e_sae.scripts.cli", "train", *arguments]
        environment = {**os.environ, "PYTHONPATH": str(repo)}
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True)

    def wait_for_line(self, save_dir: Path, n_lines: int) -> None:
        """Waits until the log of the one run has so many lines, or the process has ended."""
        for _ in range(12_000):
            logs = list(save_dir.glob("*/metrics.jsonl"))
            if self.process.poll() is not None or (logs and logs[0].read_text().count("\n") >= n_lines):
                return
            time.sleep(0.01)
        raise AssertionError("the run logged nothing in two minutes")

    def end(self) -> tuple[int, str]:
        """Returns the exit code and what was written to stderr."""
        _, error = self.process.communicate(timeout=120)
        return self.process.returncode, error


@pytest.fixture(scope="module")
def long_run(tmp_path_factory: pytest.TempPathFactory, model: Path) -> tuple[dict[str, Any], Path]:
    """12 steps with an evaluation at each, which takes its time: the config, and the run that it gives."""
    return make_long_run(tmp_path_factory.mktemp("long"), model, n_samples=24)


def make_long_run(folder: Path, model: Path, n_samples: int) -> tuple[dict[str, Any], Path]:
    values = run_values(
        model,
        write_rows(folder / "rows.parquet", 25),
        folder / "reference",
        loss=E2E,
        eval_every_n_samples=2,
        save_every_n_samples=4,
        n_samples=n_samples,
        train_data={"n_epochs": 10, "holdout_fraction": 0.1},
    )
    run = train(Config.from_dict(values))
    assert run is not None
    return values, run


@pytest.mark.parametrize(
    ("signum", "code"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)]
)
def test_a_signal_saves_and_ends_with_its_code_and_the_run_can_go_on(
    long_run: tuple[dict[str, Any], Path], tmp_path: Path, repo: Path, signum: signal.Signals, code: int
) -> None:
    values, reference = long_run
    save_dir = tmp_path / "out"
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({**values, "save_dir": str(save_dir)}))
    command = Command([str(tmp_path / "c.yaml")], repo)
    command.wait_for_line(save_dir, 2)
    command.process.send_signal(signum)
    returned, error = command.end()
    (run,) = save_dir.iterdir()
    assert returned == code, error
    assert error.strip().endswith(f"interrupted by {signum.name}; go on with: e2e-sae train --resume {run.resolve()}")
    assert "Traceback" not in error
    # Saved after the step at which it stopped: nothing that was logged is lost.
    assert RunDir(run).checkpoints()[0].name == f"samples_{lines_of(run)[-1]['samples']}"
    resume_training(run)
    assert_ended_alike(run, reference)


@pytest.mark.slow
@pytest.mark.smoke
def test_five_kills_at_random_moments_change_nothing_in_the_end(tmp_path: Path, model: Path, repo: Path) -> None:
    values, reference = make_long_run(tmp_path, model, n_samples=200)
    save_dir = tmp_path / "out"
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({**values, "save_dir": str(save_dir)}))
    arguments = [str(tmp_path / "c.yaml")]
    rng, moments = random.Random(), []
    n_kills, n_lines = 0, 1
    while n_kills < 5:
        command = Command(arguments, repo)
        # In steps rather than seconds: a fast machine must not finish before the fifth.
        moments.append((n_lines + rng.randrange(5), rng.uniform(0, 0.05)))
        command.wait_for_line(save_dir, moments[-1][0])
        time.sleep(moments[-1][1])
        assert command.process.poll() is None, f"finished before kill {n_kills + 1}: {moments}, {command.end()}"
        command.process.kill()
        assert command.end()[0] == -signal.SIGKILL
        n_kills += 1
        (run,) = save_dir.iterdir()
        saved = RunDir(run).checkpoints()
        done = int(saved[0].name.removeprefix("samples_")) if saved else 0
        # The next kill comes once the resumed run logs again (a line for every two samples).
        arguments, n_lines = ["--resume", str(run)], done // 2 + 1
        with (run / "metrics.jsonl").open("rb") as file:
            assert file.read().count(b"\n") >= done // 2
    (run,) = save_dir.iterdir()
    code, error = Command(["--resume", str(run)], repo).end()
    assert code == 0, error
    assert_ended_alike(run, reference)
