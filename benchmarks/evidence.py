"""`python -m benchmarks.evidence`: what each architecture and recipe reaches at equal L0 and equal tokens.

    python -m benchmarks.evidence sweeps demo EVIDENCE        # writes a base config and two sweeps for each recipe
    e2e-sae sweep EVIDENCE/*_sweep_*.yaml --shared 8 --out EVIDENCE/runs
    python -m benchmarks.evidence report EVIDENCE/runs        # evidence.csv, and a figure, from the finished runs

The sweeps can be killed and started again. A grid is architectures x recipes x `L0S`: where k makes latents sparse, k
is the L0; where a penalty does, `loss.sparsity.target_l0` is. All else is equal: rows and their order, dictionary size,
learning rate.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

import e2e_sae
from e2e_sae.checkpoint.files import new_file, read_json, write_text
from e2e_sae.demo import demo_dir
from e2e_sae.errors import MissingFileError, UserError
from e2e_sae.run_types import COLOURS, MORE_COLOURS

PROGRAM = Path(e2e_sae.__file__).resolve().parent / "scripts" / "train_tlens_saes" / "run_train_tlens_saes.py"
"""What a run of a sweep is made by."""
L0S = (16, 32, 64)
"""Active latents per token."""
BY_K: dict[str, dict[str, Any]] = {
    "topk": {},
    "batch_topk": {},
    "matryoshka": {},
    "hierarchical_topk": {},
    "codebook": {},
}
"""Architectures that k makes sparse, and their options."""
BY_PENALTY: dict[str, dict[str, Any]] = {
    "relu": {},
    "jumprelu": {"penalty": "tanh", "tanh_scale": 1.0},
    "gated": {},
}
"""Architectures that a penalty makes sparse, and their options."""
SEEDS = (0,)
"""Of the grid."""


class Model(NamedTuple):
    """A language model, and what its SAEs are trained on."""

    settings: dict[str, Any]
    """Of every run."""
    later: list[str]
    """Hook points of the downstream MSE."""
    threshold: float
    """JumpReLU's first one, by trial; its bandwidth is twice that."""


def _demo() -> Model:
    data = {"dataset_name": "stdlib", "is_tokenized": False, "n_ctx": 128}
    settings = {
        "lr": 1e-2,
        "tlens_model_path": str(demo_dir() / "stdlib_gpt2"),
        "saes": {"sae_positions": "blocks.2.hook_resid_pre", "d_sae": 1024},
        "train_data": {**data, "split": "train"},
        "eval_data": {**data, "split": "eval"},
    }
    return Model(settings, ["blocks.2.hook_resid_post", "blocks.3.hook_resid_post"], threshold=1.0)


def _stories(model: Path, text: Path) -> Model:
    data = {"dataset_name": str(text.resolve()), "is_tokenized": False, "n_ctx": 256, "holdout_fraction": 0.05}
    settings = {
        "lr": 3e-2,
        "tlens_model_path": str(model.resolve()),
        "saes": {"sae_positions": "blocks.2.hook_resid_pre", "d_sae": 1024},
        "train_data": data,
    }
    return Model(settings, [f"blocks.{i}.hook_resid_post" for i in (2, 3, 4)], threshold=0.3)


COMMON: dict[str, Any] = {
    "n_samples": 3200,
    "eval_n_samples": 256,
    "eval_every_n_samples": 0,
    "batch_size": 8,
    "warmup_samples": 200,
    "max_grad_norm": 10.0,
    "log_every_n_grad_steps": 50,
    "save_every_n_samples": 1600,
}
"""Settings of every run. The learning rate of each model is the best of 3e-3, 1e-2 and 3e-2 for local and e2e ReLU SAEs."""
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


def write_sweeps(
    model: Model,
    folder: Path,
    recipe_names: Sequence[str] = (),
    architectures: Sequence[str] = (),
    seeds: Sequence[int] = SEEDS,
) -> list[Path]:
    """Writes base configs and sweep files, and returns the latter.

    Args:
        model: what the SAEs are trained on.
        folder: made if it is not there.
        recipe_names: which; none: all.
        architectures: which; none: all.
        seeds: of SAEs and order of rows.

    Raises:
        UserError: a recipe or an architecture is unknown.
    """
    known = recipes(model.later)
    for name in [*recipe_names, *architectures]:
        if name not in {**known, **BY_K, **BY_PENALTY}:
            raise UserError(f"'{name}' is no recipe ({', '.join(known)}) and no architecture of the grid")
    folder.mkdir(parents=True, exist_ok=True)
    sweeps: list[Path] = []
    for recipe in recipe_names or known:
        stem = recipe.replace(" ", "_")
        base = {**COMMON, **model.settings, **known[recipe]}
        base["loss"] = {"sparsity": {"coeff": 0.0}, **base["loss"]}
        base_file = folder / f"{stem}.yaml"
        write_text(base_file, yaml.safe_dump(base, sort_keys=False))
        for kind, parameters in _grids(model, recipe, architectures).items():
            sweep = {
                "name": f"{stem}_{kind}",
                "program": str(PROGRAM),
                "command": ["${env}", "${interpreter}", "${program}", str(base_file)],
                "method": "grid",
                "metric": {"name": "performance/eval/ce_increase", "goal": "minimize"},
                "parameters": {**parameters, "seed": {"values": list(seeds)}},
            }
            sweeps.append(folder / f"{stem}_sweep_{kind}.yaml")
            write_text(sweeps[-1], yaml.safe_dump(sweep, sort_keys=False))
    return sweeps


def _grids(model: Model, recipe: str, architectures: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Returns the parameters of the sweep over architectures with a k, and of the one over those with a penalty."""
    chosen = set(architectures or [*BY_K, *BY_PENALTY])
    by_k = [_with_k(name, options, k) for name, options in BY_K.items() if name in chosen for k in L0S]
    of_model = {"jumprelu": {"initial_threshold": model.threshold, "bandwidth": 2 * model.threshold}}
    by_penalty = [
        {"architecture": name, **options, **of_model.get(name, {})}
        for name, options in BY_PENALTY.items()
        if name in chosen
    ]
    sparsity = [{"coeff": START[recipe], "target_l0": float(l0)} for l0 in L0S]
    grids: dict[str, dict[str, Any]] = {}
    if by_k:
        grids["k"] = {"saes": {"parameters": {"sae": {"values": by_k}}}}
    if by_penalty:
        grids["penalty"] = {
            "saes": {"parameters": {"sae": {"values": by_penalty}}},
            "loss": {"parameters": {"sparsity": {"values": sparsity}}},
        }
    return grids


def _with_k(name: str, options: Mapping[str, Any], k: int) -> dict[str, Any]:
    own = {"ks": [k // 4, k // 2, k]} if name == "hierarchical_topk" else {"k": k}
    return {"architecture": name, **own, **options}


def collect(runs: Path) -> list[dict[str, Any]]:
    """Returns a row for every finished run below a sweep folder: what it was, and what it is worth on held-out rows.

    Raises:
        MissingFileError: there is none.
    """
    rows: list[dict[str, Any]] = []
    for file in sorted(runs.rglob("summary.json")):
        config, summary = yaml.safe_load((file.parent / "final_config.yaml").read_text()), read_json(file)
        (position,) = [key.split("/")[-1] for key in summary if key.startswith("sparsity/L_0_final/")]
        variances = {
            k.split("/")[-1]: v for k, v in summary.items() if k.startswith("quality/eval/explained_variance/")
        }
        rows.append(
            {
                "model": Path(config["tlens_model_path"]).name,
                "recipe": _recipe(config),
                "architecture": config["saes"]["sae"]["architecture"],
                "seed": config["seed"],
                "samples": summary["samples"],
                "l0": summary[f"sparsity/L_0_final/{position}"],
                "alive": summary[f"sparsity/alive_dict_elements_final/{position}"],
                "ce_increase": summary["performance/eval/ce_increase"],
                "kl": summary["loss/eval/logits_kl"],
                "explained_variance": variances[position],
                "explained_variance_last": list(variances.values())[-1],
                "run": str(file.parent.relative_to(runs)),
            }
        )
    if not rows:
        raise MissingFileError(f"'{runs}' holds no finished run (summary.json)")
    return rows


def _recipe(config: Mapping[str, Any]) -> str:
    loss = config["loss"]
    if config["phases"]:
        return "local then KL"
    if loss["logits_kl"] is None:
        return "local"
    if loss["kl_balance"]:
        return "KL + MSE"
    return "e2e" if loss["in_to_orig"] is None else "e2e+ds"


def draw(rows: Sequence[Mapping[str, Any]], target: Path) -> None:
    """Saves the figure: CE increase against L0 (above) and against alive latents, a column for each recipe."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = [name for name in START if any(row["recipe"] == name for row in rows)]
    kinds = [kind for kind in [*BY_PENALTY, *BY_K] if any(row["architecture"] == kind for row in rows)]
    palette = [*COLOURS.values(), *MORE_COLOURS, "black"]
    figure, axes = plt.subplots(
        2, len(names), figsize=(3.6 * len(names), 7), layout="constrained", sharey=True, squeeze=False
    )
    for column, recipe in enumerate(names):
        for n, kind in enumerate(kinds):
            own = [row for row in rows if (row["recipe"], row["architecture"]) == (recipe, kind)]
            own = sorted(own, key=lambda row: row["l0"])
            for ax, x in zip(axes[:, column], ("l0", "alive"), strict=True):
                ax.plot(
                    [row[x] for row in own], [row["ce_increase"] for row in own],
                    marker="o", ms=4, lw=1.2, color=palette[n],
                    ls="-" if kind in BY_PENALTY else "--", label=kind,
                )  # fmt: skip
        axes[0, column].set_title(recipe, fontsize=10)
        axes[0, column].set_xlabel("L0 (active latents per token)")
        axes[1, column].set_xlabel("alive latents")
    for ax in axes.flat:
        ax.set_yscale("log")
        ax.grid(alpha=0.3, which="both")
    for ax in axes[:, 0]:
        ax.set_ylabel("CE increase (nats per token)")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=len(kinds), frameon=False)
    with new_file(target) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
    plt.close(figure)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns CE increases as Markdown: a line for each architecture, a column for each recipe and L0 asked for."""
    names = [name for name in START if any(row["recipe"] == name for row in rows)]
    lines = ["| architecture | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for kind in [*BY_PENALTY, *BY_K]:
        cells: list[str] = []
        for name in names:
            own = [row for row in rows if (row["recipe"], row["architecture"]) == (name, kind)]
            own = sorted(own, key=lambda row: row["l0"])
            cells.append(", ".join(f"{row['ce_increase']:.3f} ({row['l0']:.0f})" for row in own))
        if any(cells):
            lines.append(f"| {kind} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Writes sweeps, or the report of their runs."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evidence", description=__doc__)
    commands = parser.add_subparsers(required=True)
    sweeps = commands.add_parser("sweeps", help="write base configs and sweep files")
    sweeps.add_argument("model", choices=("demo", "stories"))
    sweeps.add_argument("folder", type=Path)
    sweeps.add_argument("--model-path", type=Path, help="stories: the Hugging Face folder of stories260K")
    sweeps.add_argument("--text", type=Path, help="stories: a text file or folder of TinyStories")
    sweeps.add_argument("--recipes", nargs="+", default=[], help="default: all")
    sweeps.add_argument("--architectures", nargs="+", default=[], help="default: all")
    sweeps.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    sweeps.set_defaults(run=_sweeps)
    report = commands.add_parser("report", help="a table and a figure of the finished runs")
    report.add_argument("runs", type=Path)
    report.set_defaults(run=_report)
    args = parser.parse_args()
    args.run(args)


def _sweeps(args: argparse.Namespace) -> None:
    if args.model == "stories" and (args.model_path is None or args.text is None):
        raise UserError("stories needs --model-path and --text")
    model = _demo() if args.model == "demo" else _stories(args.model_path, args.text)
    for path in write_sweeps(model, args.folder, args.recipes, args.architectures, args.seeds):
        print(path)


def _report(args: argparse.Namespace) -> None:
    import pandas as pd

    rows = collect(args.runs)
    write_text(args.runs / "evidence.csv", pd.DataFrame(rows).to_csv(index=False))
    draw(rows, args.runs / "evidence.png")
    print(table(rows))
    print(json.dumps({"runs": len(rows), "csv": str(args.runs / "evidence.csv")}))


if __name__ == "__main__":
    main()
