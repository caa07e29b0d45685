"""What the model loses when a direction of its activations is resampled (arXiv 2405.12241, fig. 23b).

The component of every token along one principal direction of the clean activations, positions after the first alone,
is replaced by that of another one of these tokens: a random permutation over (sequence, position), one direction at a
time, in the clean model, without SAEs.

    c_t = (a_t - mean) . v_i,   a_t' = a_t + (c_perm(t) - c_t) v_i

Then the mean over all counted tokens, position 0 included, of KL(clean || changed), and of KL(changed || clean), which
is the one that the paper's code computes. The paper has 30 sequences; so are there at most here.

Shapes: T tokens of all rows, n directions.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from e2e_sae.acts import Output, Pass, Position, TokenBatch
from e2e_sae.analysis.clean_directions import Directions, clean_directions, counted_of, vectors_of
from e2e_sae.analysis.compared import Group, compared_groups
from e2e_sae.analysis.item import Analysis, Figure
from e2e_sae.analysis.looks import grid, legend_below, n_columns, panels_of
from e2e_sae.analysis.study import Study
from e2e_sae.models.runner import run_changed, run_clean
from e2e_sae.ops.logits import kl_sum, with_kept_logits
from e2e_sae.progress import progress_bar
from e2e_sae.seeds import seed_for

N_ROWS = 30
"""The paper's."""


class BothKLs(NamedTuple):
    """Two divergences, one number for each direction: means over tokens, in nats."""

    clean_changed: Float[Tensor, " n"]
    """KL(clean || changed)."""
    changed_clean: Float[Tensor, " n"]
    """KL(changed || clean)."""


@torch.no_grad()
def resampled_kls(
    lm: nn.Module, batches: Iterable[TokenBatch], point: str, directions: Directions, seed: int = 0
) -> BothKLs:
    """Returns the two divergences for every direction.

    Args:
        lm: the language model.
        batches: token rows; they, and their components, are kept.
        point: hook point whose activation is changed.
        directions: of the clean activations there.
        seed: of the permutations.
    """
    batches = list(batches)
    changes = _changes(lm, batches, point, directions, seed)
    position = Position(point, point)
    n_directions, n_tokens = len(directions.axes), sum(batch.n_counted for batch in batches)
    sums = torch.zeros(2, n_directions, dtype=torch.float64)
    for batch, change in zip(progress_bar(batches, desc="resampling", inner=True), changes, strict=True):
        clean = run_clean(lm, batch, [], reuse=[[position]])
        assert clean.output is not None
        output = with_kept_logits(clean.output)
        for i, axis in enumerate(directions.axes):
            changed = _run_moved(lm, clean, position, change[..., i], axis)
            sums[0, i] += kl_sum(output, changed, batch.counted).cpu()
            sums[1, i] += kl_sum(changed, output, batch.counted).cpu()
    return BothKLs(*(sums / n_tokens))


def _changes(
    lm: nn.Module, batches: list[TokenBatch], point: str, directions: Directions, seed: int
) -> list[Float[Tensor, "batch pos heads n"]]:
    """Returns for every batch by how much each component changes; 0 where it stays."""
    components: list[Tensor] = []
    for batch in batches:
        clean = run_clean(lm, batch, [point], want_logits=False)
        components.append(directions.components(vectors_of(clean.at(point))))
    moved = [_is_moved(batch, one) for batch, one in zip(batches, components, strict=True)]
    values = torch.cat([one[chosen] for one, chosen in zip(components, moved, strict=True)])
    permuted = torch.empty_like(values)
    for i in range(values.shape[1]):
        generator = torch.Generator().manual_seed(seed_for(seed, "resampled", point, i))
        permuted[:, i] = values[torch.randperm(len(values), generator=generator).to(values.device), i]
    changes = [torch.zeros_like(one) for one in components]
    parts = (permuted - values).split([int(chosen.sum()) for chosen in moved])
    for change, chosen, part in zip(changes, moved, parts, strict=True):
        change[chosen] = part
    return changes


def _is_moved(batch: TokenBatch, components: Float[Tensor, "batch pos heads n"]) -> Bool[Tensor, "batch pos heads"]:
    counted = counted_of(batch).clone()
    counted[:, 0] = False
    return counted[..., None].expand(components.shape[:3])


def _run_moved(
    lm: nn.Module,
    clean: Pass,
    position: Position,
    change: Float[Tensor, "batch pos heads"],
    axis: Float[Tensor, " d"],
) -> Output:
    def move(activation: Tensor) -> Tensor:
        moved = change[..., None] * axis.to(change.device)
        return activation + moved.reshape(activation.shape).to(activation.dtype)

    return run_changed(lm, clean, [(position, move)])


def resampled_directions_table(study: Study) -> Any:
    """Returns a line for every hook point and direction: its share of the variance and the two divergences."""
    import pandas as pd

    parts: list[Any] = []
    for group in compared_groups(study):
        directions = clean_directions(study, group.run_id, group.points)
        for point in group.points:
            kls = _cached_kls(study, group, point, directions[point])
            values = {"explained_share": directions[point].shares, **{f"kl_{k}": v for k, v in kls._asdict().items()}}
            part = pd.DataFrame({"direction": range(len(directions[point].axes)), **values})
            parts.append(part.assign(model_name=group.model_name, sae_pos=point))
    table = pd.concat(parts, ignore_index=True).drop_duplicates(["model_name", "sae_pos", "direction"])
    return table[["model_name", "sae_pos", "direction", "explained_share", "kl_clean_changed", "kl_changed_clean"]]


def _cached_kls(study: Study, group: Group, point: str, directions: Directions) -> BothKLs:
    n_rows = min(N_ROWS, study.n_samples)

    def compute() -> dict[str, Tensor]:
        lm = study.lm(study.stored(group.run_id))
        batches = study.batches(group.run_id, n_rows, desc="components")
        return resampled_kls(lm, batches, point, directions, study.seed)._asdict()

    key = {**group.facts, "saes": None, "point": point, "n_samples": study.n_samples, "n_rows": n_rows}
    return BothKLs(**study.cached("resampled_directions", {**key, "seed": study.seed}, compute))


def draw_resampled(table: Any) -> Any:
    """Draws both divergences by direction, a panel for each hook point."""
    panels = panels_of(table)
    figure, axes = grid(len(panels), n_columns(len(panels)), 5.4, 3.4)
    for (title, part), ax in zip(panels, axes, strict=True):
        for column, label, look in (
            ("kl_clean_changed", "KL(clean || changed)", {"color": "#0173b2", "marker": "o"}),
            ("kl_changed_clean", "KL(changed || clean), the paper's", {"color": "#de8f05", "marker": "s"}),
        ):
            ax.plot(part["direction"], part[column], markersize=4, label=label, **look)
        ax.set(xlabel="principal direction that is resampled", ylabel="KL (nats per token)", title=title)
        ax.set_ylim(bottom=0)
    legend_below(figure, axes)
    return figure


ANALYSES = (
    Analysis(
        "resampled_directions",
        "KL of the clean model when a principal direction is resampled at positions > 0 (fig. 23b)",
        resampled_directions_table,
        [Figure("resampled_directions", draw_resampled)],
    ),
)
