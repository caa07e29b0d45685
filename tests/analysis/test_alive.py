"""Which latents are alive: what the run counted, what a pass over its data counts, or all of them with a warning."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from e2e_sae.analysis.alive import alive
from e2e_sae.analysis.study import Study
from e2e_sae.checkpoint import load_run
from e2e_sae.checkpoint.legacy import write_legacy_saes
from e2e_sae.checkpoint.records import HELD_OUT
from e2e_sae.checkpoint.run_dir import RunDir, read_checkpoint_info
from e2e_sae.errors import UserError
from e2e_sae.models.runner import run_clean
from tests.analysis.tiny_studies import random_decoder, study_of, train_with_eval_data, write_legacy_run
from tests.tiny_runs import console

POINT = "blocks.1.hook_resid_pre"


@pytest.fixture(scope="module")
def run(tiny_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny finished run with evaluation data."""
    return train_with_eval_data(tiny_folder("gpt2"), tmp_path_factory.mktemp("runs"))


def as_legacy(run: Path, folder: Path) -> Path:
    """Returns a copy of a run in the paper's library's layout, half of its latents dead."""
    study = study_of(run)
    stored = study.stored(study.table["id"][0])
    tensors = dict(stored.saes[POINT].tensors)
    tensors["b_enc"] = torch.where(torch.arange(len(tensors["b_enc"])) % 2 == 0, tensors["b_enc"], -1e4)
    folder.mkdir()
    write_legacy_saes(folder / "samples_8.pt", {POINT: tensors})
    (folder / "final_config.yaml").write_bytes((run / "final_config.yaml").read_bytes())
    return folder


def test_a_latent_is_alive_where_the_run_s_evaluation_saw_it_fire(run: Path, tmp_path: Path):
    copy = RunDir.open(shutil.copytree(run, tmp_path / "copy"))
    stored, info = load_run(copy.path), read_checkpoint_info(copy.checkpoints()[0])
    counts = torch.arange(32) % 3
    tensors = {name: sae.tensors for name, sae in stored.saes.items()}
    later = info.model_copy(update={"n_samples": info.n_samples + 1, "firing_data": HELD_OUT})
    copy.save(later, tensors, {POINT: counts}, {})
    study = study_of(copy.path)
    assert torch.equal(alive(study, study.table["id"][0], POINT), counts > 0)


def test_what_training_counted_stands_in_where_nothing_can_be_counted(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    copy = RunDir.open(shutil.copytree(run, tmp_path / "copy"))
    stored, info = load_run(copy.path), read_checkpoint_info(copy.checkpoints()[0])
    counts = torch.arange(32) % 3
    tensors = {name: sae.tensors for name, sae in stored.saes.items()}
    copy.save(info.model_copy(update={"n_samples": info.n_samples + 1}), tensors, {POINT: counts}, {})
    study = study_of(copy.path)
    assert info.firing_data != HELD_OUT
    assert not torch.equal(alive(study, study.table["id"][0], POINT), counts > 0)

    def unavailable(*_: object) -> None:
        raise UserError("there is no data")

    monkeypatch.setattr("e2e_sae.analysis.alive.activities", unavailable)
    with console() as said:
        assert torch.equal(alive(study, study.table["id"][0], POINT), counts > 0)
    assert "those that fired in training; counting them anew failed: there is no data" in said[0]


def test_counts_of_no_tokens_do_not_count(run: Path, tmp_path: Path):
    copy = RunDir.open(shutil.copytree(run, tmp_path / "copy"))
    stored, info = load_run(copy.path), read_checkpoint_info(copy.checkpoints()[0])
    tensors = {name: sae.tensors for name, sae in stored.saes.items()}
    later = info.model_copy(update={"n_samples": info.n_samples + 1, "firing_n_tokens": 0})
    copy.save(later, tensors, {POINT: torch.zeros(32, dtype=torch.int64)}, {})
    study = study_of(copy.path)
    assert alive(study, study.table["id"][0], POINT).any()


def test_without_counts_alive_latents_are_counted_over_the_evaluation_rows(run: Path, tmp_path: Path):
    study = study_of(as_legacy(run, tmp_path / "legacy"), n_samples=5, batch_size=2)
    run_id = study.table["id"][0]
    model = study.open(run_id)
    (sae,) = model.saes_at().values()
    expected = torch.zeros(sae.d_sae, dtype=torch.bool)
    for n, batch in enumerate(study.batches(run_id)):
        assert n < 3
        x = run_clean(model.tlens_model, batch, [POINT]).at(POINT)
        expected |= ((x @ sae.W_enc + sae.b_enc).relu() > 0).flatten(0, 1).any(0)
    found = alive(study, run_id, POINT)
    assert torch.equal(found, expected)
    assert not found[1::2].any()
    assert found[::2].any()


def test_counts_are_kept_and_not_counted_again(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = as_legacy(run, tmp_path / "legacy")
    first = study_of(folder)
    run_id = first.table["id"][0]
    found = alive(first, run_id, POINT)
    monkeypatch.setattr(Study, "open", None)
    assert torch.equal(alive(study_of(folder), run_id, POINT), found)
    with pytest.raises(TypeError):
        alive(study_of(folder, n_samples=3), run_id, POINT)


def test_where_nothing_can_be_counted_all_latents_are_alive_and_the_reason_is_said(tmp_path: Path):
    study = study_of(write_legacy_run(tmp_path / "run", "local", random_decoder(12)))
    with console() as said:
        found = alive(study, study.table["id"][0], "blocks.0.hook_resid_pre")
    assert found.tolist() == [True] * 12
    (line,) = said
    assert "which latents are alive is not known, so all 12 count as alive" in line
    assert "no_such_model" in line
