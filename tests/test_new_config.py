"""`e2e-sae new-config`: what it writes is valid, fits the model, and is explained."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from e2e_sae.config import Config
from e2e_sae.errors import MissingFileError, UserError
from e2e_sae.new_config import ModelShape, local_shape, write_new_config
from e2e_sae.scripts.cli import main
from tests.tiny_runs import N_CTX, lines_of, write_rows


def _folder(path: Path, config: dict[str, Any]) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    return path


def _config(source: str | Path, *, papers: bool = False) -> Config:
    return Config.from_dict(yaml.safe_load(write_new_config(str(source), papers=papers)))


@pytest.mark.parametrize(
    ("name", "position", "last_downstream", "n_ctx"),
    [
        ("gpt2", "blocks.6.hook_resid_pre", "blocks.11.hook_resid_pre", 1024),
        ("openai-community/gpt2-medium", "blocks.12.hook_resid_pre", "blocks.23.hook_resid_pre", 1024),
        ("pythia-14m", "blocks.3.hook_resid_pre", "blocks.5.hook_resid_pre", 2048),
        ("EleutherAI/pythia-70m-deduped", "blocks.3.hook_resid_pre", "blocks.5.hook_resid_pre", 2048),
        ("roneneldan/TinyStories-1M", "blocks.4.hook_resid_pre", "blocks.7.hook_resid_pre", 512),
    ],
)
def test_a_named_model_gets_its_middle_layer_and_the_papers_data(
    name: str, position: str, last_downstream: str, n_ctx: int
) -> None:
    config = _config(name, papers=True)
    assert config.tlens_model_name == name
    assert config.saes.sae_positions == [position]
    assert config.loss.in_to_orig is not None
    assert config.loss.in_to_orig.hook_positions[-1] == last_downstream
    assert config.train_data.n_ctx == n_ctx
    assert config.train_data.is_tokenized


def test_gpt2_gets_the_settings_of_the_paper() -> None:
    config = _config("gpt2-small", papers=True)
    assert config.saes.sae.architecture == "relu"
    assert config.phases is None
    assert config.loss.in_to_orig is not None
    assert config.loss.logits_kl is not None
    assert config.loss.in_to_orig.hook_positions == [f"blocks.{i}.hook_resid_pre" for i in range(7, 12)]
    assert (config.loss.sparsity.coeff, config.loss.logits_kl.coeff) == (1.5, 0.5)
    assert (config.lr, config.n_samples, config.warmup_samples) == (5e-4, 400_000, 20_000)
    assert (config.batch_size, config.effective_batch_size, config.max_grad_norm) == (8, 16, 10)


@pytest.mark.parametrize("name", ["gpt2", "pythia-14m", "roneneldan/TinyStories-1M"])
def test_evaluation_is_on_held_out_data(name: str) -> None:
    config = _config(name)
    held_out = config.train_data.holdout_fraction is not None
    assert held_out or (config.eval_data is not None and config.eval_data.split != config.train_data.split)


@pytest.mark.parametrize(
    ("description", "shape"),
    [
        ({"model_type": "gpt2", "n_layer": 4, "n_positions": 128}, ModelShape(4, 128)),
        ({"model_type": "gpt2", "n_layer": 4, "n_ctx": 128}, ModelShape(4, 128)),
        ({"model_type": "llama", "num_hidden_layers": 5, "max_position_embeddings": 512}, ModelShape(5, 512)),
        ({"text_config": {"num_hidden_layers": 3, "max_position_embeddings": 64}}, ModelShape(3, 64)),
        ({"num_hidden_layers": 2}, ModelShape(2, 1024)),
    ],
)
def test_the_shape_of_a_folder_is_read_under_every_familys_names(
    tmp_path: Path, description: dict[str, Any], shape: ModelShape
) -> None:
    assert local_shape(_folder(tmp_path / "lm", description)) == shape


def test_a_local_folder_trains_on_the_embedded_text_at_its_own_context(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "my lm: 2", {"n_layer": 4, "n_positions": 128})
    config = _config(folder)
    assert config.tlens_model_path == folder
    assert config.saes.sae_positions == ["blocks.2.hook_resid_pre"]
    assert config.eval_data is not None
    for data, split in ((config.train_data, "train"), (config.eval_data, "eval")):
        assert (data.dataset_name, data.is_tokenized, data.split, data.n_ctx) == ("stdlib", False, split, 128)
    assert config.n_samples is None


def test_a_very_long_context_is_cut_to_what_fits_a_step(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "lm", {"num_hidden_layers": 2, "max_position_embeddings": 131072})
    assert _config(folder).train_data.n_ctx == 1024


@pytest.mark.parametrize("n_layers", [1, 2])
def test_a_shallow_model_still_has_something_downstream(tmp_path: Path, n_layers: int) -> None:
    config = _config(_folder(tmp_path / "lm", {"n_layer": n_layers, "n_positions": 32}), papers=True)
    assert config.loss.in_to_orig is not None
    assert len(config.loss.in_to_orig.hook_positions) == 1
    assert config.loss.in_to_orig.hook_positions != config.saes.sae_positions


def test_a_legacy_pt_is_described_by_the_yaml_beside_it(tmp_path: Path) -> None:
    (tmp_path / "epoch_3.pt").touch()
    (tmp_path / "final_config.yaml").write_text("tlens_config: {n_layers: 2, n_ctx: 64}\n")
    config = _config(tmp_path / "epoch_3.pt")
    assert config.train_data.n_ctx == 64
    assert config.tlens_model_path == tmp_path / "epoch_3.pt"


def test_the_default_is_the_recommended_recipe() -> None:
    config = _config("gpt2-small")
    assert config.saes.sae.to_dict().items() >= {"architecture": "batch_topk", "k": 32}.items()
    assert config.loss.to_dict().items() >= {"logits_kl": None, "in_to_orig": None, "kl_balance": None}.items()
    assert config.final_loss.logits_kl is not None
    assert config.final_loss.out_to_in is not None
    assert (config.final_loss.kl_balance, config.phases and config.phases[0].until) == ("mse", 0.75)
    papers = _config("gpt2-small", papers=True)
    of_saes = {"saes", "loss", "phases"}
    assert {key for key, value in config.to_dict().items() if papers.to_dict()[key] != value} <= of_saes


def test_the_default_config_trains(tmp_path: Path, tiny_folder: Callable[[str], Path]) -> None:
    out, rows = tmp_path / "run.yaml", write_rows(tmp_path / "rows.parquet", 24)
    assert main(["new-config", str(tiny_folder("gpt2")), "-o", str(out)]) == 0
    changes = [
        "saes.sae.k=4", "n_samples=16", "warmup_samples=2", "batch_size=4", "effective_batch_size=4",
        f"train_data.dataset_name={rows}", "train_data.is_tokenized=true", f"train_data.n_ctx={N_CTX}",
        "eval_data=null", "train_data.holdout_fraction=0.2", f"save_dir={tmp_path}",
    ]  # fmt: skip
    assert main(["train", str(out), *(part for change in changes for part in ("--set", change))]) == 0
    (log,) = tmp_path.rglob("metrics.jsonl")
    assert [line["phase"] for line in lines_of(log.parent)][-1] == 2


@pytest.mark.parametrize("papers", [False, True])
def test_every_setting_is_explained(papers: bool) -> None:
    text = write_new_config("gpt2", papers=papers)
    sections = [line for line in text.splitlines() if line.startswith("# ---")]
    assert len(sections) == 6
    assert len(re.findall("#", text)) >= 20
    assert max(map(len, text.splitlines())) <= 120


def test_the_command_prints_or_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["new-config", "gpt2"]) == 0
    printed = capsys.readouterr().out
    out = tmp_path / "run.yaml"
    assert main(["new-config", "gpt2", "-o", str(out)]) == 0
    assert out.read_text() == printed == write_new_config("gpt2")
    assert main(["new-config", "gpt2", "--paper", "-o", str(tmp_path / "paper.yaml")]) == 0
    assert (tmp_path / "paper.yaml").read_text() == write_new_config("gpt2", papers=True) != printed
    capsys.readouterr()
    assert main(["new-config", "gpt2", "-o", str(out.with_name("again.yaml"))]) == 0
    again = out.with_name("again.yaml")
    assert capsys.readouterr().out == f"wrote {again}; next: e2e-sae train {again}\n"


def test_an_existing_file_is_never_overwritten(tmp_path: Path) -> None:
    out = tmp_path / "run.yaml"
    out.write_text("mine")
    with pytest.raises(UserError, match="exists and is not overwritten"):
        write_new_config("gpt2", out)
    assert out.read_text() == "mine"


def test_a_file_in_a_folder_that_is_not_there_says_so(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="does not exist"):
        write_new_config("gpt2", tmp_path / "no" / "run.yaml")


def test_an_unknown_name_shows_the_nearest_known_ones(in_tmp_dir: Path) -> None:
    with pytest.raises(UserError, match=r"no model 'gpt2-smal': .* Did you mean 'gpt2-small'"):
        write_new_config("gpt2-smal")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "has no config.json: expected a Hugging Face model folder"),
        ("{", "is not valid JSON"),
        ("[]", "does not say how many layers"),
        ('{"n_layer": "four"}', "does not say how many layers"),
    ],
)
def test_a_folder_that_is_no_model_says_what_is_missing(tmp_path: Path, text: str | None, words: str) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=words):
        write_new_config(str(tmp_path))


def test_a_file_that_is_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(UserError, match=r"expected a Hugging Face folder or a legacy \.pt file"):
        write_new_config(str(tmp_path / "model.safetensors"))
