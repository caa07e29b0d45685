"""UMAP of two dictionaries together, and which latents lie where (arXiv 2405.12241, section 3.3.4, figs. 19 and 20).

The alive latents' decoder directions of a run and of the local run of the same place are embedded in a plane (McInnes
et al. 2018, arXiv 1802.03426; the defaults of umap-learn, as in the paper). Regions are the clusters that HDBSCAN
(Campello et al. 2013) finds there, of nested ones the innermost: no boxes by hand. They are numbered by how unlike the
whole they are,

    z = |n_A - n p| / sqrt(n p (1 - p)),   n latents, n_A of the first run, p its share of all latents

the most lopsided one first. The token at which each latent is most active says what a region is about.
"""

import warnings
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from e2e_sae.analysis.clean_directions import clean_directions
from e2e_sae.analysis.dictionaries import Dictionary, dictionary
from e2e_sae.analysis.geometry import PLACE, one_per_kind
from e2e_sae.analysis.item import Analysis, Figure, NotApplicable
from e2e_sae.analysis.matching import REFERENCE
from e2e_sae.analysis.strongest import strongest_tokens
from e2e_sae.analysis.study import Study
from e2e_sae.analysis.umap_figures import draw_first_direction, draw_umaps
from e2e_sae.errors import UserError
from e2e_sae.log import logger
from e2e_sae.progress import progress_bar

MIN_LATENTS = 50
"""Fewer latents in all make no picture."""
MIN_REGION, MIN_REGION_SHARE = 20, 0.0005
"""Latents of the smallest region, and as a share of all: at the paper's 60k latents 30 (its regions: 19 to 595)."""
OUTSIDE = 0
"""Region of latents that are in none."""
N_LISTED = 20
"""Regions that the text lists, for each pair of runs."""
N_EXAMPLES = 4
"""Latents that it shows of each, those with the greatest activation."""
PAIR = [*PLACE, "pair"]
"""Columns that say which embedding a point is in."""
POINT = [*PAIR, "layer", "run_type", "id", "latent", "x", "y"]
"""Columns of a point."""


_Pair = tuple[tuple[Mapping[str, Any], Dictionary], tuple[Mapping[str, Any], Dictionary]]


class Plane(NamedTuple):
    """Two dictionaries in a plane; first A's latents, then B's."""

    xy: Float[Tensor, "n 2"]
    """Where they are."""
    regions: Int[Tensor, " n"]
    """1, 2, ...; `OUTSIDE`."""


def umap_table(study: Study) -> Any:
    """Returns a row for each latent of each pair of runs: where it is, its region, and where it is most active."""
    import pandas as pd

    parts: list[Any] = []
    for points, runs in _planes(study):
        strongest = pd.concat([_strongest(study, row, of) for row, of in runs], ignore_index=True)
        parts.append(pd.concat([points, strongest], axis=1))
    return pd.concat(parts, ignore_index=True)


def first_direction_table(study: Study) -> Any:
    """Returns a row for each latent of each pair of runs: where it is, and `cos_first_direction`, the cosine of its
    decoder direction with the first principal direction of the clean activations (`clean_directions.py`).

    Raises:
        NotApplicable: no pair's clean activations are to be had.
    """
    import pandas as pd

    parts: list[Any] = []
    for points, runs in _planes(study):
        try:
            first = [_first_direction(study, of) for _, of in runs]
        except UserError as reason:
            logger.warning(f"'{runs[0][0]['source']}': left out: {str(reason).splitlines()[0]}")
            continue
        cosines = [of.directions(study).double().cpu() @ axis for (_, of), axis in zip(runs, first, strict=True)]
        parts.append(points[POINT].assign(cos_first_direction=torch.cat(cosines).numpy()))
    if not parts:
        raise NotApplicable("it wants runs with evaluation data, and their language model")
    return pd.concat(parts, ignore_index=True)


def _first_direction(study: Study, of: Dictionary) -> Float[Tensor, " d_out"]:
    point = study.stored(of.run_id).saes[of.position].info.position.write
    return clean_directions(study, of.run_id, [point])[point].axes[0]


def _planes(study: Study) -> Iterator[tuple[Any, _Pair]]:
    """Yields each pair of runs: a row for each latent, A's first, with its place and region; and (row, dictionary) of
    both runs.

    Raises:
        NotApplicable: there are none, they are too small, or UMAP is not installed.
    """
    import pandas as pd

    pairs: list[tuple[Mapping[str, Any], Mapping[str, Any]]] = []
    for _, rows in one_per_kind(study.table).groupby(PLACE, sort=False, dropna=False):
        local = [row for row in rows.to_dict("records") if row["run_type"] == REFERENCE][:1]
        pairs += [(row, b) for b in local for row in rows.to_dict("records") if row["run_type"] != REFERENCE]
    if not pairs:
        raise NotApplicable("it wants a local run and one of another type, at one position, of one architecture")
    _check_installed()
    n_made = 0
    for row_a, row_b in progress_bar(pairs, desc="UMAP"):
        a, b = (dictionary(study, row["id"], row["sae_pos"]) for row in (row_a, row_b))
        if len(a) + len(b) < MIN_LATENTS:
            logger.info(f"{row_a['source']}: left out, {len(a) + len(b)} latents are too few for a UMAP")
            continue
        n_made += 1
        plane, runs = plane_of(study, a, b), ((row_a, a), (row_b, b))
        who = [
            pd.DataFrame({"latent": of.latents.numpy()}).assign(run_type=row["run_type"], id=row["id"])
            for row, of in runs
        ]
        place = {name: row_a[name] for name in [*PLACE, "layer"]}
        where = {"x": plane.xy[:, 0].numpy(), "y": plane.xy[:, 1].numpy(), "region": plane.regions.numpy()}
        pair = f"{row_a['run_type']} and {row_b['run_type']}"
        points = pd.concat(who, ignore_index=True).assign(**where, **place, pair=pair)
        yield points[[*POINT, "region"]], runs
    if not n_made:
        raise NotApplicable(f"it wants at least {MIN_LATENTS} alive latents in two runs together")


def plane_of(study: Study, a: Dictionary, b: Dictionary) -> Plane:
    """Returns two dictionaries in a plane, which is kept in the study's cache, and its regions."""

    def compute() -> dict[str, Tensor]:
        both = torch.cat([a.directions(study), b.directions(study)]).cpu().numpy()
        return {"xy": torch.from_numpy(embedded(both, study.seed))}

    xy = study.cached("umap", {"a": a.key, "b": b.key, "seed": study.seed}, compute)["xy"]
    regions = regions_of(xy.numpy(), np.arange(len(xy)) < len(a))
    return Plane(xy, torch.from_numpy(regions))


def embedded(points: Float[np.ndarray, "n d"], seed: int) -> Float[np.ndarray, "n 2"]:
    """Returns the points in a plane, by UMAP with its defaults."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns that other packages are not installed
        import umap

        n_neighbours = min(15, len(points) - 1)
        return umap.UMAP(n_neighbors=n_neighbours, random_state=seed, n_jobs=1).fit_transform(points)


def regions_of(xy: Float[np.ndarray, "n 2"], is_a: Any) -> Int[np.ndarray, " n"]:
    """Returns the region of each point, numbered from the most lopsided on, `OUTSIDE` of all clusters.

    Args:
        xy: points in the plane.
        is_a: which are the first run's.
    """
    from sklearn.cluster import HDBSCAN

    size = max(MIN_REGION, round(MIN_REGION_SHARE * len(xy)))
    options: Any = {"min_cluster_size": size, "cluster_selection_method": "leaf", "copy": True}
    clusters = HDBSCAN(**options).fit_predict(xy)
    n = np.bincount(clusters[clusters >= 0], minlength=1)
    n_a = np.bincount(clusters[(clusters >= 0) & is_a], minlength=len(n))
    share = is_a.mean()
    z = np.abs(n_a - n * share) / np.sqrt(np.maximum(n, 1) * share * (1 - share))
    # Of equally lopsided ones the larger first.
    number = np.empty(len(n), dtype=np.int64)
    number[np.lexsort((-n, -z))] = np.arange(1, len(n) + 1)
    return np.where(clusters >= 0, number[clusters], OUTSIDE)


def regions_text(table: Any) -> Any:
    """Returns a row for each of the first regions: composition, commonest strongest token, some members."""
    import pandas as pd

    rows: list[dict[str, Any]] = []
    several = table["model_name"].nunique() > 1
    for keys, points in table[table["region"] != OUTSIDE].groupby([*PAIR, "region"], sort=False, dropna=False):
        place = dict(zip([*PAIR, "region"], keys, strict=True))
        if place["region"] > N_LISTED:
            continue
        names = place["pair"].split(" and ")
        composition = ", ".join(f"{(points['run_type'] == name).sum()} {name}" for name in names)
        rows.append(
            {
                **({"model": place["model_name"]} if several else {}),
                "SAE at": place["sae_pos"],
                "architecture": place["architecture"],
                "pair": place["pair"],
                "region": place["region"],
                "latents": composition,
                **(_about(points) if "token" in table else {}),
            }
        )
    columns = ["SAE at", "architecture", "pair", "region"]
    return pd.DataFrame(rows).sort_values(columns, kind="stable") if rows else pd.DataFrame(columns=columns)


def _about(points: Any) -> dict[str, Any]:
    """Returns what the strongest tokens say of a region."""
    known = points[points["activation"] > 0]
    if known.empty:
        return {"strongest token": None, "at position": None, "examples": None}
    counts = known["token"].value_counts()
    examples = known.sort_values("activation", ascending=False)[:N_EXAMPLES]
    shown = [f"{p.run_type} {p.latent}: {p.context}" for p in examples.itertuples(index=False)]
    return {
        "strongest token": f"{counts.index[0]!r} ({counts.iloc[0]} of {len(known)})",
        "at position": int(known["token_position"].median()),
        "examples": "; ".join(shown),
    }


def _strongest(study: Study, row: Mapping[str, Any], of: Dictionary) -> Any:
    """Returns where each latent is most active; without columns where that is not to be had."""
    import pandas as pd

    try:
        return pd.DataFrame(strongest_tokens(study, of.run_id, of.position, of.latents)._asdict())
    except UserError as reason:
        logger.warning(f"'{row['source']}': latents are shown without contexts: {str(reason).splitlines()[0]}")
        return pd.DataFrame(index=range(len(of)))


def _check_installed() -> None:
    from importlib.util import find_spec

    if find_spec("umap") is None:
        raise NotApplicable(
            "it wants the package umap-learn: pip install 'e2e_sae[analysis]', or pip install umap-learn"
        )


ANALYSES = (
    Analysis(
        "umap",
        "decoder directions of two runs in a plane, and its regions with what they are about (figs. 19 and 20)",
        umap_table,
        [Figure("umap", draw_umaps)],
        regions_text,
        {"region": 0, "at position": 0},
    ),
    Analysis(
        "umap_first_direction",
        "the same planes, coloured by cosine with the first principal direction of the activations (fig. 21)",
        first_direction_table,
        [Figure("umap_first_direction", draw_first_direction)],
    ),
)
