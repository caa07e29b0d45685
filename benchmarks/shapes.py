"""What is measured: language models with random weights (speed does not depend on them), and runs on them."""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from e2e_sae.base_config import apply_overrides
from e2e_sae.config import Config
from e2e_sae.errors import MissingFileError, UserError
from e2e_sae.models.tlens import quietly

Kind = Literal["local", "e2e", "e2e+ds"]


class Shape(NamedTuple):
    """A model, the rows it reads, and an SAE at the input of one of its blocks."""

    name: str
    style: Literal["gpt2", "llama"]
    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    """Heads of keys and values; fewer than `n_heads` with grouped queries."""
    d_mlp: int
    d_vocab: int
    n_ctx: int
    """Tokens of a row."""
    batch_size: int
    """Rows of a step."""
    layer: int
    d_sae: int
    folder: Path | None = None
    """A Hugging Face folder with the model; None: one is made, with random weights."""

    @property
    def position(self) -> str:
        """Where the SAE is."""
        return f"blocks.{self.layer}.hook_resid_pre"

    @property
    def n_tokens(self) -> int:
        """Tokens in a step."""
        return self.batch_size * self.n_ctx

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values."""
        return {**self._asdict(), "folder": None if self.folder is None else str(self.folder)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Shape":
        """Builds the shape that `to_dict` wrote."""
        shape = cls(**values)
        return shape._replace(folder=shape.folder and Path(shape.folder))


def gpt2_style(name: str, n_layers: int, d_model: int, n_heads: int, **rest: Any) -> Shape:
    """Returns a shape with GPT-2's proportions."""
    return Shape(name, "gpt2", n_layers, d_model, n_heads, n_kv_heads=n_heads, d_mlp=4 * d_model, **rest)


GPT2_SMALL = gpt2_style("gpt2-small", 12, 768, 12, d_vocab=50257, n_ctx=256, batch_size=4, layer=6, d_sae=6144)
DEMO = gpt2_style("demo", 4, 128, 4, d_vocab=2048, n_ctx=128, batch_size=8, layer=2, d_sae=1024)
"""The embedded default's."""
STORIES = Shape(
    "stories260k", "llama", 5, 64, 8, n_kv_heads=4, d_mlp=172, d_vocab=512, n_ctx=256, batch_size=8, layer=2, d_sae=1024
)
"""The sizes of stories260K (https://huggingface.co/karpathy/tinyllamas)."""
SMALL = gpt2_style("small", 6, 256, 4, d_vocab=8192, n_ctx=256, batch_size=4, layer=3, d_sae=2048)
"""What the growth of cost is measured on: seconds a step on two cores."""
SHAPES = {shape.name: shape for shape in (GPT2_SMALL, DEMO, STORIES, SMALL)}


@contextmanager
def model_folder(shape: Shape) -> Iterator[Shape]:
    """Gives the shape with a folder that holds its model, a temporary one unless it has one."""
    if shape.folder is not None:
        yield shape
        return
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        with quietly(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            _random_model(shape).save_pretrained(folder)
        yield shape._replace(folder=Path(folder))


def with_model(shape: Shape, folder: Path) -> Shape:
    """Returns the shape with the model of a Hugging Face folder in its place.

    Raises:
        UserError: there is none, none of a known style, or the shape's SAE or rows do not fit.
    """
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise MissingFileError(f"'{folder}' is no Hugging Face model folder, it has no config.json")
    config = json.loads(config_file.read_text(encoding="utf-8"))
    style = config.get("model_type")
    if style == "gpt2":
        d, heads, max_ctx = config["n_embd"], config["n_head"], config["n_positions"]
        sizes = {"n_layers": config["n_layer"], "n_kv_heads": heads, "d_mlp": config.get("n_inner") or 4 * d}
    elif style == "llama":
        d, heads = config["hidden_size"], config["num_attention_heads"]
        max_ctx = config["max_position_embeddings"]
        sizes = {
            "n_layers": config["num_hidden_layers"],
            "n_kv_heads": config.get("num_key_value_heads") or heads,
            "d_mlp": config["intermediate_size"],
        }
    else:
        raise UserError(f"the operations of a '{style}' model are not known here: expected gpt2 or llama")
    if shape.layer >= sizes["n_layers"]:
        raise UserError(f"'{folder}' has {sizes['n_layers']} blocks: no SAE fits before block {shape.layer}")
    if shape.n_ctx > max_ctx:
        raise UserError(f"'{folder}' reads rows of {max_ctx} tokens at most, not {shape.n_ctx}: give --context")
    sizes |= {"d_model": d, "n_heads": heads, "d_vocab": config["vocab_size"]}
    return shape._replace(name=folder.name, style=style, folder=folder, **sizes)


def random_rows(shape: Shape, n_rows: int, seed: int = 0) -> torch.Tensor:
    """Returns token rows [n_rows, n_ctx]."""
    return torch.randint(0, shape.d_vocab, (n_rows, shape.n_ctx), generator=torch.Generator().manual_seed(seed))


def downstream(shape: Shape) -> list[str]:
    """Returns what e2e+ds compares: the inputs of the later blocks; of an SAE before the last block, its output."""
    later = [f"blocks.{i}.hook_resid_pre" for i in range(shape.layer + 1, shape.n_layers)]
    return later or [f"blocks.{shape.layer}.hook_resid_post"]


def run_config(
    shape: Shape, kind: Kind, rows: Path, device: str, n_members: int = 1, overrides: tuple[str, ...] = ()
) -> Config:
    """Returns the config of a run of the paper's kind, which logs and saves nothing.

    Args:
        shape: with the folder of its model.
        kind: which losses; coefficients do not change the cost.
        rows: token rows, as a parquet file.
        device: where.
        n_members: SAEs over one clean pass.
        overrides: further settings, as `--set` takes them.
    """
    loss: dict[str, Any] = {"sparsity": {"coeff": 1.0}, "out_to_in": {"coeff": 1.0 if kind == "local" else 0.0}}
    if kind != "local":
        loss["logits_kl"] = {"coeff": 1.0 if kind == "e2e" else 0.5}
    if kind == "e2e+ds":
        loss["in_to_orig"] = {"total_coeff": 2.5, "hook_positions": downstream(shape)}
    values: dict[str, Any] = {
        "tlens_model_path": str(shape.folder),
        "device": device,
        "saes": {"sae_positions": shape.position, "dict_size_to_input_ratio": shape.d_sae / shape.d_model},
        "train_data": {"dataset_name": str(rows), "n_ctx": shape.n_ctx},
        "batch_size": shape.batch_size,
        "loss": loss,
        "lr": 1e-4,
        "max_grad_norm": 10,
        "save_dir": None,
        "log_every_n_grad_steps": 1_000_000,
        "collect_act_frequency_every_n_samples": 0,
    }
    if n_members > 1:
        values["members"] = [{"seed": i} for i in range(n_members)]
    return Config.from_dict(apply_overrides(values, overrides))


def _random_model(shape: Shape) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    if shape.style == "gpt2":
        config = GPT2Config(
            vocab_size=shape.d_vocab,
            n_positions=max(1024, shape.n_ctx),
            n_embd=shape.d_model,
            n_layer=shape.n_layers,
            n_head=shape.n_heads,
            n_inner=shape.d_mlp,
            bos_token_id=0,
            eos_token_id=0,
        )
        return GPT2LMHeadModel(config)
    config = LlamaConfig(
        vocab_size=shape.d_vocab,
        max_position_embeddings=max(512, shape.n_ctx),
        hidden_size=shape.d_model,
        num_hidden_layers=shape.n_layers,
        num_attention_heads=shape.n_heads,
        num_key_value_heads=shape.n_kv_heads,
        intermediate_size=shape.d_mlp,
    )
    return LlamaForCausalLM(config)
