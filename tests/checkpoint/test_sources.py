"""Runs from W&B: what is fetched, what is kept, and what is refused. `wandb.Api` against a stand-in server."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from e2e_sae.checkpoint import load_run
from e2e_sae.checkpoint.legacy import write_legacy_saes
from e2e_sae.checkpoint.sources import fetch_wandb_run
from e2e_sae.errors import MissingFileError, RunFailed, UserError
from tests.tiny_runs import console
from tests.wandb_client import as_client
from tests.wandb_server import KEY, WandbServer

P = "blocks.1.hook_resid_pre"
RUN = "somebody/sparse/abc123"
CONFIG = b"tlens_model_name: gpt2\nsaes: {sae_positions: [blocks.1.hook_resid_pre], dict_size_to_input_ratio: 2}\n"

pytestmark = pytest.mark.filterwarnings("ignore")  # W&B's own


def legacy_file(folder: Path, value: float) -> bytes:
    """Returns a `samples_<n>.pt` of the paper's library whose every parameter is `value`."""
    shapes = {"W_enc": (4, 8), "b_enc": (8,), "W_dec": (8, 4), "b_dec": (4,)}
    path = folder / "made.pt"
    write_legacy_saes(path, {P: {name: torch.full(shape, value) for name, shape in shapes.items()}})
    content = path.read_bytes()
    path.unlink()
    return content


@pytest.fixture
def server(tmp_path: Path) -> Iterator[WandbServer]:
    """Has one run of the paper's library with two checkpoints, the newer of which sorts first as text."""
    with WandbServer() as server:
        server.add_run(
            RUN,
            {
                "output.log": b"",
                "final_config.yaml": CONFIG,
                "samples_900.pt": legacy_file(tmp_path, 9.0),
                "samples_1000.pt": legacy_file(tmp_path, 10.0),
                "media/table/x.json": b"{}",
            },
        )
        yield server


@pytest.fixture
def client(server: WandbServer, tmp_path: Path) -> Iterator[Path]:
    """Makes this process its client; the folder of the cache."""
    with as_client(tmp_path, server.url):
        yield tmp_path / "sae_cache" / "wandb"


def files_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_the_newest_checkpoint_and_its_config_are_fetched_and_nothing_else(client: Path, server: WandbServer) -> None:
    run = load_run(fetch_wandb_run(RUN))
    assert run.saes[P].tensors["W_enc"].unique().tolist() == [10.0]
    assert run.config["tlens_model_name"] == "gpt2"
    assert run.n_samples == 1000
    assert files_in(client) == {f"{RUN}/final_config.yaml", f"{RUN}/samples_1000.pt"}


@pytest.mark.parametrize(
    "name",
    [
        "sparse/abc123",  # the key's owner
        "somebody/sparse/runs/abc123",
        "https://wandb.ai/somebody/sparse/runs/abc123",
        "https://wandb.ai/somebody/sparse/runs/abc123/overview?nw=x#y",
    ],
)
def test_a_run_has_several_names(client: Path, server: WandbServer, name: str) -> None:
    assert fetch_wandb_run(name) == client / RUN / "samples_1000.pt"


def test_what_is_cached_is_fetched_again_only_if_it_has_changed(
    client: Path, server: WandbServer, tmp_path: Path
) -> None:
    fetch_wandb_run(RUN)
    server.downloads.clear()
    fetch_wandb_run(RUN)
    assert server.downloads == []
    server.runs[RUN].files["samples_1000.pt"] = legacy_file(tmp_path, 11.0)  # of the same size
    run = load_run(fetch_wandb_run(RUN))
    assert server.downloads == ["samples_1000.pt"]
    assert run.saes[P].tensors["b_dec"].unique().tolist() == [11.0]


def test_without_the_server_the_cache_serves_and_says_so(client: Path, server: WandbServer) -> None:
    fetched = fetch_wandb_run(RUN)
    server.die()
    with console() as said:
        assert fetch_wandb_run(RUN) == fetched
    assert said == [f"W&B cannot be reached (no connection to {server.url}): using '{fetched}', fetched earlier"]
    assert fetch_wandb_run("sparse/abc123") == fetched
    with pytest.raises(
        MissingFileError, match=r"W&B cannot be reached \(no connection to .*'a/b/c' is not in the cache"
    ):
        fetch_wandb_run("a/b/c")


def test_a_public_run_needs_no_key(server: WandbServer, tmp_path: Path) -> None:
    with as_client(tmp_path, server.url, None):
        with pytest.raises(MissingFileError, match="W&B has no public run 'somebody/sparse/abc123': .*WANDB_API_KEY"):
            fetch_wandb_run(RUN)
        server.public_projects.add("somebody/sparse")
        # More than one page of files.
        server.runs[RUN].files = {f"media/{i}.json": b"" for i in range(250)} | server.runs[RUN].files
        assert load_run(fetch_wandb_run(RUN)).n_samples == 1000
        with pytest.raises(UserError, match="whose run\\? expected 'entity/project/run_id'"):
            fetch_wandb_run("sparse/abc123")


@pytest.mark.parametrize("name", ["", "abc123", "../sparse/abc123", "a/b/../c", "a/b/c/d/e", "a\\b/c", "a/b/c\n"])
def test_a_name_of_something_else_is_refused_before_anybody_is_asked(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="is no W&B run: expected 'entity/project/run_id', 'project/run_id', or"):
        fetch_wandb_run(name + "/.." if name.endswith("\n") else name)


def test_a_run_that_is_not_there_or_has_nothing_to_load_is_told(client: Path, server: WandbServer) -> None:
    with pytest.raises(MissingFileError, match="W&B has no run 'somebody/sparse/nope', or your key may not see it"):
        fetch_wandb_run("somebody/sparse/nope")
    del server.runs[RUN].files["samples_900.pt"], server.runs[RUN].files["samples_1000.pt"]
    with pytest.raises(MissingFileError, match=r"'somebody/sparse/abc123' has no checkpoint \(samples_<n>.pt\)"):
        fetch_wandb_run(RUN)
    del server.runs[RUN].files["final_config.yaml"]
    with pytest.raises(MissingFileError, match="has no final_config.yaml"):
        fetch_wandb_run(RUN)
    assert not client.exists()


def test_a_refused_key_is_told(server: WandbServer, tmp_path: Path) -> None:
    with (
        as_client(tmp_path, server.url, "f" * 40),
        pytest.raises(UserError, match="W&B refused the key: .*not logged in"),
    ):
        fetch_wandb_run(RUN)


EVIL = [
    "../../../../evil/final_config.yaml",
    "/evil/samples_2000.pt",
    "..\\samples_2000.pt",
    "samples_2000/../../../../../evil.safetensors",
    "samples_2000/checkpoint.json\n",
    "../samples_2000.pt",
    "samples_2000.pt/../x",
    "samples_\u0662\u0663.pt",
]


def test_no_name_leads_out_of_the_cache(client: Path, server: WandbServer, tmp_path: Path) -> None:
    before = files_in(tmp_path)
    server.runs[RUN].files = dict.fromkeys(EVIL, b"evil") | server.runs[RUN].files
    assert fetch_wandb_run(RUN) == client / RUN / "samples_1000.pt"
    assert set(server.downloads) == {"final_config.yaml", "samples_1000.pt"}
    written = {name for name in files_in(tmp_path) - before if name.startswith("sae_cache") or "evil" in name}
    assert written == {f"sae_cache/wandb/{RUN}/{name}" for name in server.downloads}


def test_a_download_that_is_not_what_was_announced_leaves_nothing(
    client: Path, server: WandbServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    announced = server._file

    def lies(run: object, name: str) -> dict[str, object]:
        return announced(run, name) | ({"md5": "AAAAAAAAAAAAAAAAAAAAAA=="} if name == "samples_1000.pt" else {})  # pyright: ignore

    monkeypatch.setattr(server, "_file", lies)
    with pytest.raises(RunFailed, match="the download of samples_1000.pt from W&B is not what was announced"):
        fetch_wandb_run(RUN)
    assert files_in(client) == {f"{RUN}/final_config.yaml"}


def test_an_old_run_with_a_config_of_another_name_is_found(client: Path, server: WandbServer) -> None:
    server.runs[RUN].files["tmp_x1/final_config.yaml"] = server.runs[RUN].files.pop("final_config.yaml")
    assert load_run(fetch_wandb_run(RUN)).config["tlens_model_name"] == "gpt2"
    assert KEY  # the run is private


def test_a_local_language_model_that_is_not_here_is_asked_for(client: Path, server: WandbServer) -> None:
    from e2e_sae.models.sae_transformer import SAETransformer

    server.runs[RUN].files["final_config.yaml"] = CONFIG.replace(
        b"tlens_model_name: gpt2", b"tlens_model_path: /no/such.pt"
    )
    with pytest.raises(UserError, match="/no/such.pt.*pass model="):
        SAETransformer.from_wandb(RUN)
