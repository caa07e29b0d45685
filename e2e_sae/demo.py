"""`e2e-sae demo`: a local, an e2e and an e2e+ds SAE on the embedded model, a table and a figure of what came out.

Everything comes with the library or with the running Python: the model is `demos/stdlib_gpt2`, its text the
standard library. The three runs differ in their loss alone.
"""

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from e2e_sae.config import Config
from e2e_sae.errors import MissingFileError
from e2e_sae.log import logger
from e2e_sae.run_types import COLOURS
from e2e_sae.settings import REPO_ROOT
from e2e_sae.trackers import read_metrics
from e2e_sae.train import train

RUNS = {"local": "local.yaml", "e2e": "e2e.yaml", "e2e+ds": "e2e_ds.yaml"}
"""Type of each run, and its config in `demos/`."""
LESSON = """
What to look for: at about the same L0, the local SAE reconstructs the activation it sits on best and still costs the
model most; the e2e SAE keeps the output without keeping the activations; the e2e+ds SAE keeps the output and the later
layers. This is a glimpse, not a result: 0.4 million tokens (the paper: 400 million), one seed, one sparsity, latents
that are mostly dense."""


class DemoRow(NamedTuple):
    """One line of the table, all of it measured on held-out text."""

    kind: str
    """Type of SAE."""
    l0: float
    """Active latents per token."""
    alive: int
    """Latents active at least once."""
    ce_increase: float
    """Nats per token that the SAE costs the model."""
    kl: float
    """KL(clean || spliced), nats per token."""
    ev_here: float
    """Explained variance at the SAE."""
    ev_by_layer: dict[int, float]
    """Explained variance of the output of each later block."""
    tokens_per_s: float
    """Training speed, set-up and evaluation included."""
    run_dir: Path
    """Where it is."""


def demo_dir() -> Path:
    """Returns the folder of the demo's configs and of the embedded model `stdlib_gpt2`.

    Raises:
        MissingFileError: neither a wheel's copy nor the repository's `demos/` is there.
    """
    package = Path(__file__).resolve().parent
    places = [package / "demos", REPO_ROOT / "demos"]
    for place in places:
        if (place / "stdlib_gpt2").is_dir():
            return place
    raise MissingFileError(f"the demo's files are in neither '{places[0]}' nor '{places[1]}': install e2e_sae again")


def run_demo(out_dir: str | Path = "out", configs: Path | None = None, overrides: Sequence[str] = ()) -> list[DemoRow]:
    """Trains the three SAEs, prints the table and the figure's path, and returns the table.

    Args:
        out_dir: where run folders and figure go.
        configs: folder with the three configs; None: `demo_dir()`.
        overrides: changes of all three configs.

    Raises:
        MissingFileError: the configs are not there.
    """
    configs = configs or demo_dir()
    out_dir = Path(out_dir).resolve()
    rows: list[DemoRow] = []
    started = time.perf_counter()
    for n, (kind, file) in enumerate(RUNS.items(), 1):
        logger.info(f"\n[{n}/{len(RUNS)}] {kind}: {configs / file}")
        config = Config.from_file(configs / file, [*overrides, f"save_dir={out_dir}"])
        begun = time.perf_counter()
        run_dir = train(config)
        assert run_dir is not None, "the demo's runs are saved"
        rows.append(row_of(kind, run_dir, time.perf_counter() - begun))
    figure = out_dir / "demo.png"
    draw(rows, figure)
    logger.info(f"\ndone in {time.perf_counter() - started:.0f} s; held-out results:\n")
    logger.info(table(rows))
    logger.info(f"\nfigure: {figure}\nrun folders:")
    for row in rows:
        logger.info(f"  {row.kind:7}{row.run_dir}")
    logger.info(LESSON)
    # As it was called: the environment's commands need not be on the PATH.
    command = sys.argv[0] if Path(sys.argv[0]).name == "e2e-sae" else "e2e-sae"
    logger.info(f"next: {command} evaluate '{rows[0].run_dir}'")
    logger.info(f"      {command} train {configs / RUNS['e2e+ds']} --set n_samples=20000")
    return rows


def row_of(kind: str, run_dir: Path, seconds: float) -> DemoRow:
    """Returns a run's line of the table from its log."""
    last = read_metrics(run_dir / "metrics.jsonl")[-1]
    (position,) = [key.split("/")[-1] for key in last if key.startswith("sparsity/eval/L_0/")]
    stem = "quality/eval/explained_variance/"
    by_layer = {
        int(key.split(".")[1]): value
        for key, value in last.items()
        if key.startswith(f"{stem}blocks.") and key.endswith("hook_resid_post")
    }
    return DemoRow(
        kind=kind,
        l0=last[f"sparsity/eval/L_0/{position}"],
        alive=last[f"sparsity/eval/alive_dict_elements/{position}"],
        ce_increase=last["performance/eval/ce_increase"],
        kl=last["loss/eval/logits_kl"],
        ev_here=last[stem + position],
        ev_by_layer=by_layer,
        tokens_per_s=last["total_tokens"] / seconds,
        run_dir=run_dir,
    )


def table(rows: Sequence[DemoRow]) -> str:
    """Returns the table as text."""
    head = ("type", "L0", "alive", "CE increase", "KL", "EV at the SAE", "EV at the last layer", "tokens/s")
    cells = [
        (
            row.kind, f"{row.l0:.1f}", str(row.alive), f"{row.ce_increase:.3f}", f"{row.kl:.3f}",
            f"{row.ev_here:.3f}", f"{row.ev_by_layer[max(row.ev_by_layer)]:.3f}", f"{row.tokens_per_s:,.0f}",
        )
        for row in rows
    ]  # fmt: skip
    widths = [max(len(line[i]) for line in (head, *cells)) for i in range(len(head))]
    lines = [
        "  ".join(
            text.ljust(w) if i == 0 else text.rjust(w) for i, (text, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in (head, *cells)
    ]
    return "\n".join(lines)


def draw(rows: Sequence[DemoRow], path: Path) -> None:
    """Saves the figure: cost against sparsity, and what is kept of each later layer."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes_list = plt.subplots(1, 2, figsize=(9.5, 3.8), layout="constrained")
    axes: Any = axes_list
    for row in rows:
        colour = COLOURS[row.kind]
        axes[0].scatter(row.l0, row.ce_increase, color=colour, s=70, label=row.kind, zorder=3)
        layers = sorted(row.ev_by_layer)
        axes[1].plot(
            ["SAE", *(f"block {i}" for i in layers)],
            [row.ev_here, *(row.ev_by_layer[i] for i in layers)],
            marker="o", color=colour, label=row.kind,
        )  # fmt: skip
    axes[0].set(xlabel="L0 (active latents per token)", ylabel="CE increase (nats per token)")
    axes[0].set_title("what the SAE costs the model (lower left is better)", fontsize=10)
    axes[0].set_xlim(0, 1.25 * max(row.l0 for row in rows))
    axes[0].set_ylim(min(0.0, *(row.ce_increase for row in rows)), 1.15 * max(row.ce_increase for row in rows))
    axes[1].set(xlabel="activation compared (block: its output)", ylabel="explained variance", ylim=(None, 1.0))
    axes[1].set_title("how much of each activation survives", fontsize=10)
    for ax in axes:
        ax.grid(alpha=0.3)
    axes[0].legend(title="trained on", frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
