"""What is measured: language models with random weights (speed does not depend on them), and runs on them."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from e2e_sae.config import Config

Kind = Literal["local", "e2e", "e2e+ds"]


class Shape(NamedTuple):
    """A GPT-2-style model, the rows it reads, and an SAE at the input of one of its blocks."""

    name: str
    n_layers: int
    d_model: int
    n_heads: int
    d_vocab: int
    n_ctx: int
    batch_size: int
    layer: int
    d_sae: int

    @property
    def position(self) -> str:
        """Where the SAE is."""
        return f"blocks.{self.layer}.hook_resid_pre"

    @property
    def n_tokens(self) -> int:
        """Tokens in a step."""
        return self.batch_size * self.n_ctx


GPT2_SMALL = Shape("gpt2-small", 12, 768, 12, 50257, 256, 4, layer=6, d_sae=6144)
DEMO = Shape("demo", 4, 128, 4, 2048, 128, 8, layer=2, d_sae=1024)
"""The embedded default's."""
SHAPES = {shape.name: shape for shape in (GPT2_SMALL, DEMO)}


@contextmanager
def model_folder(shape: Shape) -> Iterator[Path]:
    """Gives a temporary Hugging Face folder with such a model."""
    from transformers import GPT2Config, GPT2LMHeadModel

    with tempfile.TemporaryDirectory(prefix="bench-") as folder, torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = GPT2Config(
            vocab_size=shape.d_vocab,
            n_positions=max(1024, shape.n_ctx),
            n_embd=shape.d_model,
            n_layer=shape.n_layers,
            n_head=shape.n_heads,
        )
        GPT2LMHeadModel(config).save_pretrained(folder)
        yield Path(folder)


def random_rows(shape: Shape, n_rows: int, seed: int = 0) -> torch.Tensor:
    """Returns token rows [n_rows, n_ctx]."""
    return torch.randint(0, shape.d_vocab, (n_rows, shape.n_ctx), generator=torch.Generator().manual_seed(seed))


def run_config(shape: Shape, kind: Kind, model: Path, rows: Path, device: str, **changes: Any) -> Config:
    """Returns the config of a run of the paper's kind, which logs and saves nothing."""
    loss: dict[str, Any] = {"sparsity": {"coeff": 1.0}}
    if kind == "local":
        loss["out_to_in"] = {"coeff": 1.0}
    else:
        loss["logits_kl"] = {"coeff": 1.0 if kind == "e2e" else 0.5}
    if kind == "e2e+ds":
        later = [f"blocks.{i}.hook_resid_pre" for i in range(shape.layer + 1, shape.n_layers)]
        loss["in_to_orig"] = {"total_coeff": 2.5, "hook_positions": later}
    values: dict[str, Any] = {
        "tlens_model_path": str(model),
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
    return Config.from_dict({**values, **changes})
