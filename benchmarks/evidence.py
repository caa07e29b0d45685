"""`python -m benchmarks.evidence`: sweeps of every architecture in every recipe, at equal L0 and equal tokens.

    python -m benchmarks.evidence demo EVIDENCE         # writes base configs, and sweeps over them
    e2e-sae sweep EVIDENCE/*_sweep_*.yaml --shared 8 --out EVIDENCE/runs
    python -m benchmarks.evidence_report EVIDENCE/runs --out EVIDENCE

The sweeps can be killed and started again. A grid is architectures x recipes x L0s: where k makes latents sparse, k is
the L0; where a penalty does, `loss.sparsity.target_l0` is. All else is equal: rows and their order, dictionary size,
learning rate. `--recipes`, `--architectures`, `--l0s`, `--seeds` and `--tokens` make other grids of it.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

import e2e_sae
from e2e_sae.checkpoint.files import write_text
from e2e_sae.demo import demo_dir
from e2e_sae.errors import UserError
from e2e_sae.log import log_to_console
from e2e_sae.scripts.exit_codes import run_command

PROGRAM = Path(e2e_sae.__file__).resolve().parent / "scripts" / "train_tlens_saes" / "run_train_tlens_saes.py"
"""What a run of a sweep is made by."""
BY_K = ("topk", "batch_topk", "matryoshka", "hierarchical_topk", "codebook")
"""Architectures that k makes sparse."""
BY_PENALTY: dict[str, dict[str, Any]] = {
    "relu": {},
    "jumprelu": {"penalty": "tanh", "tanh_scale": 1.0},
    "gated": {},
}
"""Architectures that a penalty makes sparse, and their options."""


class Grid(NamedTuple):
    """What is swept over."""

    recipes: Sequence[str] = ()
    """Names in `recipes`; none: all."""
    architectures: Sequence[str] = ()
    """None: all."""
    l0s: Sequence[int] = (16, 32, 64)
    """Active latents per token."""
    seeds: Sequence[int] = (0,)
    """Of SAEs and order of rows."""
    tokens: Sequence[int] = (409_600,)
    """That an SAE is trained on, in batches of 1,024."""


class Model(NamedTuple):
    """A language model, and what its SAEs are trained on."""

    settings: dict[str, Any]
    """Of every run."""
    later: list[str]
    """Hook points of the downstream MSE."""
    threshold: float
    """JumpReLU's first one, by trial; its bandwidth is twice that."""


def demo() -> Model:
    """Returns the embedded model."""
    data = {"dataset_name": "stdlib", "is_tokenized": False, "n_ctx": 128}
    settings = {
        "lr": 1e-2,
        "tlens_model_path": str(demo_dir() / "stdlib_gpt2"),
        "saes": {"sae_positions": "blocks.2.hook_resid_pre", "d_sae": 1024},
        "train_data": {**data, "split": "train"},
        "eval_data": {**data, "split": "eval"},
    }
    return Model(settings, ["blocks.2.hook_resid_post", "blocks.3.hook_resid_post"], threshold=1.0)


def stories(model: Path, text: Path) -> Model:
    """Returns stories260K, a Llama of 5 blocks, on TinyStories."""
    settings = {
        "lr": 3e-2,
        "tlens_model_path": str(model.resolve()),
        "saes": {"sae_positions": "blocks.2.hook_resid_pre", "d_sae": 1024},
        "train_data": {
            "dataset_name": str(text.resolve()), "is_tokenized": False, "n_ctx": 256, "holdout_fraction": 0.05
        },
    }  # fmt: skip
    return Model(settings, [f"blocks.{i}.hook_resid_post" for i in (2, 3, 4)], threshold=0.3)


COMMON: dict[str, Any] = {"eval_every_n_samples": 0, "max_grad_norm": 10.0, "log_every_n_grad_steps": 50}
"""Settings of every run. Each model's learning rate is the best of 3e-3, 1e-2 and 3e-2 for ReLU SAEs, local and e2e."""
START = {"local": 0.3, "e2e": 0.05, "e2e+ds": 0.2, "KL + MSE": 0.3, "local then KL": 0.3}
"""Where the sparsity coefficient of each recipe starts: rather too low, from where the controller finds its way."""


def recipes(later: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Returns the loss, and the phases if there are any, of each recipe; without the sparsity."""
    local = {"out_to_in": {"coeff": 1.0}}
    return {
        "local": {"loss": local},
        "e2e": {"loss": {"logits_kl": {"coeff": 1.0}}},
        "e2e+ds": {
            "loss": {
                "logits_kl": {"coeff": 0.5},
                "in_to_orig": {"total_coeff": 2.5, "hook_positions": list(later)},
            }
        },
        "KL + MSE": {"loss": {**local, "logits_kl": {"coeff": 1.0}, "kl_balance": "mse"}},
        "local then KL": {
            "loss": local,
            "phases": [{"until": 0.75}, {"loss": {"logits_kl": {"coeff": 1.0}, "kl_balance": "mse"}}],
        },
    }


def write_sweeps(model: Model, folder: Path, grid: Grid) -> list[Path]:
    """Writes base configs and sweep files, and returns the latter.

    Args:
        model: what the SAEs are trained on.
        folder: made if it is not there.
        grid: what is swept over.

    Raises:
        UserError: a recipe or an architecture is unknown.
    """
    known = recipes(model.later)
    for what, given, there in (
        ("recipe", grid.recipes, list(known)),
        ("architecture", grid.architectures, [*BY_K, *BY_PENALTY]),
    ):
        for name in given:
            if name not in there:
                raise UserError(f"'{name}' is no {what} of the grid: expected {', '.join(there)}")
    folder.mkdir(parents=True, exist_ok=True)
    sweeps: list[Path] = []
    for recipe in grid.recipes or known:
        for n_tokens in grid.tokens:
            stem = "_".join([recipe.replace(" ", "_"), *([str(n_tokens)] if len(grid.tokens) > 1 else [])])
            loss = {"sparsity": {"coeff": 0.0}, **known[recipe]["loss"]}
            base = {**COMMON, **_length(model, n_tokens), **model.settings, **known[recipe], "loss": loss}
            base_file = folder / f"{stem}.yaml"
            write_text(base_file, yaml.safe_dump(base, sort_keys=False))
            for kind, parameters in _parameters(model, recipe, grid).items():
                sweep = {
                    "name": f"{stem}_{kind}",
                    "program": str(PROGRAM),
                    "command": ["${env}", "${interpreter}", "${program}", str(base_file)],
                    "method": "grid",
                    "metric": {"name": "performance/eval/ce_increase", "goal": "minimize"},
                    "parameters": {**parameters, "seed": {"values": list(grid.seeds)}},
                }
                sweeps.append(folder / f"{stem}_sweep_{kind}.yaml")
                write_text(sweeps[-1], yaml.safe_dump(sweep, sort_keys=False))
    return sweeps


def _length(model: Model, n_tokens: int) -> dict[str, int]:
    """Returns the settings that make runs equally long in tokens and steps, whatever the length of the rows."""
    n_ctx = model.settings["train_data"]["n_ctx"]
    return {
        "n_samples": n_tokens // n_ctx,
        "eval_n_samples": 32_768 // n_ctx,
        "batch_size": 1024 // n_ctx,
        "warmup_samples": n_tokens // n_ctx // 16,
        "save_every_n_samples": n_tokens // n_ctx // 2,
    }


def _parameters(model: Model, recipe: str, grid: Grid) -> dict[str, dict[str, Any]]:
    """Returns the parameters of the sweep over architectures with a k, and of the one over those with a penalty."""
    chosen = set(grid.architectures or [*BY_K, *BY_PENALTY])
    of_model = {"jumprelu": {"initial_threshold": model.threshold, "bandwidth": 2 * model.threshold}}
    by_k = [_with_k(name, k) for name in BY_K if name in chosen for k in grid.l0s]
    by_penalty = [
        {"architecture": name, **options, **of_model.get(name, {})}
        for name, options in BY_PENALTY.items()
        if name in chosen
    ]
    sparsity = [{"coeff": START[recipe], "target_l0": float(l0)} for l0 in grid.l0s]
    sweeps: dict[str, dict[str, Any]] = {}
    if by_k:
        sweeps["k"] = {"saes": {"parameters": {"sae": {"values": by_k}}}}
    if by_penalty:
        sweeps["penalty"] = {
            "saes": {"parameters": {"sae": {"values": by_penalty}}},
            "loss": {"parameters": {"sparsity": {"values": sparsity}}},
        }
    return sweeps


def _with_k(name: str, k: int) -> Mapping[str, Any]:
    return {"architecture": name, **({"ks": [k // 4, k // 2, k]} if name == "hierarchical_topk" else {"k": k})}


def main() -> int:
    """Writes sweeps, and prints their names."""
    default = Grid()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evidence", description=__doc__)
    parser.add_argument("model", choices=("demo", "stories"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model-path", type=Path, help="stories: the Hugging Face folder of stories260K")
    parser.add_argument("--text", type=Path, help="stories: a text file or folder of TinyStories")
    parser.add_argument("--recipes", nargs="+", default=[], help="default: all")
    parser.add_argument("--architectures", nargs="+", default=[], help="default: all")
    for name in ("l0s", "seeds", "tokens"):
        parser.add_argument(f"--{name}", nargs="+", type=int, default=getattr(default, name))
    args = parser.parse_args()
    log_to_console()
    return run_command(lambda: _write(args), debug=False)


def _write(args: argparse.Namespace) -> None:
    if args.model == "stories" and (args.model_path is None or args.text is None):
        raise UserError("stories needs --model-path and --text")
    model = demo() if args.model == "demo" else stories(args.model_path, args.text)
    for path in write_sweeps(model, args.folder, Grid(*(getattr(args, name) for name in Grid._fields))):
        print(path)


if __name__ == "__main__":
    raise SystemExit(main())
