"""UMAP of two dictionaries: regions and their order, where latents are most active, what is written and drawn."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from e2e_sae.analysis import strongest, umaps
from e2e_sae.analysis.item import NotApplicable
from e2e_sae.analysis.produce import produce
from e2e_sae.analysis.study import Study
from e2e_sae.models.runner import run_clean
from tests.analysis.tiny_studies import random_decoder, study_of, train_with_eval_data, write_legacy_run
from tests.tiny_runs import N_CTX, console

POINT = "blocks.1.hook_resid_pre"


@pytest.fixture(autouse=True)
def closed_figures() -> Iterator[None]:
    """Nothing is left open behind a test."""
    yield
    plt.close("all")


def blobs(sizes: list[tuple[int, int]], seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Returns points in far apart heaps, and which are the first run's, of which each heap has so many of either."""
    rng = np.random.default_rng(seed)
    points = [rng.normal(size=(a + b, 2)) + 50 * n for n, (a, b) in enumerate(sizes)]
    return np.concatenate(points), np.concatenate([np.arange(a + b) < a for a, b in sizes])


def test_regions_are_the_heaps_numbered_from_the_most_lopsided_on():
    xy, is_a = blobs([(18, 18), (5, 30), (25, 5)])
    far = np.array([[-1000.0, 0.0]])
    found = umaps.regions_of(np.concatenate([xy, far]), np.concatenate([is_a, [True]]))
    # |n_A - n p| / sqrt(n p (1 - p)) with p = 49 / 102: 0.2, 4.0 and 3.9.
    assert set(found[:36]) - {umaps.OUTSIDE} == {3}
    assert set(found[36:71]) - {umaps.OUTSIDE} == {1}
    assert set(found[71:101]) - {umaps.OUTSIDE} == {2}
    assert (found[:101] != umaps.OUTSIDE).mean() > 0.6
    assert found[101] == umaps.OUTSIDE


def test_points_without_heaps_are_in_no_region():
    spread = 2.0 ** np.arange(60)
    assert set(umaps.regions_of(np.stack([spread, spread], 1), np.arange(60) < 30)) == {umaps.OUTSIDE}


@pytest.fixture
def three_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Study:
    """Runs of 40 latents: e2e's directions are near 0 or 1 on the first axis, local's near 0 or 2 on the second one.

    The plane is that of the first two axes.
    """
    monkeypatch.setattr(umaps, "embedded", lambda points, seed: points[:, :2].copy())
    noise = 0.01 * random_decoder(40)
    first, second = (torch.arange(40) < 20).float()[:, None], (torch.arange(40) >= 20).float()[:, None]
    e2e = noise + first * torch.eye(8)[2] + second * torch.eye(8)[0]
    local = noise + first * torch.eye(8)[2] + second * torch.eye(8)[1]
    return study_of(
        write_legacy_run(tmp_path / "local", "local", local),
        write_legacy_run(tmp_path / "e2e", "e2e", e2e),
        write_legacy_run(tmp_path / "ds", "e2e+ds", random_decoder(40, seed=1)),
    )


def test_the_table_has_every_latent_of_both_runs_with_its_region(three_runs: Study):
    with console() as said:
        table = umaps.umap_table(three_runs)
    assert any("latents are shown without contexts" in line and "no_such_model" in line for line in said)
    assert set(table["pair"]) == {"e2e and local", "e2e+ds and local"}
    pair = table[table["pair"] == "e2e and local"]
    assert pair["run_type"].tolist() == ["e2e"] * 40 + ["local"] * 40
    assert pair["latent"].tolist() == [*range(40)] * 2
    directions = [torch.nn.functional.normalize(three_runs.stored(i).saes["blocks.0.hook_resid_pre"].tensors["W_dec"])
                  for i in (pair["id"].iloc[0], pair["id"].iloc[-1])]  # fmt: skip
    np.testing.assert_allclose(pair[["x", "y"]], torch.cat(directions)[:, :2], atol=1e-6)
    regions = pair["region"].to_numpy()
    assert set(regions[[*range(20), *range(40, 60)]]) - {0} == {3}, "half of either"
    assert {frozenset(regions[20:40]) - {0}, frozenset(regions[60:80]) - {0}} == {frozenset({1}), frozenset({2})}
    text = umaps.regions_text(pair)
    assert text["region"].tolist() == [1, 2, 3]
    counts = {
        r: [(pair["region"] == r).to_numpy()[half].sum() for half in (slice(40), slice(40, 80))] for r in (1, 2, 3)
    }
    assert text["latents"].tolist() == [f"{counts[r][0]} e2e, {counts[r][1]} local" for r in (1, 2, 3)]


def test_a_region_says_its_commonest_strongest_token_and_shows_the_most_active_members(three_runs: Study):
    table = umaps.umap_table(three_runs)
    inside = table[(table["pair"] == "e2e and local") & (table["region"] == 1)].reset_index(drop=True)
    n = len(inside)
    inside = inside.assign(
        activation=np.arange(n, dtype=float),
        token=[" at" if i < n - 3 else " by" for i in range(n)],
        token_position=7,
        context=[f"text {i}" for i in range(n)],
    )
    (row,) = umaps.regions_text(inside).to_dict("records")
    assert row["strongest token"] == f"' at' ({n - 4} of {n - 1})", "the first one was never active"
    assert row["at position"] == 7
    kind, last = inside["run_type"].iloc[-1], inside["latent"].iloc[-1]
    assert row["examples"].split("; ")[0] == f"{kind} {last}: text {n - 1}"
    assert len(row["examples"].split("; ")) == umaps.N_EXAMPLES


def test_the_figure_shows_each_pair_with_numbers_on_its_regions(three_runs: Study, tmp_path: Path):
    table = umaps.umap_table(three_runs)
    axes = umaps.draw_umaps(table).axes
    assert [" ".join(axis.get_title().split()) for axis in axes] == [
        "blocks.0.hook_resid_pre, e2e and local",
        "blocks.0.hook_resid_pre, e2e+ds and local",
    ]
    drawn = axes[0].collections[0].get_offsets()
    pair = table[table["pair"] == "e2e and local"]
    assert sorted(map(tuple, np.asarray(drawn))) == sorted(map(tuple, pair[["x", "y"]].to_numpy(dtype=float)))
    assert {text.get_text() for text in axes[0].texts} == {"1", "2", "3"}
    made = produce(three_runs, umaps.ANALYSES[:1], tmp_path / "out")["umap"]
    assert [path.name for path in made] == [f"umap.{kind}" for kind in ("csv", "md", "tex", "png", "svg")]


def test_what_it_wants_is_said(three_runs: Study, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    small = study_of(
        write_legacy_run(tmp_path / "small" / "local", "local", random_decoder(9)),
        write_legacy_run(tmp_path / "small" / "e2e", "e2e", random_decoder(9, seed=1)),
    )
    with pytest.raises(NotApplicable, match="at least 50 alive latents"):
        umaps.umap_table(small)
    with pytest.raises(NotApplicable, match="a local run and one of another type"):
        umaps.umap_table(study_of(Path(small.table["source"][0])))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(NotApplicable, match=r"the package umap-learn: pip install 'e2e_sae\[analysis\]'"):
        umaps.umap_table(three_runs)


def test_the_strongest_token_of_each_latent_is_where_it_is_most_active(
    tiny_folder: Callable[[str], Path], tmp_path: Path
):
    study = study_of(train_with_eval_data(tiny_folder("gpt2"), tmp_path), n_samples=5, batch_size=2)
    run_id = study.table["id"][0]
    model = study.open(run_id)
    (sae,) = model.saes_at().values()
    tokens, latents = [], []
    for batch in study.batches(run_id):
        tokens.append(batch.tokens)
        latents.append(sae.encode(run_clean(model.tlens_model, batch, [POINT]).at(POINT)).detach())
    ids, acts = torch.cat(tokens), torch.cat(latents).flatten(0, 1)
    wanted = torch.tensor([3, 30, 4])
    found = strongest.strongest_tokens(study, run_id, POINT, wanted)
    tokenizer: Any = model.tlens_model.tokenizer
    for n, latent in enumerate(wanted.tolist()):
        largest, place = acts[:, latent].max(0)
        assert found.activation[n] == pytest.approx(float(largest), rel=1e-5)
        if largest == 0:
            assert (found.token[n], found.token_position[n], found.context[n]) == ("", -1, "")
            continue
        row, at = divmod(int(place), N_CTX)
        token = tokenizer.decode([int(ids[row, at])]).replace("\n", "⏎")
        assert (found.token[n], found.token_position[n]) == (token, at)
        whole = tokenizer.decode(ids[row].tolist()).replace("\n", "⏎")
        assert found.context[n].replace("«", "").replace("»", "") in whole
        assert f"«{token}»" in found.context[n]


def test_points_are_coloured_by_their_cosine_with_the_first_principal_direction(
    tiny_folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(umaps, "MIN_LATENTS", 2)
    monkeypatch.setattr(umaps, "embedded", lambda points, seed: points[:, :2].copy())
    losses = {
        "local": {"sparsity": {"coeff": 0.1}, "out_to_in": {"coeff": 1.0}},
        "e2e": {"sparsity": {"coeff": 0.1}, "logits_kl": {"coeff": 1.0}},
    }
    for name in losses:
        (tmp_path / name).mkdir()
    runs = [train_with_eval_data(tiny_folder("gpt2"), tmp_path / name, loss=loss) for name, loss in losses.items()]
    study = study_of(*runs)
    table = umaps.first_direction_table(study)
    batches = study.batches(study.table["id"][0])
    clean = [run_clean(study.lm(study.stored(study.table["id"][0])), batch, [POINT]).at(POINT) for batch in batches]
    x = torch.cat(clean).detach().double()
    _, _, axes = torch.linalg.svd(x.flatten(0, 1) - x.flatten(0, 1).mean(0))
    axis = axes[0] * torch.sign(x[:, 0].mean(0) @ axes[0])
    assert table["run_type"].unique().tolist() == ["e2e", "local"]
    for run_id, points in table.groupby("id"):
        W_dec = study.stored(str(run_id)).saes[POINT].tensors["W_dec"].double()
        cosines = torch.nn.functional.cosine_similarity(W_dec, axis[None], dim=1)
        np.testing.assert_allclose(points["cos_first_direction"], cosines[points["latent"].tolist()], atol=1e-5)
    (ax, _) = umaps.draw_first_direction(table).axes
    assert sorted(ax.collections[0].get_array()) == sorted(table["cos_first_direction"])


def test_without_a_language_model_there_is_no_first_direction(three_runs: Study):
    with pytest.raises(NotApplicable, match="evaluation data, and their language model"):
        umaps.first_direction_table(three_runs)


@pytest.mark.slow
def test_umap_keeps_heaps_apart_and_gives_the_same_plane_for_the_same_seed():
    rng = np.random.default_rng(0)
    points = rng.normal(size=(120, 8)).astype(np.float32)
    points[:60] += 6
    xy = umaps.embedded(points, seed=1)
    assert np.array_equal(xy, umaps.embedded(points, seed=1))
    regions = umaps.regions_of(xy, np.arange(120) < 60)
    assert set(regions[:60]).isdisjoint(set(regions[60:]) - {umaps.OUTSIDE})
