"""Tokenizer and model, made from a config and saved: an ordinary Hugging Face folder with a model card."""

import json
import math
import platform
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from e2e_sae.checkpoint.files import new_file, write_pickled
from e2e_sae.data.dataset_config import STDLIB_DATASET
from e2e_sae.errors import UserError
from e2e_sae.lm_training.config import LMConfig, TokenizerConfig
from e2e_sae.lm_training.hooked_format import hooked_state_dict
from e2e_sae.lm_training.loop import LogitsFn, TrainResult
from e2e_sae.models.tlens import quietly

SAMPLE_PROMPT = "class "
"""What the card's sample begins with."""


def train_tokenizer(texts: Iterable[str], config: TokenizerConfig) -> Any:
    """Returns a byte-level BPE tokenizer with one special token: BOS, EOS and padding, with id 0."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        special_tokens=[config.special_token],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    special = config.special_token
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=special, eos_token=special, pad_token=special, unk_token=special
    )


def make_hf_model(settings: dict[str, Any], tokenizer: Any) -> Any:
    """Returns an untrained causal language model.

    Raises:
        UserError: transformers does not know the `model_type`, or refuses the settings.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = {key: value for key, value in settings.items() if key != "model_type"}
    ids = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos")}
    try:
        config = AutoConfig.for_model(settings["model_type"], vocab_size=len(tokenizer), **ids, **fields)
        return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"hf_config cannot be built: {' '.join(str(error).split())[:300]}") from None


def save_hooked_model(path: Path, model: nn.Module) -> None:
    """Writes a custom TransformerLens model as a `HookedTransformer` state dict."""
    with new_file(path) as temporary:
        write_pickled(temporary, hooked_state_dict(model))


def save_hf_model(folder: Path, model: Any, tokenizer: Any, config: LMConfig, *, card: str) -> None:
    """Writes the model, its tokenizer, `train.yaml` and the card into `folder`, whole or not at all."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    dtype = config.train.save_dtype
    torch_dtype = getattr(torch, dtype)
    # Tied weights are one tensor under two names, and must stay one to be stored once.
    original = model.state_dict()
    converted = {tensor.data_ptr(): tensor.detach().to(torch_dtype) for tensor in original.values()}
    state = {name: converted[tensor.data_ptr()] for name, tensor in original.items()}
    with quietly():
        model.save_pretrained(partial, state_dict=state)
    _update_json(partial / "config.json", {"dtype": dtype})
    tokenizer.save_pretrained(partial)
    # Under this class name the folder loads in transformers 4 and 5 alike.
    _update_json(partial / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})
    (partial / "train.yaml").write_text(portable_yaml(config), encoding="utf-8")
    (partial / "README.md").write_text(card, encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def _update_json(path: Path, fields: dict[str, Any]) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields, indent=2, sort_keys=True) + "\n")


def portable_yaml(config: LMConfig) -> str:
    """Returns the settings that were given, as YAML, without this run's output folder."""
    values = config.model_dump(mode="json", exclude_unset=True)
    values["train"].pop("save_dir", None)
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


@torch.no_grad()
def sample_text(logits_of: LogitsFn, tokenizer: Any, prompt: str, *, n_ctx: int, seed: int) -> str:
    """Returns `prompt` and a continuation that fills the context, drawn at temperature 0.8."""
    generator = torch.Generator().manual_seed(seed)
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    tokens = torch.tensor([begin + ids])
    while tokens.shape[1] < n_ctx:
        probs = (logits_of(tokens)[0, -1].float() / 0.8).softmax(-1)
        tokens = torch.cat([tokens, torch.multinomial(probs, 1, generator=generator)[None]], dim=1)
    return tokenizer.decode(tokens[0, len(begin) :].tolist())


def model_card(config: LMConfig, result: TrainResult, *, n_params: int, n_train_rows: int | None, sample: str) -> str:
    """Returns the text of the model's `README.md`."""
    data = config.train_data.dataset_name if config.train_data else STDLIB_DATASET
    corpus = (
        "the source of the\nPython standard library (the `stdlib` corpus: without tests, split by a hash of the "
        "module's name)"
        if data == STDLIB_DATASET
        else f"`{Path(data).name if Path(data).is_absolute() else data}`"
    )
    measured = (
        "not measured"
        if result.eval_ce is None
        else f"{result.eval_ce:.3f} nats/token (perplexity {math.exp(result.eval_ce):.1f})"
    )
    rows = "" if n_train_rows is None else f" ({n_train_rows:,} rows an epoch)"
    return f"""---
library_name: transformers
pipeline_tag: text-generation
---

# {config.name}

A {n_params / 1e6:.2f}M-parameter language model, trained from scratch on {corpus}
by `e2e_sae/scripts/train_tlens/run_train_tlens.py train.yaml`. It is meant for trying sparse autoencoders on,
and for nothing else.

- Held-out cross-entropy: {measured}
- Trained on {result.n_tokens:,} tokens{rows} in {result.n_seconds / 60:.0f} minutes
- Python {platform.python_version()}, torch {torch.__version__}

A sample, after `{SAMPLE_PROMPT.strip()}` at temperature 0.8:

```text
{sample}
```
"""
