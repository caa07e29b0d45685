"""`e2e-sae new-config`: a commented minimal config for a named model or a local folder, ready to train.

Needs no network: named models are known by a table, local ones by their `config.json`. Data and optimisation
of the named models are those of the paper (arXiv 2405.12241, section 3 and appendix A) and of its library's
sample configs. SAE and loss are the recipe that did best in docs/results.md, or on request the paper's e2e+ds, whose
coefficients are a start, not a result, for other models.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from e2e_sae.base_config import read_yaml
from e2e_sae.config import Config
from e2e_sae.data.dataset_config import STDLIB_DATASET
from e2e_sae.errors import MissingFileError, UserError, did_you_mean

_GPT2 = "apollo-research/Skylion007-openwebtext-tokenizer-gpt2"
_PILE = "apollo-research/monology-pile-uncopyrighted-tokenizer-EleutherAI-gpt-neox-20b"
_TINYSTORIES = "apollo-research/roneneldan-TinyStories-tokenizer-gpt2"

# Longer rows cost memory for little: the paper's SAEs saw at most 1,024 tokens of context at a time.
_MAX_N_CTX = 1024
# Measured: the standard library of Python 3.11 without tests, under a 2,048-token BPE.
_STDLIB_TOKENS = 3_900_000
_K = 32
"""Active latents per token: the middle of the three that docs/results.md compares recipes at."""


class ModelShape(NamedTuple):
    """What a config needs to know about a model."""

    n_layers: int
    """Blocks."""
    n_ctx: int
    """Longest context in tokens."""


class _Defaults(NamedTuple):
    """Data and optimisation of one model family."""

    dataset: str
    n_ctx: int
    n_samples: int | None
    warmup_samples: int
    batch_size: int
    effective_batch_size: int
    lr: str
    max_grad_norm: float
    ratio: float
    kl_coeff: float
    sparsity_coeff: float
    eval_split: str | None
    """Split of the data to evaluate on; None: a share of the training split is held out."""


_FAMILIES: list[tuple[str, dict[str, int], int, _Defaults]] = [
    (
        "openai-community/",
        {"gpt2": 12, "gpt2-small": 12, "gpt2-medium": 24, "gpt2-large": 36, "gpt2-xl": 48},
        1024,
        _Defaults(_GPT2, 1024, 400_000, 20_000, 8, 16, "5e-4", 10, 60, 0.5, 1.5, None),
    ),
    (
        "EleutherAI/",
        {
            f"pythia-{size}": n_layers
            for size, n_layers in {
                "14m": 6, "31m": 6, "70m": 6, "160m": 12, "410m": 24, "1b": 16,
                "1.4b": 24, "2.8b": 32, "6.9b": 32, "12b": 36,
            }.items()
        },
        2048,
        _Defaults(_PILE, 2048, 200_000, 20_000, 8, 8, "5e-4", 10, 60, 0.5, 1.0, None),
    ),
    (
        "roneneldan/",
        {f"TinyStories-{size}": 4 if size == "33M" else 8 for size in ("1M", "3M", "8M", "28M", "33M")},
        2048,
        _Defaults(_TINYSTORIES, 512, 400_000, 20_000, 20, 20, "1e-3", 1, 50, 0.5, 3.0, "validation"),
    ),
]  # fmt: skip
"""(hub owner, blocks by model name, context of the models, defaults) of each family that is known by name."""


def write_new_config(source: str, out_file: Path | None = None, *, papers: bool = False) -> str:
    """Returns a commented config for a model as YAML, valid as it stands, and writes it if asked to.

    Args:
        source: a Hugging Face folder, a legacy `.pt`, or a hub name (GPT-2, Pythia, TinyStories).
        out_file: written if given; an existing file is never overwritten.
        papers: SAE and loss of the paper (ReLU, e2e+ds) instead of the recommended ones.

    Raises:
        UserError: the model is unknown, its folder cannot be understood, or `out_file` exists.
    """
    if out_file is not None and out_file.exists():
        raise UserError(f"'{out_file}' exists and is not overwritten: choose another name")
    if out_file is not None and not out_file.resolve().parent.is_dir():
        raise MissingFileError(f"cannot write '{out_file}': the folder '{out_file.parent}' does not exist")
    path = Path(source).expanduser()
    text = _local_config(path.resolve(), papers) if path.exists() else _hub_config(source, papers)
    Config.from_dict(yaml.safe_load(text))
    if out_file is not None:
        out_file.write_text(text, encoding="utf-8")
    return text


def local_shape(path: Path) -> ModelShape:
    """Returns the shape of a Hugging Face folder, or of a legacy `.pt` with `final_config.yaml` beside it.

    Raises:
        UserError: there is no such description, or it does not say how many layers the model has.
    """
    if path.is_file():
        if path.suffix != ".pt":
            raise UserError(f"'{path}' is no model: expected a Hugging Face folder or a legacy .pt file")
        description = path.parent / "final_config.yaml"
        values: Any = read_yaml(description).get("tlens_config")
    else:
        description = path / "config.json"
        if not description.is_file():
            raise MissingFileError(f"'{path}' has no config.json: expected a Hugging Face model folder")
        try:
            values = json.loads(description.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise UserError(f"'{description}' is not valid JSON: {error}") from None
    if isinstance(values, Mapping) and isinstance(values.get("text_config"), Mapping):
        values = values["text_config"]
    # The names that GPT-2, GPT-NeoX, Llama and TransformerLens give to the same two numbers.
    n_layers = _first_int(values, ("num_hidden_layers", "n_layer", "n_layers", "num_layers"))
    n_ctx = _first_int(values, ("n_positions", "max_position_embeddings", "n_ctx", "seq_length"))
    if n_layers is None:
        raise UserError(f"'{description}' does not say how many layers the model has (num_hidden_layers)")
    return ModelShape(n_layers, n_ctx or _MAX_N_CTX)


def _first_int(values: Any, names: tuple[str, ...]) -> int | None:
    if not isinstance(values, Mapping):
        return None
    found = [values[name] for name in names if isinstance(values.get(name), int) and values[name] > 0]
    return found[0] if found else None


def _hub_config(name: str, papers: bool) -> str:
    known: list[str] = []
    for owner, models, max_n_ctx, defaults in _FAMILIES:
        short = re.sub(r"-(deduped|v0|seed\d+)", "", name.removeprefix(owner))
        if short in models:
            # Only GPT-2's names are known to TransformerLens without their owner in every version.
            lines = f"tlens_model_name: {name}  # loaded from the Hugging Face hub"
            return _render(name, lines, ModelShape(models[short], max_n_ctx), defaults, papers)
        known += models
    raise UserError(
        f"no model '{name}': neither a local folder nor a known name.{did_you_mean(name, known)} "
        f"Known: {', '.join(known)}; for any other, download it and give its folder"
    )


def _local_config(path: Path, papers: bool) -> str:
    shape = local_shape(path)
    n_ctx = min(shape.n_ctx, _MAX_N_CTX)
    # Around 4,000 tokens a step; a twentieth of the samples as warm-up, as in the paper.
    batch_size = max(1, 4096 // n_ctx)
    warmup_samples = max(1, _STDLIB_TOKENS // n_ctx // 20)
    defaults = _Defaults(
        STDLIB_DATASET, n_ctx, None, warmup_samples, batch_size, batch_size, "1e-3", 10, 16, 0.5, 1.5, "eval"
    )
    lines = f"tlens_model_path: {json.dumps(str(path))}  # a Hugging Face folder or a legacy .pt"
    return _render(path.name, lines, shape, defaults, papers)


def _render(name: str, model_line: str, shape: ModelShape, d: _Defaults, papers: bool) -> str:
    layer = shape.n_layers // 2
    position, knob = f"blocks.{layer}.hook_resid_pre", "loss.sparsity.coeff=3" if papers else "saes.sae.k=16"
    every = max(1, (d.n_samples or _STDLIB_TOKENS // d.n_ctx) // 10)
    n_samples = (
        f"n_samples: {d.n_samples:_}"
        if d.n_samples is not None
        else "n_samples: null  # all there are; e.g. 1_000 for a first look"
    )
    return f"""\
# End-to-end SAE on {name} ({shape.n_layers} layers). Train it: e2e-sae train THIS_FILE
# Change a setting without editing: e2e-sae train THIS_FILE --set {knob}

seed: 0
wandb_project: null  # a name here logs to Weights & Biases too; everything is in the run folder either way
save_dir: out  # the run folder is made in here

# --- the frozen model ---
{model_line}
device: auto  # CUDA if there is one

# --- the SAE ---
saes:
  # Where it reads and writes: the residual stream before block {layer} of {shape.n_layers}.
  sae_positions: {position}
  # Latents per dimension of the activation: more can explain more, and cost more.
  dict_size_to_input_ratio: {d.ratio}
{_papers_loss(layer, shape, d) if papers else _recommended_loss()}
{_data(d)}
# --- optimisation ---
{n_samples}
batch_size: {d.batch_size}  # sequences per forward pass: less if memory runs out
effective_batch_size: {d.effective_batch_size}  # sequences per optimizer step, a multiple of batch_size
lr: {d.lr}
lr_schedule: cosine
min_lr_factor: 0.1
warmup_samples: {d.warmup_samples:_}
max_grad_norm: {d.max_grad_norm}

# --- what is logged and saved, counted in sequences ---
log_every_n_grad_steps: 20
eval_every_n_samples: {every:_}
eval_n_samples: 500
collect_act_frequency_every_n_samples: {every:_}
act_frequency_n_tokens: 500_000  # a latent that does not fire in this many tokens counts as dead
save_every_n_samples: {every:_}  # an interrupted run goes on from here: e2e-sae train --resume RUN_DIR
"""


def _recommended_loss() -> str:
    return f"""\
  # The one number to tune: k latents are active per token, on average. More: a smaller ce_increase.
  sae: {{architecture: batch_topk, k: {_K}}}

# --- the loss: the activation itself, then what the model makes of it ---
# The best recipe of docs/results.md at equal L0 and equal tokens. The paper's: e2e-sae new-config MODEL --paper
loss:
  # Squared error of the activation.
  out_to_in: {{coeff: 1}}
  # A penalty on the size of latents: not needed where k makes them sparse.
  sparsity: {{coeff: 0}}
phases:
  - until: 0.75  # the first three quarters of the samples; cheap, as nothing after the SAE is run
  - loss:
      # KL(clean || spliced): what the model says should stay the same; in each batch weighed like the squared error.
      logits_kl: {{coeff: 1}}
      kl_balance: mse
"""


def _papers_loss(layer: int, shape: ModelShape, d: _Defaults) -> str:
    downstream = [f"blocks.{i}.hook_resid_pre" for i in range(layer + 1, shape.n_layers)]
    downstream = downstream or [f"blocks.{shape.n_layers - 1}.hook_resid_post"]
    listed = "\n".join(f"      - {hook_name}" for hook_name in downstream)
    return f"""\
  sae: {{architecture: relu}}

# --- the loss: e2e+ds, the paper's best trade of faithfulness and tokens ---
# To make it e2e:   logits_kl: {{coeff: 1}}, in_to_orig: null
# To make it local: logits_kl: null, in_to_orig: null, out_to_in: {{coeff: 1}}
loss:
  # The one number to tune: higher gives fewer active latents per token (L0), lower a smaller ce_increase.
  sparsity:
    p_norm: 1
    coeff: {d.sparsity_coeff}
  # KL(clean || spliced): what the model says should stay the same.
  logits_kl:
    coeff: {d.kl_coeff}
  # Squared error of the activations after the SAE: how the model gets there should stay the same.
  in_to_orig:
    total_coeff: 2.5
    hook_positions:
{listed}
  out_to_orig: null
  out_to_in: null
"""


def _data(d: _Defaults) -> str:
    if d.dataset == STDLIB_DATASET:
        what = f"dataset_name: {STDLIB_DATASET}\n  is_tokenized: false\n  n_ctx: {d.n_ctx}\n"
        return (
            "# --- data: the source code of Python's standard library, on every machine, to start with ---\n"
            "# Better is text like what the model was trained on. dataset_name: a file, a folder (parquet,\n"
            "# jsonl, txt) or a hub dataset; column_name: the text; tokenizer_name: if the model has none.\n"
            f"train_data:\n  {what}  split: train\neval_data:\n  {what}  split: {d.eval_split}\n"
        )
    what = f"dataset_name: {d.dataset}\n  is_tokenized: true\n  n_ctx: {d.n_ctx}\n  streaming: true\n"
    head = "# --- data: tokenised rows from the Hugging Face hub, read while training ---\n"
    if d.eval_split is None:
        held_out = "  holdout_fraction: 0.01  # this share of the rows is kept for evaluation\n"
        return f"{head}train_data:\n  {what}  split: train\n{held_out}"
    return f"{head}train_data:\n  {what}  split: train\neval_data:\n  {what}  split: {d.eval_split}\n"
