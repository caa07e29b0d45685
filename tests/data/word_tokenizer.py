"""A tokenizer whose ids can be read off: the words `w2`, `w3`, ... have the ids 2, 3, ...; EOS is 1, BOS is 0."""

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

BOS, EOS = 0, 1
D_VOCAB = 1000


def word_tokenizer(bos: bool = True, eos: bool = True) -> Any:
    words = Tokenizer(
        models.WordLevel({"<bos>": BOS, "<eos>": EOS} | {f"w{i}": i for i in range(2, D_VOCAB)}, unk_token="<eos>")
    )
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<bos>" if bos else None, eos_token="<eos>" if eos else None
    )


def text_of(*ids: int) -> str:
    return " ".join(f"w{i}" for i in ids)


def save_word_tokenizer(folder: Path) -> Path:
    word_tokenizer().save_pretrained(folder)
    return folder
