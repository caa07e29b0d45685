import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from e2e_sae.data.batches import load_token_batches
from e2e_sae.data.dataset_config import DatasetConfig
from e2e_sae.data.stdlib_corpus import stdlib_documents
from e2e_sae.errors import UserError
from e2e_sae.lm_training.config import LMConfig
from e2e_sae.lm_training.hooked_format import hooked_state_dict
from e2e_sae.lm_training.loop import held_out_ce
from e2e_sae.lm_training.run import data_configs, run_lm_training
from e2e_sae.models.lm_custom import build_custom_lm, load_legacy_lm, load_state_dict_
from e2e_sae.models.tlens import quietly, resolve_model_class
from e2e_sae.scripts.train_tlens.run_train_tlens import main
from e2e_sae.scripts.yaml_command import yaml_command
from tests.data.word_tokenizer import D_VOCAB, save_word_tokenizer

HF_CONFIG = {"model_type": "gpt2", "n_layer": 1, "n_embd": 16, "n_head": 2, "n_positions": 16}
TLENS_CONFIG = {"d_model": 16, "n_layers": 2, "n_ctx": 16, "d_head": 8, "d_vocab": D_VOCAB, "act_fn": "gelu"}


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Forty short documents of a few words."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    rng = random.Random(0)
    for i in range(40):
        words = (f"w{rng.randrange(2, 30)}" for _ in range(60))
        (folder / f"{i:02}.txt").write_text(" ".join(words))
    return folder


def settings(tmp_path: Path, corpus: Path, **fields: Any) -> dict[str, Any]:
    train = {"n_epochs": 1, "batch_size": 16, "lr": 1e-2, "save_dir": str(tmp_path / "out")}
    train |= fields.pop("train", {})
    data = {"dataset_name": str(corpus), "is_tokenized": False, "n_ctx": 16, "holdout_fraction": 0.2}
    values: dict[str, Any] = {
        "name": "tiny",
        "hf_config": HF_CONFIG,
        "tokenizer": {"vocab_size": 300},
        "train_data": data,
    }
    values |= {"train": train} | fields
    return {key: value for key, value in values.items() if value is not None}


def tlens_settings(tmp_path: Path, corpus: Path, **fields: Any) -> dict[str, Any]:
    tlens_config = TLENS_CONFIG | {"tokenizer_name": str(save_word_tokenizer(tmp_path / "tokenizer"))}
    return settings(
        tmp_path, corpus, hf_config=None, tokenizer=None, tlens_config=tlens_config, wandb_project=None, **fields
    )


def last_line(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])


def test_a_run_ends_as_a_hugging_face_folder_whose_loss_is_the_one_reported(tmp_path: Path, corpus: Path):
    config = LMConfig.from_dict(settings(tmp_path, corpus))
    run_dir = run_lm_training(config)
    folder = run_dir / "epoch_1"
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer("w12  w3\n\tü")["input_ids"]) == "w12  w3\n\tü"
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == model.config.bos_token_id == 0
    assert config.train_data is not None
    batches = load_token_batches(config.train_data, global_seed=0, part="eval", tokenizer=tokenizer)
    ce = held_out_ce(lambda tokens: model(input_ids=tokens).logits, batches, 16)
    assert last_line(run_dir)["eval_ce"] == pytest.approx(ce, abs=1e-5)
    assert ce < math.log(300) + 0.2
    card = (folder / "README.md").read_text()
    assert f"{ce:.3f} nats/token" in card
    assert str(tmp_path) not in card
    assert LMConfig.from_file(run_dir / "final_config.yaml") == config


def test_the_saved_yaml_makes_the_same_model_again(tmp_path: Path, corpus: Path):
    first = run_lm_training(LMConfig.from_dict(settings(tmp_path, corpus, train={"optimizer": "muon"})))
    again = LMConfig.from_file(first / "epoch_1" / "train.yaml", [f"train.save_dir={tmp_path / 'out'}"])
    second = run_lm_training(again)
    assert first != second, "run folders never collide"
    weights, repeated = (load_file(run / "epoch_1" / "model.safetensors") for run in (first, second))
    assert weights.keys() == repeated.keys()
    assert all(torch.equal(weights[name], repeated[name]) for name in weights)


def test_weights_are_saved_in_the_type_asked_for(tmp_path: Path, corpus: Path):
    run_dir = run_lm_training(LMConfig.from_dict(settings(tmp_path, corpus, train={"save_dtype": "float16"})))
    weights = load_file(run_dir / "epoch_1" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    assert "lm_head.weight" not in weights, "tied to the embedding: stored once"
    assert json.loads((run_dir / "epoch_1" / "config.json").read_text())["dtype"] == "float16"
    assert yaml.safe_load((run_dir / "epoch_1" / "train.yaml").read_text())["train"]["save_dtype"] == "float16"


def test_an_existing_tokenizer_can_be_used(tmp_path: Path, corpus: Path):
    name = str(save_word_tokenizer(tmp_path / "tokenizer"))
    run_dir = run_lm_training(LMConfig.from_dict(settings(tmp_path, corpus, tokenizer=None, tokenizer_name=name)))
    assert AutoModelForCausalLM.from_pretrained(run_dir / "epoch_1").config.vocab_size == D_VOCAB


def test_a_custom_transformer_lens_model_is_saved_as_a_file_that_loads(tmp_path: Path, corpus: Path):
    config = LMConfig.from_dict(tlens_settings(tmp_path, corpus, train={"n_epochs": 2, "save_every_n_epochs": 1}))
    run_dir = main(config)
    assert sorted(p.name for p in run_dir.glob("*.pt")) == ["epoch_1.pt", "epoch_2.pt"]
    with quietly():
        model = load_legacy_lm(run_dir / "epoch_2.pt", resolve_model_class("auto"))
    assert config.train_data is not None
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    batches = load_token_batches(config.train_data, global_seed=0, part="eval", tokenizer=tokenizer)
    assert held_out_ce(model, batches, 16) == pytest.approx(last_line(run_dir)["eval_ce"], abs=1e-5)
    assert last_line(run_dir)["eval_ce"] < math.log(D_VOCAB)


def test_hooked_names_and_shapes_survive_the_way_there_and_back():
    torch.manual_seed(0)
    model_class = resolve_model_class("auto")
    with quietly():
        model, copy = (build_custom_lm(TLENS_CONFIG, model_class) for _ in range(2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    state = hooked_state_dict(model)
    assert tuple(state["blocks.0.attn.W_Q"].shape) == (2, 16, 8)
    assert tuple(state["blocks.1.attn.W_O"].shape) == (2, 8, 16)
    assert tuple(state["blocks.1.attn.b_V"].shape) == (2, 8)
    assert tuple(state["blocks.0.mlp.W_in"].shape) == (16, 64)
    assert tuple(state["unembed.W_U"].shape) == (16, D_VOCAB)
    load_state_dict_(copy, state, source=Path("state.pt"))
    tokens = torch.tensor([[5, 3, 8, 1]])
    assert torch.equal(copy(tokens), model(tokens))


def test_the_embedded_corpus_is_the_default_for_both_parts(tmp_path: Path, corpus: Path):
    config = LMConfig.from_dict(settings(tmp_path, corpus, train_data=None))
    train, held_out = data_configs(config)
    assert held_out is not None
    assert (train.dataset_name, train.split, train.n_ctx) == ("stdlib", "train", 16)
    assert (held_out.dataset_name, held_out.split) == ("stdlib", "eval")


def test_without_held_out_data_nothing_is_evaluated(tmp_path: Path, corpus: Path):
    data = {"dataset_name": str(corpus), "is_tokenized": False, "n_ctx": 16}
    run_dir = run_lm_training(LMConfig.from_dict(settings(tmp_path, corpus, train_data=data)))
    assert last_line(run_dir)["eval_ce"] is None
    assert "Held-out cross-entropy: not measured" in (run_dir / "epoch_1" / "README.md").read_text()


def test_the_command_trains_with_overrides_and_returns_exit_codes(
    tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings(tmp_path, corpus)))
    assert yaml_command(main, "", argv=[str(path), "--set", "name=renamed"]) == 0
    assert [p.name.split("_")[0] for p in (tmp_path / "out").iterdir()] == ["renamed"]
    assert yaml_command(main, "", argv=[str(path), "--set", "train.batch_sise=3"]) == 2
    assert "Did you mean 'batch_size'" in capsys.readouterr().err
    assert yaml_command(main, "", argv=[str(path), "--set", "train.lr=1e30", "--set", "train.n_epochs=5"]) == 1
    assert "the loss is" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hf_config": None}, "give exactly one of hf_config and tlens_config (given: neither)"),
        ({"tlens_config": TLENS_CONFIG}, "give exactly one of hf_config and tlens_config (given: both)"),
        ({"tokenizer": None}, "give exactly one of tokenizer and tokenizer_name"),
        ({"hf_config": {"n_layer": 1}}, "hf_config needs model_type"),
        ({"hf_config": {"model_type": "gpt7"}}, "hf_config cannot be built"),
        ({"hf_config": HF_CONFIG | {"n_head": 3}}, "hf_config cannot be built"),
        ({"hf_config": {"model_type": "gpt2"}, "train_data": None}, "the model's config needs n_positions"),
        ({"tokenizer": {"vocab_size": 256}}, "tokenizer.vocab_size"),
        ({"train": {"effective_batch_size": 24}}, "effective_batch_size=24 must be a multiple of batch_size=16"),
        ({"hf_config": HF_CONFIG | {"n_positions": 8}}, "n_ctx=16 is longer than the model's context of 8"),
    ],
)
def test_a_mistaken_config_is_one_clear_line(changes: dict[str, Any], words: str, tmp_path: Path, corpus: Path):
    with pytest.raises(UserError) as error:
        run_lm_training(LMConfig.from_dict(settings(tmp_path, corpus, **changes)))
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_a_tokenizer_cannot_be_trained_on_tokens(tmp_path: Path, corpus: Path):
    (tmp_path / "x.u16").write_bytes(bytes(64))
    data = {"dataset_name": str(tmp_path / "x.u16"), "n_ctx": 16}
    with pytest.raises(UserError, match="cannot be trained on tokenised data: set tokenizer_name"):
        run_lm_training(LMConfig.from_dict(settings(tmp_path, corpus, train_data=data)))


def test_a_custom_model_takes_its_own_tokenizer_only(tmp_path: Path, corpus: Path):
    values = tlens_settings(tmp_path, corpus) | {"tokenizer": {"vocab_size": 300}}
    with pytest.raises(UserError, match="the tokenizer is tlens_config.tokenizer_name"):
        LMConfig.from_dict(values)


@pytest.mark.slow
def test_the_shipped_model_is_as_good_as_its_card_says(repo: Path):
    """At most 3.0 nats per token on the running Python's held-out modules."""
    folder = repo / "demos" / "stdlib_gpt2"
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = DatasetConfig(dataset_name="stdlib", split="eval", is_tokenized=False, n_ctx=128)
    batches = load_token_batches(config, global_seed=0, tokenizer=AutoTokenizer.from_pretrained(folder))
    assert len(stdlib_documents("eval")) > 10
    assert held_out_ce(lambda tokens: model(input_ids=tokens).logits, batches, 32) < 3.0
