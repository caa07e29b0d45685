"""The real W&B client against a stand-in server: what it gets, and that its trouble never is ours."""

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml

from e2e_sae.checkpoint import load_run
from e2e_sae.config import Config
from e2e_sae.errors import RunFailed, UserError
from e2e_sae.models.sae_transformer import SAETransformer
from e2e_sae.scripts.cli import main as command_line
from e2e_sae.scripts.train_tlens_saes.run_train_tlens_saes import main
from e2e_sae.train import resume_training, train
from e2e_sae.wandb_tracker import WandbRunId, losses, start_wandb
from tests.tiny_models import random_tokens
from tests.tiny_runs import E2E, LOCAL, N_CTX, assert_same, console, lines_of, run_values, weights, write_rows
from tests.wandb_client import as_client, client_environment, run_python
from tests.wandb_server import ENTITY, KEY, ServedRun, WandbServer

P = "blocks.1.hook_resid_pre"
HIST = "sparsity/dict_el_frequency_hist"


class Bench(NamedTuple):
    """A config that asks for W&B, in a folder, and what the same training gives without W&B."""

    folder: Path
    values: dict[str, Any]
    alone: Path

    @property
    def config_file(self) -> Path:
        return self.folder / "config.yaml"

    def config(self, **changes: Any) -> Config:
        return Config.from_dict({**self.values, **changes})


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Callable[[str], Path]) -> Bench:
    """Eight steps; windows of firing close at samples 6 and 14; saves at 6, 12 and 16."""
    folder = tmp_path_factory.mktemp("bench")
    values = run_values(
        tiny_folder("gpt2"),
        write_rows(folder / "rows.parquet", 16),
        folder / "out",
        loss=E2E,
        wandb_project="sparse",
        save_every_n_samples=6,
        eval_every_n_samples=8,
        eval_data={"dataset_name": str(write_rows(folder / "eval.parquet", 3, seed=1)), "n_ctx": N_CTX},
        collect_act_frequency_every_n_samples=2,
        act_frequency_n_tokens=5 * N_CTX,
    )
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    alone = train(Config.from_dict({**values, "wandb_project": None, "save_dir": str(folder / "alone")}))
    assert alone is not None
    return Bench(folder, values, alone)


class Online(NamedTuple):
    """A training by the command line, and what the server has of it."""

    server: WandbServer
    run: ServedRun
    run_dir: Path
    said: str


@pytest.fixture(scope="module")
def online(bench: Bench) -> Iterator[Online]:
    with WandbServer() as server:
        done = run_python(["-m", "e2e_sae.scripts.cli", "train", str(bench.config_file)], bench.folder, server.url)
        assert done.returncode == 0, done.stderr
        (run_dir,) = (bench.folder / "out").iterdir()
        yield Online(server, server.run(), run_dir, done.stdout + done.stderr)


@pytest.fixture
def server() -> Iterator[WandbServer]:
    with WandbServer() as server:
        yield server


# --- what W&B gets ---


def test_every_number_of_the_log_reaches_wandb_at_its_number_of_samples(online: Online) -> None:
    sent = {line["_step"]: line for line in online.run.history}
    for line in lines_of(online.run_dir):
        for key, value in line.items():
            if not isinstance(value, dict):
                assert sent[line["samples"]][key] == pytest.approx(value), key


def test_firing_is_drawn_when_a_window_closes_and_told_at_the_end(online: Online) -> None:
    drawn = [line for line in online.run.history if f"sparsity/alive_dict_elements_indices/{P}" in line]
    assert [line["_step"] for line in drawn] == [6, 14]
    table_file = drawn[0][f"{HIST}/{P}_table"]["path"]
    frequencies = [row[0] for row in json.loads(online.run.files[table_file])["data"]]
    assert len(frequencies) == 32
    alive = [i for i, frequency in enumerate(frequencies) if frequency > 0]
    assert drawn[0][f"sparsity/alive_dict_elements_indices/{P}"] == alive
    assert drawn[0][f"sparsity/alive_dict_elements/{P}"] == len(alive)
    logs = [row[0] for row in json.loads(online.run.files[drawn[0][f"{HIST}/log10/{P}_table"]["path"]])["data"]]
    assert logs == pytest.approx([torch.tensor(f + 1e-10, dtype=torch.float64).log10().item() for f in frequencies])
    for key in (f"{HIST}/over_time/{P}", f"{HIST}/over_time/log10/{P}"):
        assert sum(drawn[0][key]["values"]) == 32
    # One number of a whole run, as in `summary.json`.
    summary = json.loads((online.run_dir / "summary.json").read_text())
    n_alive = summary[f"sparsity/alive_dict_elements_final/{P}"]
    assert online.run.summary[f"sparsity/alive_dict_elements_final/{P}"] == n_alive
    assert len(online.run.summary[f"sparsity/alive_dict_elements_indices_final/{P}"]) == n_alive


def test_the_charts_have_the_columns_and_titles_of_the_papers_library(online: Online) -> None:
    charts = online.run.config["_wandb"]["value"]["visualize"]
    for key, column in (
        (f"{HIST}/{P}", "dict element activation frequency"),
        (f"{HIST}/log10/{P}", "log10(dict element activation frequency)"),
    ):
        chart = charts[key]["panel_config"]
        assert chart["panelDefId"] == "wandb/histogram/v0"
        assert chart["fieldSettings"] == {"value": column}
        # 5 x 8 tokens are asked for; batches are 16.
        assert chart["stringSettings"] == {"title": f"{P} (most_recent_n_tokens=48 dict_size=32)"}


def test_wandb_gets_the_whole_config_and_every_checkpoint_but_no_tensor_twice(online: Online) -> None:
    config = yaml.safe_load((online.run_dir / "final_config.yaml").read_text())
    assert yaml.safe_load(online.run.files["final_config.yaml"]) == config
    assert online.run.values == config
    assert online.run.name == "run"
    assert online.run.exit_code == 0
    per_save = ("samples_{}.pt", "samples_{}/checkpoint.json", "samples_{}/firing.safetensors")
    expected = {name.format(n) for n in (6, 12, 16) for name in per_save}
    assert {name for name in online.run.files if name.startswith("samples_")} == expected
    assert WandbRunId.from_dict(json.loads((online.run_dir / "wandb_run.json").read_text())).id == online.run.id
    assert online.server.unknown == []


def test_wandb_says_one_line_and_changes_no_weight(online: Online, bench: Bench) -> None:
    assert [line for line in online.said.splitlines() if "W&B" in line or "wandb:" in line] == [
        f"W&B run: {online.server.url}/{ENTITY}/sparse/runs/{online.run.id}"
    ]
    assert_same(weights(online.run_dir), weights(bench.alone))
    assert lines_of(online.run_dir) == lines_of(bench.alone)


def test_what_was_trained_here_comes_back_from_wandb_with_the_same_logits(online: Online, bench: Bench) -> None:
    tokens = random_tokens(2, N_CTX, seed=3)
    here, _ = SAETransformer.from_local_path(online.run_dir, device="cpu")(tokens)
    with as_client(bench.folder, online.server.url):
        loaded = SAETransformer.from_wandb(online.run.path, device="cpu")
    there, _ = loaded(tokens)
    assert torch.equal(there, here)
    stored = load_run(bench.folder / "sae_cache" / "wandb" / online.run.path / "samples_16")
    ours = load_run(online.run_dir)
    assert (stored.model, stored.config, stored.n_samples) == (ours.model, ours.config, 16)
    assert stored.saes[P].info == ours.saes[P].info


# --- without a server ---


@pytest.mark.filterwarnings("ignore")  # W&B's own
def test_an_offline_run_can_be_uploaded_later_with_all_its_files(
    bench: Bench, server: WandbServer, tmp_path: Path
) -> None:
    with as_client(tmp_path, server.url, None, WANDB_MODE="offline"), console() as said:
        run_dir = train(bench.config())
    assert server.runs == {}
    assert_same(weights(run_dir), weights(bench.alone))
    (told,) = [line for line in said if "upload the run with" in line]
    command = told.partition("upload the run with: ")[2]
    assert command.startswith("wandb sync ")
    done = run_python(["-m", *command.split()], tmp_path, server.url)
    assert done.returncode == 0, done.stdout + done.stderr
    files = server.run().files
    assert {"final_config.yaml", "samples_6.pt", "samples_16.pt", "samples_16/checkpoint.json"} <= set(files)
    assert [line["_step"] for line in server.run().history] == [2, 4, 6, 8, 10, 12, 14, 16]


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        (None, "no API key: put WANDB_API_KEY into .env, or run `wandb login`"),
        ("f" * 40, "the API key was refused: user is not logged in"),
        ("short", "WANDB_API_KEY invalid: API key must have 40+ characters, has 5"),
    ],
)
@pytest.mark.filterwarnings("ignore")  # W&B's own
def test_a_key_that_is_no_good_gives_one_warning(
    server: WandbServer, tmp_path: Path, key: str | None, reason: str
) -> None:
    with as_client(tmp_path, server.url, key), console() as said:
        assert start_wandb("sparse") is None
    assert said == [f"W&B could not be started ({reason}): the run goes on without it"]


@pytest.mark.filterwarnings("ignore")  # W&B's own
def test_with_a_bad_key_the_run_is_the_same(bench: Bench, server: WandbServer, tmp_path: Path) -> None:
    with as_client(tmp_path, server.url, "f" * 40), console() as said:
        run_dir = train(bench.config())
    assert len([line for line in said if "W&B" in line]) == 1
    assert_same(weights(run_dir), weights(bench.alone))
    assert run_dir is not None
    assert not (run_dir / "wandb_run.json").exists()


def test_the_key_may_stand_in_the_env_file_of_the_working_folder(server: WandbServer, tmp_path: Path) -> None:
    # What is not filled in there leaves the environment alone.
    (tmp_path / ".env").write_text(f"WANDB_API_KEY={KEY}\nWANDB_ENTITY=team\nWANDB_BASE_URL=\n")
    with as_client(tmp_path, server.url, None):
        tracker = start_wandb("sparse")
        assert tracker is not None
        tracker.close()
    assert server.run().path.startswith("team/sparse/")


def test_disabled_wandb_is_silent(server: WandbServer, tmp_path: Path) -> None:
    with as_client(tmp_path, server.url, WANDB_MODE="disabled"), console() as said:
        assert start_wandb("sparse") is None
    assert said == []
    assert server.runs == {}


def test_a_mistake_in_the_config_leaves_no_run_at_wandb(bench: Bench, server: WandbServer, tmp_path: Path) -> None:
    with as_client(tmp_path, server.url), pytest.raises(UserError, match="more than the 16 rows"):
        train(bench.config(n_samples=1000))
    assert server.runs == {}


@pytest.mark.filterwarnings("ignore")  # W&B's own
def test_uploads_that_the_server_refuses_are_told_at_the_end(bench: Bench, server: WandbServer, tmp_path: Path) -> None:
    server.refuses_uploads = True
    with as_client(tmp_path, server.url), console() as said:
        tracker = start_wandb("sparse")
        assert tracker is not None
        tracker.save(bench.alone / "samples_6")
        tracker.close()
    (told,) = [line for line in said if "has not got everything" in line]
    assert "failed to upload: status: 403" in told
    assert "upload it with: wandb sync --no-skip-online /" in told


def test_only_what_did_not_arrive_counts_as_lost(tmp_path: Path) -> None:
    log = tmp_path / "debug-internal.log"
    log.write_text(
        '{"level":"INFO","msg":"filestream: sending request"}\n'
        '{"level":"ERROR","msg":"git repo not found"}\n'
        '{"level":"ERROR+4","msg":"filestream: fatal error: 401"}\n'
        "half a li"
    )
    assert losses(log) == ["filestream: fatal error: 401"]
    assert losses(tmp_path / "none.log") == []


@pytest.mark.smoke
def test_a_server_that_dies_in_the_middle_changes_nothing_but_the_last_line(bench: Bench, server: WandbServer) -> None:
    folder = bench.folder / "dies"
    server.dies_at_upload_of = "samples_6.pt"
    started = time.monotonic()
    done = run_python(
        ["-m", "e2e_sae.scripts.cli", "train", str(bench.config_file), "--set", f"save_dir={folder}/out"],
        folder.parent,
        server.url,
    )
    assert time.monotonic() - started < 75
    assert done.returncode == 0, done.stderr
    (run_dir,) = (folder / "out").iterdir()
    assert_same(weights(run_dir), weights(bench.alone))
    told = [line for line in done.stderr.splitlines() if "W&B" in line]
    assert len(told) == 1
    assert "W&B has not got everything" in told[0]
    # What it says does what it says.
    with WandbServer() as other:
        command = told[0].partition("upload it with: ")[2].split()
        synced = run_python(["-m", *command], folder.parent, other.url)
        assert synced.returncode == 0, synced.stdout + synced.stderr
        assert {"samples_6.pt", "samples_16.pt"} <= set(other.run().files)
        assert [line["_step"] for line in other.run().history][-1] == 16


@pytest.mark.slow
@pytest.mark.parametrize("is_stuck", [False, True])
def test_no_server_at_the_start_costs_seconds_and_one_warning(
    bench: Bench, server: WandbServer, tmp_path: Path, is_stuck: bool
) -> None:
    server.is_stuck.set() if is_stuck else server.die()
    code = "from e2e_sae.wandb_tracker import start_wandb; assert start_wandb('sparse') is None"
    started = time.monotonic()
    done = run_python(["-c", code], tmp_path, server.url)
    assert time.monotonic() - started < 40
    assert done.returncode == 0, done.stderr
    (told,) = [line for line in done.stderr.splitlines() if line.strip()]
    assert told.startswith("W&B could not be started (Timed out")


@pytest.mark.smoke
def test_nobody_is_asked_for_a_key_at_a_terminal(server: WandbServer, tmp_path: Path) -> None:
    import os
    import pty

    outside, inside = pty.openpty()
    code = "from e2e_sae.wandb_tracker import start_wandb; assert start_wandb('sparse') is None"
    environment = {**os.environ, **client_environment(tmp_path, server.url)}
    del environment["WANDB_API_KEY"]
    with subprocess.Popen(
        [sys.executable, "-c", code], env=environment, cwd=tmp_path, stdin=inside, stdout=inside, stderr=inside
    ) as process:
        os.close(inside)
        assert process.wait(30) == 0
        said = os.read(outside, 10_000).decode()
        os.close(outside)
    assert "put WANDB_API_KEY into .env" in said
    assert len(said.splitlines()) == 1


# --- ends and beginnings ---


@pytest.mark.filterwarnings("ignore")  # W&B's own
def test_a_run_that_fails_is_failed_at_wandb_too(bench: Bench, server: WandbServer, tmp_path: Path) -> None:
    with as_client(tmp_path, server.url), pytest.raises(RunFailed):
        train(bench.config(loss=LOCAL, lr=1e30))
    assert server.run().exit_code == 1


@pytest.mark.filterwarnings("ignore")  # W&B's own
def test_a_resumed_run_goes_on_in_the_wandb_run_that_it_began(
    bench: Bench, server: WandbServer, tmp_path: Path
) -> None:
    with as_client(tmp_path, server.url):
        run_dir = train(bench.config())
        assert run_dir is not None
        begun = server.run()
        # As `kill -9` would have left it some steps after the second save.
        (run_dir / "summary.json").unlink()
        shutil.rmtree(run_dir / "samples_16")
        begun.history = [line for line in begun.history if line["_step"] <= 14]
        begun.summary = begun.history[-1]
        with console() as said:
            resume_training(run_dir)
    assert server.run() is begun
    assert begun.n_resumes == 1
    assert [line["_step"] for line in begun.history] == [2, 4, 6, 8, 10, 12, 14, 16]
    assert begun.exit_code == 0
    assert [line for line in said if "W&B" in line] == [f"W&B run: {server.url}/{ENTITY}/sparse/runs/{begun.id}"]
    assert_same(weights(run_dir), weights(bench.alone))


@pytest.mark.slow
def test_ctrl_c_saves_and_fails_the_wandb_run_and_resuming_ends_it_well(bench: Bench, server: WandbServer) -> None:
    import os

    folder = bench.folder / "ctrl_c"
    folder.mkdir()
    rows = write_rows(folder / "rows.parquet", 3000)
    long = {**bench.values, "train_data": {"dataset_name": str(rows), "n_ctx": N_CTX}, "save_dir": str(folder / "out")}
    long |= {"eval_every_n_samples": None, "save_every_n_samples": None, "log_every_n_grad_steps": 200}
    (folder / "config.yaml").write_text(yaml.safe_dump(long))
    environment = {**os.environ, **client_environment(folder, server.url)}
    command = [sys.executable, "-m", "e2e_sae.scripts.cli", "train"]
    with subprocess.Popen(
        [*command, str(folder / "config.yaml")], env=environment, cwd=folder, stderr=subprocess.PIPE, text=True
    ) as process:
        end = time.monotonic() + 60
        while not list(folder.glob("out/*/wandb_run.json")) and time.monotonic() < end:
            time.sleep(0.2)
        time.sleep(3)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
    run = server.run()
    assert run.exit_code == 1
    (run_dir,) = (folder / "out").iterdir()
    assert [name for name in run.files if name.endswith(".pt")]
    done = run_python([*command[1:], "--resume", str(run_dir)], folder, server.url)
    assert done.returncode == 0, done.stderr
    assert server.run() is run
    assert run.exit_code == 0
    assert [line["samples"] for line in run.history][-1] == 3000


# --- sweeps ---


def sweep_run(folder: Path, values: dict[str, Any]) -> dict[str, str]:
    """Returns what a `wandb agent` puts into the environment of a run with these values."""
    (folder / "params.yaml").write_text(
        yaml.safe_dump({"wandb_version": 1} | {k: {"value": v} for k, v in values.items()})
    )
    return {
        "WANDB_SWEEP_ID": "s1",
        "WANDB_RUN_ID": "r1",
        "WANDB_PROJECT": "swept",
        "WANDB_SWEEP_PARAM_PATH": str(folder / "params.yaml"),
    }


@pytest.mark.filterwarnings("ignore")  # W&B's own
def test_a_sweeps_values_are_merged_into_the_config_key_by_key(
    bench: Bench, server: WandbServer, tmp_path: Path
) -> None:
    chosen = {"lr": 0.02, "loss": {"sparsity": {"coeff": 7.0}}, "sae_position_names": "blocks.2.hook_resid_pre"}
    with as_client(tmp_path, server.url, **sweep_run(tmp_path, chosen)):
        run_dir = main(bench.config_file, overrides=["lr=0.5", "batch_size=4"])
    run = server.run()
    assert (run.project, run.id, run.sweep) == ("swept", "r1", "s1")
    assert run_dir is not None
    config = yaml.safe_load((run_dir / "final_config.yaml").read_text())
    assert config["lr"] == 0.02
    assert config["batch_size"] == 4
    assert config["loss"]["sparsity"]["coeff"] == 7.0
    assert config["loss"]["logits_kl"]["coeff"] == 1.0  # the base config's
    assert config["saes"] == bench.config().to_dict()["saes"] | {"sae_positions": ["blocks.2.hook_resid_pre"]}
    # The sweep's own spelling of a key stays beside it.
    assert {key: run.values[key] for key in config} == config
    assert yaml.safe_load(run.files["final_config.yaml"]) == config
    assert list(load_run(run_dir).saes) == ["blocks.2.hook_resid_pre"]


@pytest.mark.filterwarnings("ignore")  # W&B's own
def test_values_that_make_no_config_end_that_run_with_one_line(
    bench: Bench, server: WandbServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with as_client(tmp_path, server.url, **sweep_run(tmp_path, {"loss": {"sparsity": {"cof": 7.0}}})):
        assert command_line(["train", str(bench.config_file)]) == 2
    assert "error: unknown config key 'loss.sparsity.cof'" in capsys.readouterr().err
    assert server.run().exit_code == 1


def test_a_run_of_a_sweep_does_not_start_without_wandb(bench: Bench, server: WandbServer, tmp_path: Path) -> None:
    with (
        as_client(tmp_path, server.url, "f" * 40, **sweep_run(tmp_path, {"lr": 0.02})),
        pytest.raises(RunFailed, match="has no values without W&B"),
    ):
        main(bench.config_file)
