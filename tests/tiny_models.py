"""Tiny random language models as Hugging Face folders: GPT-2, Llama, and GPT-NeoX, a few kilobytes each.

Weights are drawn wide (standard deviation 0.2, biases and norms included), so that a folded, dropped or
transposed tensor shows in the output.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

D_VOCAB = 50
N_CTX = 16
D_MODEL = 16
FAMILIES = ("gpt2", "llama", "neox", "neox_sequential")
CHARACTERS = "\n abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"[: D_VOCAB - 1]
BOS = "<|endoftext|>"


def make_model_folder(
    folder: Path, family: str = "gpt2", n_layers: int = 3, with_tokenizer: bool = True, seed: int = 0
) -> Path:
    """Writes a random model of that family into `folder` and returns it."""
    model = make_hf_model(family, n_layers, seed)
    model.save_pretrained(folder)
    if with_tokenizer:
        make_tokenizer().save_pretrained(folder)
    return folder


def make_hf_model(family: str, n_layers: int = 3, seed: int = 0) -> PreTrainedModel:
    """Returns a random model of that family, in eval mode, without touching the global random state."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(_hf_config(family, n_layers))
        for name, parameter in model.named_parameters():
            norm = "norm" in name or ".ln_" in name
            torch.nn.init.normal_(parameter, mean=1.0 if norm and name.endswith("weight") else 0.0, std=0.2)
    return model.eval()


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Returns a character tokenizer: id 0 is BOS, EOS and unknown, then one id per character."""
    ids = {token: index for index, token in enumerate([BOS, *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=BOS))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=BOS, unk_token=BOS)


def make_word_tokenizer(words: Sequence[str]) -> PreTrainedTokenizerFast:
    """Returns a tokenizer of whole words between spaces: id 0 is BOS, EOS and unknown, then one id per word.

    Raises:
        ValueError: there are more words than a tiny model has ids.
    """
    if len(words) >= D_VOCAB:
        raise ValueError(f"{len(words)} words, a tiny model has ids for {D_VOCAB - 1}")
    ids = {token: index for index, token in enumerate([BOS, *words])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=BOS))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=BOS, unk_token=BOS)


def random_tokens(batch: int, n_ctx: int = N_CTX, seed: int = 0) -> torch.Tensor:
    """Returns random token ids [batch, n_ctx]."""
    return torch.randint(0, D_VOCAB, (batch, n_ctx), generator=torch.Generator().manual_seed(seed))


def _hf_config(family: str, n_layers: int) -> PretrainedConfig:
    if family == "gpt2":
        return GPT2Config(
            vocab_size=D_VOCAB,
            n_positions=N_CTX,
            n_embd=D_MODEL,
            n_layer=n_layers,
            n_head=2,
            bos_token_id=0,
            eos_token_id=0,
        )
    shape: dict[str, Any] = {
        "vocab_size": D_VOCAB,
        "max_position_embeddings": N_CTX,
        "hidden_size": D_MODEL,
        "intermediate_size": 32,
        "num_hidden_layers": n_layers,
        "num_attention_heads": 2,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    if family == "llama":
        return LlamaConfig(**shape, num_key_value_heads=1)
    if family in ("neox", "neox_sequential"):
        return GPTNeoXConfig(**shape, use_parallel_residual=family == "neox")
    raise AssertionError(f"no tiny model of family {family!r}")


class Bomb:
    """Unpickling it writes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)
