"""Similarity of dictionaries from run folders: tables against plain computations, figures against their tables."""

from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from e2e_sae.analysis import dictionaries, geometry
from e2e_sae.analysis.bootstrap import mean_difference
from e2e_sae.analysis.item import NotApplicable
from e2e_sae.analysis.produce import produce
from tests.analysis.tiny_studies import random_decoder, study_of, write_legacy_run

KINDS = ("local", "e2e", "e2e+ds")
SIZES = {"local": 30, "e2e": 20, "e2e+ds": 25}


@pytest.fixture(autouse=True)
def closed_figures() -> Iterator[None]:
    """Nothing is left open behind a test."""
    yield
    plt.close("all")


def decoder(kind: str, seed: int = 0) -> Tensor:
    """Returns a run's decoder."""
    return random_decoder(SIZES[kind], seed=10 * KINDS.index(kind) + seed)


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """One run of each type at each of two layers."""
    return [
        write_legacy_run(tmp_path / f"{kind}_{layer}", kind, decoder(kind, layer), layer=layer)
        for layer in (1, 0)
        for kind in reversed(KINDS)
    ]


def unit(W_dec: Tensor) -> np.ndarray:
    """Returns the rows divided by their norm, in float64."""
    rows = W_dec.double().numpy()
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def largest_within(W_dec: Tensor) -> np.ndarray:
    """Returns the largest cosine of each row with any other one."""
    cosines = unit(W_dec) @ unit(W_dec).T
    np.fill_diagonal(cosines, -2)
    return cosines.max(1)


def histogram(cosines: np.ndarray) -> np.ndarray:
    """Returns the share in each of the bins."""
    return np.histogram(cosines.clip(0, 1), bins=geometry.N_BINS, range=(0, 1))[0] / len(cosines)


def only(table: Any, **wanted: Any) -> Any:
    """Returns the rows with these values."""
    for column, value in wanted.items():
        table = table[table[column] == value]
    return table


def test_similarity_within_is_that_of_all_cosines_and_its_difference_the_bootstraps(runs: list[Path]):
    table = geometry.within_table(study_of(*runs, seed=3))
    assert len(table) == 6 * geometry.N_BINS
    for layer in (0, 1):
        local = largest_within(decoder("local", layer))
        for kind in KINDS:
            own = only(table, layer=layer, kind=kind)
            cosines = largest_within(decoder(kind, layer))
            np.testing.assert_allclose(own["share"], histogram(cosines), atol=1e-9)
            assert set(own["n_alive"]) == {SIZES[kind]}
            np.testing.assert_allclose(own["mean"], cosines.mean(), atol=1e-6)
            found = own[["difference", "low", "high"]].iloc[0]
            if kind == "local":
                assert found.isna().all()
            else:
                np.testing.assert_allclose(found.astype(float), mean_difference(local, cosines, seed=3), atol=1e-5)
    text = geometry.within_text(table)
    assert list(text.columns) == ["SAE at", "kind", "alive", "mean", "local - it", "95 % interval"]
    assert text["SAE at"].tolist() == ["blocks.0.hook_resid_pre"] * 3 + ["blocks.1.hook_resid_pre"] * 3
    assert text["kind"].tolist() == list(KINDS) * 2
    assert text["95 % interval"].isna().tolist() == [True, False, False] * 2
    low, high = (float(end) for end in text["95 % interval"].iloc[1].split(" to "))
    assert low < text["local - it"].iloc[1] < high


def test_without_a_local_run_there_are_means_and_no_differences(tmp_path: Path):
    study = study_of(write_legacy_run(tmp_path / "run", "e2e", decoder("e2e")))
    text = geometry.within_text(geometry.within_table(study))
    assert list(text.columns) == ["SAE at", "kind", "alive", "mean"]
    np.testing.assert_allclose(text["mean"], largest_within(decoder("e2e")).mean(), atol=1e-6)


def test_dead_latents_do_not_count(runs: list[Path], monkeypatch: pytest.MonkeyPatch):
    masks = {"local": torch.arange(30) % 2 == 0, "e2e": torch.arange(20) < 1, "e2e+ds": torch.arange(25) > 4}
    study = study_of(*runs[:2:-1])
    kinds = dict(zip(study.table["id"], study.table["kind"], strict=True))
    monkeypatch.setattr(dictionaries, "alive", lambda _study, run_id, _position: masks[kinds[run_id]])
    table = geometry.within_table(study)
    for kind in ("local", "e2e+ds"):
        own = largest_within(decoder(kind)[masks[kind]])
        np.testing.assert_allclose(only(table, kind=kind)["mean"], own.mean(), atol=1e-6)
    assert "e2e" not in set(table["kind"]), "one latent has no other one"
    local, e2e, _ = (dictionaries.dictionary(study, i, "blocks.0.hook_resid_pre") for i in kinds)
    found = dictionaries.across(study, local, e2e)
    assert not set(found.nearest.tolist()) - {0}
    assert set(found.nearest_back.tolist()) <= set(range(0, 30, 2))
    assert found.pairs.shape == (1, 2)


def test_similarity_across_types_is_each_ones_with_local(runs: list[Path]):
    table = geometry.types_table(study_of(*runs))
    assert set(table["kind"]) == {"e2e", "e2e+ds"}
    for layer in (0, 1):
        for kind in ("e2e", "e2e+ds"):
            own = only(table, layer=layer, kind=kind)
            check_across(own, decoder(kind, layer), decoder("local", layer))
    text = geometry.across_text(table)
    assert len(text) == 4
    assert text["kind"].tolist() == ["e2e", "e2e+ds"] * 2


def check_across(own: Any, A: Tensor, B: Tensor) -> None:
    """Checks what a table says of two dictionaries."""
    cosines = unit(A) @ unit(B).T
    np.testing.assert_allclose(own["share_largest"], histogram(cosines.max(1)), atol=1e-9)
    np.testing.assert_allclose(own["mean_largest"], cosines.max(1).mean(), atol=1e-6)
    paired = cosines[linear_sum_assignment(cosines, maximize=True)]
    np.testing.assert_allclose(own["share_one_to_one"], histogram(paired), atol=1e-9)
    np.testing.assert_allclose(own["mean_one_to_one"], paired.mean(), atol=1e-6)
    n_used = len(set(cosines.argmax(1)))
    np.testing.assert_allclose(own["share_used_again"], 1 - n_used / len(A))


def test_seeds_are_compared_where_nothing_else_differs(tmp_path: Path):
    folders = [
        write_legacy_run(tmp_path / f"local_{seed}", "local", decoder("local", seed), seed=seed) for seed in (2, 0, 1)
    ]
    other = {"sparsity": {"p_norm": 1.0, "coeff": 3.0}}
    folders.append(write_legacy_run(tmp_path / "sparser", "local", decoder("local", 3), seed=3, loss=other))
    folders.append(write_legacy_run(tmp_path / "e2e", "e2e", decoder("e2e"), seed=1))
    table = geometry.seeds_table(study_of(*folders))
    assert set(table["kind"]) == {"local"}
    pairs = table[["seed_a", "seed_b"]].drop_duplicates()
    assert list(map(tuple, pairs.to_numpy())) == list(combinations(range(3), 2))
    for a, b in combinations(range(3), 2):
        check_across(only(table, seed_a=a, seed_b=b), decoder("local", a), decoder("local", b))
    assert table["shown"].all()
    assert geometry.across_text(table)["seeds"].tolist() == ["0, 1", "0, 2", "1, 2"]


def test_pairs_of_seeds_that_are_named_are_the_ones_compared(tmp_path: Path):
    folders = [
        write_legacy_run(tmp_path / f"local_{seed}", "local", decoder("local", seed), seed=seed) for seed in range(3)
    ]
    study = study_of(*folders)
    study.table["seed_pair"] = study.table["seed"].map({0: 0, 2: 0})
    table = geometry.seeds_table(study)
    assert table[["seed_a", "seed_b", "shown"]].drop_duplicates().to_numpy().tolist() == [[0, 2, True]]
    check_across(table, decoder("local", 0), decoder("local", 2))


def test_all_runs_are_shown_against_what_is_known_of_them(tmp_path: Path):
    folders = [
        write_legacy_run(tmp_path / f"{kind}_{seed}", kind, decoder(kind, seed), seed=seed)
        for kind in KINDS
        for seed in (0, 1)
    ]
    study = study_of(*folders)
    table = geometry.sparsity_table(study)
    assert len(table) == 6
    for row in table.itertuples():
        np.testing.assert_allclose(row.mean, largest_within(decoder(row.kind, row.seed)).mean(), atol=1e-6)
    # The paper's files alone do not say their L0 and CE increase.
    (axis,) = geometry.draw_against_sparsity(table).axes
    assert axis.get_xlabel() == "alive dictionary elements"
    drawn = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axis.lines}
    for kind in KINDS:
        own = only(table, kind=kind)
        assert drawn[kind] == (own["n_alive"].tolist(), own["mean"].tolist())
    measured = table.assign(L0=range(6), CE_increase=0.1)
    assert len(geometry.draw_against_sparsity(measured).axes) == 3


@pytest.mark.parametrize("computed", ["within_table", "types_table"])
def test_several_runs_of_a_kind_need_a_ce_increase_to_be_matched(tmp_path: Path, computed: str):
    folders = [
        write_legacy_run(tmp_path / f"local_{n}", "local", decoder("local"), loss={"sparsity": {"coeff": n + 1.0}})
        for n in (0, 1)
    ]
    with pytest.raises(NotApplicable, match="wants one run of each kind, or runs whose CE increase is known"):
        getattr(geometry, computed)(study_of(*folders))


def test_of_several_seeds_the_first_one_is_compared_where_nothing_else_differs(tmp_path: Path):
    folders = [
        write_legacy_run(tmp_path / f"{kind}_{seed}", kind, decoder(kind, seed), seed=seed)
        for kind in ("local", "e2e")
        for seed in (1, 0)
    ]
    check_across(geometry.types_table(study_of(*folders)), decoder("e2e", 0), decoder("local", 0))


def test_runs_that_match_at_equal_ce_increase_are_compared(tmp_path: Path):
    folders = [
        write_legacy_run(tmp_path / f"{kind}_{n}", kind, decoder(kind, n), loss={"sparsity": {"coeff": n + 1.0}})
        for kind in ("local", "e2e")
        for n in (0, 1, 2)
    ]
    study = study_of(*folders)
    increases = {"local": (0.1, 0.2, 0.3), "e2e": (0.15, 0.21, 0.4)}
    study.table["CE_increase"] = [value for kind in ("local", "e2e") for value in increases[kind]]
    study.table["L0"] = 10.0
    table = geometry.types_table(study)
    check_across(table, decoder("e2e", 1), decoder("local", 1))


def test_what_an_analysis_wants_is_said(tmp_path: Path):
    study = study_of(write_legacy_run(tmp_path / "run", "e2e", decoder("e2e")))
    for compute, wanted in (
        (geometry.types_table, "a local run and one of another type"),
        (geometry.seeds_table, "equal in everything but their seed"),
        (geometry.sparsity_table, "several runs of a kind"),
    ):
        with pytest.raises(NotApplicable, match=wanted):
            compute(study)


def stairs(axis: Any) -> dict[str, np.ndarray]:
    """Returns the heights of the histograms of a panel by label."""
    return {patch.get_label(): patch.get_data().values for patch in axis.patches}


def test_histograms_show_the_table_in_percent_a_panel_for_each_place(runs: list[Path]):
    table = geometry.within_table(study_of(*runs))
    axes = geometry.draw_within(table).axes
    assert [axis.get_title() for axis in axes] == ["blocks.0.hook_resid_pre", "blocks.1.hook_resid_pre"]
    for layer, axis in enumerate(axes):
        drawn = stairs(axis)
        assert list(drawn) == list(KINDS)
        for kind in KINDS:
            np.testing.assert_allclose(drawn[kind], 100 * only(table, layer=layer, kind=kind)["share"])


def test_a_figure_of_pairs_shows_their_mean_and_one_to_one_beside_it(tmp_path: Path):
    folders = [
        write_legacy_run(tmp_path / f"local_{seed}", "local", decoder("local", seed), seed=seed) for seed in range(3)
    ]
    table = geometry.seeds_table(study_of(*folders))
    hidden = table.assign(shown=False, share_largest=1.0)
    (axis,) = geometry.draw_across(pd.concat([table, hidden])).axes
    drawn = stairs(axis)
    assert list(drawn) == ["local", "local, one to one"]
    for label, column in (("local", "share_largest"), ("local, one to one", "share_one_to_one")):
        expected = table[column].to_numpy().reshape(3, -1).mean(0)
        np.testing.assert_allclose(drawn[label], 100 * expected)


def test_nothing_is_computed_twice(runs: list[Path], monkeypatch: pytest.MonkeyPatch):
    tables = [compute(study_of(*runs)) for compute in (geometry.within_table, geometry.types_table)]
    for name in ("nearest_others", "nearest_both", "one_to_one"):
        monkeypatch.setattr(dictionaries, name, None)
    again = [compute(study_of(*runs)) for compute in (geometry.within_table, geometry.types_table)]
    for table, other in zip(tables, again, strict=True):
        assert table.equals(other)
    torch.save({}, runs[0].parent / "unrelated.pt")
    changed = write_legacy_run(runs[0].parent / "changed", "e2e", decoder("e2e", 5))
    with pytest.raises(TypeError):
        geometry.within_table(study_of(changed))


def test_everything_is_written(runs: list[Path], tmp_path: Path):
    made = produce(study_of(*runs), geometry.ANALYSES, tmp_path / "out")
    names = {name: sorted(path.name for path in files) for name, files in made.items()}
    for name in ("within_similarity", "cross_type_similarity"):
        assert names[name] == [f"{name}.{kind}" for kind in ("csv", "md", "png", "svg", "tex")]
    assert names["cross_seed_similarity"] == names["within_similarity_all"] == []
