"""The table of runs from W&B: the real client's key and settings, against a stand-in server."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from e2e_sae.analysis.runs import runs_table
from e2e_sae.checkpoint.wandb_api import WandbPath
from e2e_sae.checkpoint.wandb_api import WandbServer as Client
from e2e_sae.errors import MissingFileError, UserError
from tests.tiny_runs import console
from tests.wandb_client import as_client
from tests.wandb_server import WandbServer

P = "blocks.2.hook_resid_pre"
POST = "blocks.3.hook_resid_post"
NORMS = [(20, 9.0), (10_000, 7.0), (10_016, 1.0), (20_000, 3.0)]

pytestmark = pytest.mark.filterwarnings("ignore")  # W&B's own


def papers_config(kl: float = 1.0) -> dict[str, Any]:
    """Returns the config of an early run of the paper's library: old keys, and the ratio in the name alone."""
    return {
        "seed": 1,
        "tlens_model_name": "gpt2-small",
        "tlens_model_path": None,
        "n_samples": 400_000,
        "train": {"lr": 5e-4},
        "saes": {"sae_position_names": P},
        "loss": {
            "sparsity": {"coeff": 1.5, "p_norm": 1.0},
            "inp_to_orig": None,
            "inp_to_out": {"coeff": 0.0},
            "logits_kl": {"coeff": kl},
        },
        "unheard_of": 3,
    }


SUMMARY = {
    "total_tokens": 1000,
    "_runtime": 3600.5,
    "grad_norm": 4.0,
    "performance/eval/difference_ce_loss": -0.25,
    "loss/eval/logits_kl": 0.5,
    "loss/eval/out_to_in/" + P: 2.0,
    "loss/eval/out_to_in/explained_variance/" + P: -15.0,
    "loss/eval/out_to_in/explained_variance_ln/" + P: "NaN",
    "loss/eval/in_to_orig/blocks.1.hook_resid_post": 0.0,
    "loss/eval/in_to_orig/" + POST: 3.0,
    "loss/eval/in_to_orig/explained_variance/" + POST: 0.75,
    f"sparsity/eval/L_0/{P}": 30.0,
    f"sparsity/alive_dict_elements/{P}": 500,
    f"sparsity/alive_dict_elements_final/{P}": 400,
    f"sparsity/alive_dict_elements_indices_final/{P}": [1, 2, 3],
}


def add_run(server: WandbServer, path: str, **summary: Any) -> None:
    run = server.add_run(path, {})
    run.name = "seed-1_ratio-60.0_blocks"
    run.config = {"_wandb": {"value": {"t": 1}}, **{k: {"value": v} for k, v in papers_config().items()}}
    run.summary = {**SUMMARY, **summary}
    run.history = [{"_step": step, "grad_norm": norm} for step, norm in NORMS] + [{"_step": 30_000, "loss": 1.0}]


@pytest.fixture
def server() -> Iterator[WandbServer]:
    with WandbServer() as server:
        add_run(server, "somebody/sparse/abc123")
        yield server


@pytest.fixture
def client(server: WandbServer, tmp_path: Path) -> Iterator[None]:
    with as_client(tmp_path, server.url):
        yield


NAMES = [
    "somebody/sparse/abc123",
    "somebody/sparse/runs/abc123",
    "https://wandb.ai/somebody/sparse/runs/abc123/overview?nw=x",
    "somebody/sparse",
    "https://wandb.ai/somebody/sparse",
    "https://wandb.ai/somebody/sparse/workspace?nw=1",
]
"""Of the run, and of the project that has it alone."""


@pytest.mark.usefixtures("client")
def test_a_run_of_the_papers_library_becomes_a_row(server: WandbServer) -> None:
    row = runs_table(["somebody/sparse"]).to_dict("records")[0]
    assert row["id"] == "abc123"
    assert row["source"] == "somebody/sparse/abc123"
    assert (row["model_name"], row["run_type"], row["architecture"], row["kind"]) == (
        "gpt2-small",
        "e2e",
        "relu",
        "e2e",
    )
    assert (row["sae_pos"], row["layer"], row["seed"], row["n_samples"]) == (P, 2, 1, 400_000)
    assert (row["lr"], row["ratio"], row["sparsity_coeff"], row["kl_coeff"]) == (5e-4, 60.0, 1.5, 1.0)
    assert (row["L0"], row["CE_increase"], row["kl"], row["seconds"]) == (30.0, 0.25, 0.5, 3600.5)
    assert row["alive_dict_elements"] == 500  # in the last window of training, as in the paper
    assert (row["out_to_in"], row["recon_loss_layer-2"], row["recon_loss_layer-4"]) == (2.0, 2.0, 3.0)
    assert (row["explained_var"], row["explained_var_layer-2"], row["explained_var_layer-4"]) == (-15.0, -15.0, 0.75)
    assert math.isnan(row["explained_var_ln"])
    assert math.isnan(row["quality_explained_var"])
    assert row["mean_grad_norm"] == 2.0  # of 1 and 3: what comes after 10k samples
    assert "mean_grad_norm" not in server.run().summary  # nothing is written back
    assert [runs_table([name])["source"].tolist() for name in NAMES] == [["somebody/sparse/abc123"]] * len(NAMES)


@pytest.mark.usefixtures("client")
def test_the_authors_mean_gradient_norm_is_taken_where_it_is_kept(server: WandbServer) -> None:
    server.run().summary["mean_grad_norm"] = 0.125
    assert runs_table(["somebody/sparse"])["mean_grad_norm"].tolist() == [0.125]


@pytest.mark.usefixtures("client")
def test_a_project_is_read_to_its_end_without_what_is_unfinished_or_no_sae(server: WandbServer) -> None:
    for n in range(45):  # more than two pages
        add_run(server, f"somebody/sparse/run{n}", mean_grad_norm=1.0)
    server.runs["somebody/sparse/run7"].exit_code = None
    server.runs["somebody/sparse/run8"].exit_code = 1
    del server.runs["somebody/sparse/run9"].config["saes"]
    with console() as said:
        table = runs_table(["somebody/sparse", "somebody/sparse/abc123"])
    assert table["id"].tolist() == ["abc123", *(f"run{n}" for n in range(45) if n not in (7, 8, 9))]
    assert said == ["2 unfinished runs are left out: somebody/sparse/run7 (running), somebody/sparse/run8 (failed)"]
    with pytest.raises(UserError, match=r"none of these runs is finished: somebody/sparse/run8 \(failed\)"):
        runs_table(["somebody/sparse/run8"])
    with pytest.raises(UserError, match="'somebody/sparse/run9' holds no run of SAEs"):
        runs_table(["somebody/sparse/run9"])


@pytest.mark.usefixtures("client")
def test_what_is_not_there_is_told_in_one_line() -> None:
    for source, message in {
        "somebody/sparse/nope": "W&B has no visible run 'somebody/sparse/nope'; there is no folder 'somebody/sparse",
        "somebody/nothing": "W&B has no visible project 'somebody/nothing'; there is no folder 'somebody/nothing",
        "./runs": "'./runs' is no folder, and no W&B run or project: expected a path that exists, 'entity/project'",
        "abc123": "'abc123' is no folder, and no W&B run or project",
    }.items():
        with pytest.raises(MissingFileError) as error:
            runs_table([source])
        assert str(error.value).startswith(message)
        assert "\n" not in str(error.value)


def test_a_public_project_needs_no_key(server: WandbServer, tmp_path: Path) -> None:
    with as_client(tmp_path, server.url, None):
        with pytest.raises(MissingFileError, match="has no public project 'somebody/sparse': .*WANDB_API_KEY"):
            runs_table(["somebody/sparse"])
        server.public_projects.add("somebody/sparse")
        assert runs_table(["somebody/sparse"])["mean_grad_norm"].tolist() == [2.0]


def test_a_refused_key_is_told(server: WandbServer, tmp_path: Path) -> None:
    with as_client(tmp_path, server.url, "f" * 40), pytest.raises(UserError, match="W&B refused the key"):
        runs_table(["somebody/sparse"])


@pytest.mark.usefixtures("client")
def test_a_server_that_is_away_is_told(server: WandbServer) -> None:
    server.die()
    with pytest.raises(
        MissingFileError, match=r"W&B cannot be reached \(no connection to .*; there is no folder 'some"
    ):
        runs_table(["somebody/sparse"])


@pytest.mark.usefixtures("client")
def test_a_key_that_was_not_logged_has_no_history(server: WandbServer) -> None:
    path = WandbPath("somebody", "sparse", "abc123")
    assert Client().history(path, "grad_norm", 10) == [(float(step), norm) for step, norm in NORMS]
    assert Client().history(path, "never", 10) == []
