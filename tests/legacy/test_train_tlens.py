"""`run_train_tlens.py` with the paper's library's config: its files, their names, its log keys, its data."""

import json
import re
from pathlib import Path

import pytest
import torch

from e2e_sae.errors import UserError
from e2e_sae.lm_training.run import data_configs
from e2e_sae.scripts.train_tlens.run_train_tlens import Config, main
from e2e_sae.settings import REPO_ROOT
from tests.data.word_tokenizer import D_VOCAB, save_word_tokenizer
from tests.wandb_client import as_client
from tests.wandb_server import WandbServer

TINY_GPT2 = REPO_ROOT / "e2e_sae" / "scripts" / "train_tlens" / "tiny_gpt2.yaml"


@pytest.fixture
def small(tmp_path: Path) -> list[str]:
    """Overrides: another tokenizer, and less of everything."""
    tokenizer = save_word_tokenizer(tmp_path / "tokenizer")
    shape = [f"tlens_config.tokenizer_name={tokenizer}", f"tlens_config.d_vocab={D_VOCAB}", "tlens_config.n_ctx=16"]
    return [*shape, f"train.save_dir={tmp_path / 'out'}", "train.batch_size=2", "train.effective_batch_size=4"]


def test_the_tiny_gpt2_has_the_recorded_shape():
    config = Config.from_file(TINY_GPT2)
    assert config.tlens_config == {
        "d_model": 4, "n_layers": 2, "n_ctx": 1024, "d_head": 4, "d_vocab": 50257, "act_fn": "gelu",
        "dtype": "float32", "tokenizer_name": "gpt2",
    }  # fmt: skip
    train = config.train
    assert (train.n_epochs, train.batch_size, train.lr, train.save_every_n_epochs) == (3, 16, 1e-3, 1)
    assert (config.name, config.seed, config.wandb_project) == ("tiny-gpt2", 0, "e2e_sae-custom")


def test_it_trains_on_the_pile_unless_told_otherwise_and_says_so_offline(small: list[str]):
    train, held_out = data_configs(Config.from_file(TINY_GPT2))
    assert (train.dataset_name, train.split, train.n_ctx) == ("NeelNanda/pile-10k", "train", 1024)
    assert held_out is None
    with pytest.raises(UserError, match="data set 'NeelNanda/pile-10k'") as caught:
        main(Config.from_file(TINY_GPT2, small))
    assert "\n" not in str(caught.value)


def text_data(folder: Path) -> str:
    """Returns the override that makes it train on a small text."""
    text = folder / "text.txt"
    text.write_text(" ".join(f"w{i % 28 + 2}" for i in range(16 * 8)))
    return f"train_data={{dataset_name: {text}, is_tokenized: false, n_ctx: 16}}"


@pytest.mark.filterwarnings("ignore")  # W&B's own
def test_its_files_and_log_keys_are_those_of_the_papers_library(small: list[str], tmp_path: Path):
    with WandbServer() as server:
        with as_client(tmp_path, server.url):
            run_dir = main(TINY_GPT2, overrides=[*small, text_data(tmp_path), "train.log_every_n_steps=1"])
        sent = server.run()
    stamp = r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d"
    assert run_dir.parent == tmp_path / "out"
    assert re.fullmatch(rf"tiny-gpt2_lr-0\.001_bs-2_{stamp}", run_dir.name)
    weights = {f"epoch_{n}.pt" for n in (1, 2, 3)}
    assert {path.name for path in run_dir.iterdir()} == weights | {"final_config.yaml", "metrics.jsonl"}
    state = torch.load(run_dir / "epoch_3.pt", weights_only=True)
    assert state["blocks.1.attn.W_Q"].shape == (1, 4, 4)
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert {"train_loss", "epoch", "grad_updates", "lr", "samples"} <= lines[0].keys()
    assert [line["_step"] for line in sent.history] == [line["samples"] for line in lines if "train_loss" in line]
    assert [line["train_loss"] for line in sent.history] == [
        line["train_loss"] for line in lines if "train_loss" in line
    ]
    assert [line["samples"] for line in lines if "samples" in line][:2] == [4, 8]
