"""Texts of tokens."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from e2e_sae.analysis.vocabulary import visible, vocabulary
from e2e_sae.models.lm import load_lm
from e2e_sae.models.lm_config import LMConfig
from tests.tiny_models import BOS, CHARACTERS, D_VOCAB, make_model_folder, make_tokenizer
from tests.tiny_runs import console


def test_each_token_has_the_text_that_the_tokenizer_gives_it(lm_of: Callable[..., Any]):
    assert vocabulary(lm_of("gpt2")) == [BOS, *CHARACTERS]


def test_spaces_at_the_beginning_stay(repo: Path):
    lm: Any = load_lm(LMConfig(tlens_model_path=repo / "demos" / "stdlib_gpt2"))
    text = " def start(self):\n    return"
    texts, ids = vocabulary(lm), lm.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert "".join(texts[i] for i in ids) == text
    assert " def" in texts


def test_ids_stand_for_tokens_where_there_is_no_tokenizer(tmp_path: Path):
    lm = load_lm(LMConfig(tlens_model_path=make_model_folder(tmp_path / "lm", with_tokenizer=False)))
    with console() as said:
        assert vocabulary(lm) == [f"[{i}]" for i in range(D_VOCAB)]
    assert any("tokens are shown as numbers" in line for line in said)


def test_a_model_without_a_tokenizer_uses_the_datas(tmp_path: Path):
    lm = load_lm(LMConfig(tlens_model_path=make_model_folder(tmp_path / "lm", with_tokenizer=False)))
    make_tokenizer().save_pretrained(tmp_path / "tokenizer")
    assert vocabulary(lm, str(tmp_path / "tokenizer")) == [BOS, *CHARACTERS]


def test_everything_can_be_seen():
    assert visible(" a\tb\r\n") == "·a⇥b␍↵"
    assert visible("\x1b[0m\u200b\u202e\ufeff") == "\\x1b[0m\\u200b\\u202e\\ufeff"
    assert visible("naïve 日本 🙂", spaces=False) == "naïve 日本 🙂"
