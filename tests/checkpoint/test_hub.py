"""SAEs from the Hugging Face hub: the real client, against a stand-in server and against its own cache."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from e2e_sae import SAETransformer
from e2e_sae.checkpoint.hub import download_sae
from e2e_sae.errors import UserError
from e2e_sae.models.lm import load_lm
from e2e_sae.models.lm_config import LMConfig
from tests.checkpoint.hub_server import COMMIT, hub
from tests.checkpoint.test_paper_hub import A, published
from tests.checkpoint.test_saelens import FLAT, write

REPO = "some-owner/some-saes"

# A process of its own: the client takes its address and its mode from the environment when it is imported.
CLIENT = """
import json, sys
from e2e_sae.checkpoint import load_run
from e2e_sae.checkpoint.hub import download_sae
from e2e_sae.errors import UserError
answers = []
for arguments in json.loads(sys.argv[1]):
    try:
        path = download_sae(*arguments)
        saes = {n: s.tensors["W_enc"].double().sum().item() for n, s in load_run(path).saes.items()}
        answers.append({"path": str(path), "saes": saes})
    except UserError as error:
        answers.append({"error": str(error)})
print(json.dumps(answers))
"""


def ask(requests: list[list[Any]], cache: Path, **environment: str) -> list[dict[str, Any]]:
    """Returns what `download_sae` gave for each list of arguments, in a fresh process."""
    env = {**os.environ, "HF_HOME": str(cache), "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    result = subprocess.run(
        [sys.executable, "-c", CLIENT, json.dumps(requests)],
        env={**env, **environment}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """Two files as in the paper's repository and a SAELens folder."""
    folder = tmp_path / "repository"
    folder.mkdir()
    published(folder)
    published(folder, "local_similar_l0_layer_2")
    write(folder / "6-res_sce-ajt", FLAT)
    return folder


def test_a_download_is_found_again_offline_and_every_mistake_is_one_clear_line(
    tmp_path: Path, repository: Path
) -> None:
    cache = tmp_path / "cache"
    good = [[REPO, "e2e_similar_ce_layer_1"], [REPO, "e2e_similar_ce_layer_1.pt", COMMIT], [REPO, "6-res_sce-ajt"]]
    bad = [[REPO, "e2e_similar_ce_layer_3"], ["some-owner/nothing", "x"], [REPO, "e2e_similar_ce_layer_1", "v9"]]
    with hub(REPO, repository) as address:
        answers = ask(good + bad, cache, HF_ENDPOINT=address, HF_HUB_OFFLINE="0")
    _, state = published(tmp_path)
    for answer in answers[:2]:
        assert Path(answer["path"]).is_relative_to(cache)
        assert answer["saes"] == {A: pytest.approx(state["encoder.weight"].double().sum().item(), rel=1e-12)}
    assert list(answers[2]["saes"]) == [A]
    assert not (Path(answers[0]["path"]).parent / "local_similar_l0_layer_2.pt").exists(), "only what was asked for"
    missing, no_repository, no_revision = [answer["error"] for answer in answers[3:]]
    assert missing == (
        f"'{REPO}' on the hub has no 'e2e_similar_ce_layer_3': it has 6-res_sce-ajt, e2e_similar_ce_layer_1, "
        "local_similar_l0_layer_2. Did you mean 'e2e_similar_ce_layer_1' or 'local_similar_l0_layer_2'?"
    )
    assert "no such repository on the hub: 'some-owner/nothing'" in no_repository
    assert f"no such revision on the hub: '{REPO}' at revision 'v9'" in no_revision
    # The server is gone.
    cached, *rest = ask([good[0], [REPO, "local_similar_l0_layer_2"]], cache, HF_ENDPOINT=address, HF_HUB_OFFLINE="0")
    assert cached == answers[0]
    assert rest[0]["error"].startswith(f"'local_similar_l0_layer_2' of '{REPO}' ")
    assert "\n" not in rest[0]["error"]


def fill_cache(cache: Path, repository: Path) -> None:
    """Lays a repository into the client's cache as the client does (`refs`, `snapshots`)."""
    folder = cache / f"models--{REPO.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(COMMIT)
    (folder / "snapshots").mkdir()
    repository.rename(folder / "snapshots" / COMMIT)


def test_from_hub_gives_a_model_that_runs(
    tmp_path: Path, repository: Path, tiny_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, state = published(tmp_path)
    fill_cache(tmp_path / "cache", repository)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    lm = load_lm(LMConfig(tlens_model_path=tiny_folder("gpt2")))
    for name in ("e2e_similar_ce_layer_1", "6-res_sce-ajt"):
        model = SAETransformer.from_hub(REPO, name, model=lm)
        assert model.raw_sae_positions == [A]
        assert model(torch.arange(8)[None])[0] is not None
    (sae,) = SAETransformer.from_hub(REPO, "e2e_similar_ce_layer_1", model=lm).saes_at().values()
    assert torch.equal(sae.encoder[0].weight, state["encoder.weight"])
    with pytest.raises(UserError, match=f"'layer_9' of '{REPO}' is not in the cache, and HF_HUB_OFFLINE is set"):
        SAETransformer.from_hub(REPO, "layer_9", model=lm)


@pytest.mark.parametrize("name", ["", "/", "../../secret", "a/../../b", "*", "layer_[12]"])
def test_a_name_that_leads_elsewhere_or_matches_many_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="is no name of an SAE: expected a file's stem or a folder of"):
        download_sae(REPO, name)


def test_what_is_no_repository_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="'x' of 'no repository!' cannot be downloaded: Repo id must"):
        download_sae("no repository!", "x")
    with pytest.raises(UserError, match=f"'x' of '{REPO}' is not in the cache, and HF_HUB_OFFLINE is set"):
        download_sae(REPO, "x")
