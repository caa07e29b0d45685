"""The figure of `docs/performance.md`, from the JSON of `python -m benchmarks growth`."""

from pathlib import Path
from typing import Any

from e2e_sae.checkpoint.files import new_file, read_json
from e2e_sae.errors import UserError
from e2e_sae.run_types import COLOURS, MORE_COLOURS

from .growth import SERIES

OURS, PLAIN, FLOOR = COLOURS["e2e+ds"], MORE_COLOURS[0], MORE_COLOURS[-1]


def draw(results: Path, target: Path) -> None:
    """Saves the figure: above seconds of a step, below its memory, a column for each series that was measured.

    Raises:
        UserError: the file holds no series.
        CheckpointError: the file cannot be read.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    entries = [entry for entry in read_json(results)["results"] if "series" in entry]
    names = [name for name in SERIES if any(entry["series"] == name for entry in entries)]
    if not names:
        raise UserError(f"'{results}' holds no series: make one with `growth --json {results}`")
    figure, axes = plt.subplots(
        2, len(names), figsize=(3.4 * len(names), 6), layout="constrained", sharex="col", squeeze=False
    )
    for column, name in enumerate(names):
        points = sorted((entry for entry in entries if entry["series"] == name), key=lambda entry: entry["value"])
        draw_points = _members if name == "members" else _beside_plain
        draw_points(axes[:, column], points)
        axes[1, column].set_xlabel(SERIES[name].label)
        for ax in axes[:, column]:
            ax.grid(alpha=0.3)
            ax.set_ylim(0, None)
            if name in ("latents", "vocabulary", "context", "members"):
                ax.set_xscale("log", base=2)
                ax.set_xticks([point["value"] for point in points], [f"{point['value']:,}" for point in points])
                ax.minorticks_off()
                ax.tick_params(axis="x", labelsize=8)
        axes[0, column].legend(frameon=False, fontsize=8)
    axes[0, 0].set_ylabel("a step (s)")
    axes[1, 0].set_ylabel("memory of a step (MB)")
    with new_file(target) as temporary:
        figure.savefig(temporary, dpi=150, format=target.suffix[1:] or "png")
    plt.close(figure)


def _beside_plain(axes: Any, points: list[dict[str, Any]]) -> None:
    x = [point["value"] for point in points]
    for name, label, colour in (("ours", "ours", OURS), ("twin", "plain", PLAIN)):
        axes[0].plot(x, [point["seconds"][name] for point in points], marker="o", color=colour, label=label)
        if all("memory" in point for point in points):
            axes[1].plot(x, [point["memory"][name]["step_mb"] for point in points], marker="o", color=colour)
    axes[0].plot(x, [point["floor_seconds"] for point in points], ls=":", color=FLOOR, label="counted floor")


def _members(axes: Any, points: list[dict[str, Any]]) -> None:
    for kind in dict.fromkeys(point["kind"] for point in points):
        mine = [point for point in points if point["kind"] == kind]
        x = [point["value"] for point in mine]
        axes[0].plot(
            x, [point["seconds"]["ours"] for point in mine], marker="o", color=COLOURS[kind], label=f"{kind}, together"
        )
        alone = [point["value"] * point["seconds"].get("one", point["seconds"]["ours"]) for point in mine]
        axes[0].plot(x, alone, ls="--", color=COLOURS[kind], label=f"{kind}, one after another")
        if all("memory" in point for point in mine):
            axes[1].plot(x, [point["memory"]["ours"]["step_mb"] for point in mine], marker="o", color=COLOURS[kind])
