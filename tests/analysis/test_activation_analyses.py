"""Analyses on activations from trained runs to files: what is compared, what is left out, what is kept in the cache."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from e2e_sae.analysis import agreement, compared, norms, principal_directions, resampled_directions
from e2e_sae.analysis import produce as produce_module
from e2e_sae.analysis.compared import compared_groups, labels
from e2e_sae.analysis.item import NotApplicable
from e2e_sae.analysis.looks import LINES, line_looks
from e2e_sae.analysis.produce import produce
from e2e_sae.analysis.runs import runs_table
from e2e_sae.analysis.study import Study
from e2e_sae.run_types import COLOURS
from e2e_sae.train import train
from tests.tiny_runs import E2E, LOCAL, console, run_config, write_rows

MODULES = (norms, principal_directions, resampled_directions, agreement)
ANALYSES = [analysis for module in MODULES for analysis in module.ANALYSES]
FIRST, SECOND = "blocks.1.hook_resid_pre", "blocks.2.hook_resid_pre"


@pytest.fixture(scope="module")
def runs(tiny_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder with an e2e run at two positions, a local one at one, and a transcoder."""
    out = tmp_path_factory.mktemp("runs")
    rows = write_rows(out / "rows.parquet", 12)
    data = {"eval_data": {"dataset_name": str(rows), "n_ctx": 8}, "eval_n_samples": 4, "n_samples": 4}
    over = {"saes": {"sae_positions": [{"read": "blocks.1.ln2.hook_normalized", "write": "blocks.1.hook_mlp_out"}]}}
    both = {"saes": {"sae_positions": [FIRST, SECOND]}}
    for name, changes in (
        ("e2e", {"loss": E2E, **both}),
        ("local", {"loss": LOCAL}),
        ("over", {"loss": LOCAL, **over}),
    ):
        train(run_config(tiny_folder("gpt2"), rows, out / name, wandb_run_name=name, **data, **changes))
    return out


def study_of(runs: Path, cache: Path, **options: Any) -> Study:
    return Study(runs_table([runs]), cache, n_samples=6, batch_size=2, device="cpu", **options)


def small_png(draw: Callable[[Any], Any], table: Any, stem: Path) -> list[Path]:
    """Saves a figure quickly."""
    import matplotlib.pyplot as plt

    figure = draw(table)
    figure.savefig(stem.with_suffix(".png"), dpi=20)
    plt.close(figure)
    return [stem.with_suffix(".png")]


class Produced(NamedTuple):
    """What `produce` did."""

    out: Path
    made: dict[str, list[Path]]
    said: list[str]


@pytest.fixture(scope="module")
def produced(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Produced:
    """Returns what all analyses made of the runs."""
    out = tmp_path_factory.mktemp("analysis")
    with pytest.MonkeyPatch.context() as patch, console() as said:
        patch.setattr(produce_module, "save_figure", small_png)
        patch.setattr(resampled_directions, "N_ROWS", 2)
        return Produced(out, produce(study_of(runs, out / "cache"), ANALYSES, out), said)


def test_everything_is_made_of_saes_and_transcoders_are_left_out(produced: Produced) -> None:
    import pandas as pd

    said = "\n".join(produced.said)
    assert "left out, it is a transcoder (blocks.1.ln2.hook_normalized -> blocks.1.hook_mlp_out)" in said
    assert "agreement: left out, tiny: it wants a tokenizer with common words as single tokens" in said
    assert produced.made["agreement"] == []
    for analysis in ANALYSES[:-1]:
        names = {path.name for path in produced.made[analysis.name]}
        figures = {f"{figure.name}.png" for figure in analysis.figures}
        assert figures | {f"{analysis.name}.csv"} <= names
        assert all(path.stat().st_size for path in produced.made[analysis.name])

    table: Any = pd.read_csv(produced.out / "norms.csv")
    places = [tuple(pair) for pair in table[["sae_pos", "label"]].drop_duplicates().to_numpy()]
    assert places == [(FIRST, "local"), (FIRST, "e2e"), (SECOND, "e2e")], "the paper's order"
    shown = norms.first_and_later(table, "ratio")
    own = table[(table["label"] == "local") & (table["measure"] == "mean")]
    ratios = own["ratio"].to_numpy()
    assert set(own["n"]) == {6}
    assert shown["position 0"][0] == pytest.approx(ratios[0])
    assert shown["later positions"][0] == pytest.approx(ratios[1:].mean())

    resampled = pd.read_csv(produced.out / "resampled_directions.csv")
    assert resampled.groupby("sae_pos").size().to_dict() == {FIRST: 16, SECOND: 16}, "one line a direction, not a run"


def test_what_is_in_the_cache_is_not_computed_again(
    runs: Path, produced: Produced, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pandas as pd

    monkeypatch.setattr(resampled_directions, "N_ROWS", 2)
    monkeypatch.setattr(Study, "open", None)
    monkeypatch.setattr(Study, "lm", None)
    study = study_of(runs, produced.out / "cache")
    for analysis in ANALYSES[:-1]:
        again, first = analysis.compute(study), pd.read_csv(produced.out / f"{analysis.name}.csv")
        pd.testing.assert_frame_equal(again, first, check_dtype=False)


def test_a_language_model_is_known_by_its_files_wherever_they_lie(
    runs: Path, tmp_path: Path, tiny_folder: Callable[[str], Path]
) -> None:
    copied = shutil.copytree(tiny_folder("gpt2"), tmp_path / "elsewhere")
    study, moved = study_of(runs, tmp_path), study_of(runs, tmp_path, overrides=[f"tlens_model_path={copied}"])
    run = study.stored(study.table["id"][0])
    assert study.lm_key(run) == moved.lm_key(run)
    with (copied / "config.json").open("a") as config:
        config.write(" ")
    assert study.lm_key(run) != study_of(runs, tmp_path, overrides=[f"tlens_model_path={copied}"]).lm_key(run)


def test_runs_evaluated_on_other_data_are_looked_at_on_the_first_ones(runs: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(runs, tmp_path / "runs")
    (config,) = copied.glob("e2e/*/final_config.yaml")
    rows = shutil.copy(runs / "rows.parquet", tmp_path / "other.parquet")
    config.write_text(config.read_text().replace(str(runs / "rows.parquet"), str(rows)))
    with console() as said:
        (group,) = compared_groups(study_of(copied, tmp_path))
    assert len(group.saes) == 3
    assert any("were evaluated on other data than" in line for line in said)


def test_runs_of_one_model_share_their_pass(runs: Path, tmp_path: Path) -> None:
    (group,) = compared_groups(study_of(runs, tmp_path))
    assert [(sae.point, sae.keys["label"]) for sae in group.saes] == [(FIRST, "local"), (FIRST, "e2e"), (SECOND, "e2e")]
    assert group.points == [FIRST, SECOND]
    groups = compared_groups(study_of(runs, tmp_path, overrides=["seed=5"]))
    assert len(groups) == 1, "another seed is another order of the same rows"


def test_many_runs_are_those_that_match(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compared, "FEW", 1)
    study = study_of(runs, tmp_path)
    monkeypatch.setattr(compared, "matched", lambda table, by: table[(table["sae_pos"] == FIRST) & (by == "CE")])
    (group,) = compared_groups(study)
    assert [sae.keys["label"] for sae in group.saes] == ["local", "e2e"]
    monkeypatch.setattr(compared, "matched", lambda table, by: table[:0])
    with pytest.raises(NotApplicable, match="at most 1 rows in runs.csv, or CE_increase and L0 to choose from them"):
        compared_groups(study)


def test_transcoders_alone_are_not_applicable(runs: Path, tmp_path: Path) -> None:
    study = study_of(runs, tmp_path)
    study.table = study.table[study.table["sae_pos"] == "blocks.1.hook_mlp_out"]
    with pytest.raises(NotApplicable, match="wants SAEs that write where they read"):
        norms.norms_table(study)


def test_labels_say_no_more_than_is_needed() -> None:
    place = {"model_name": "m", "sae_pos": "p", "L0": 16.2, "seed": 0}
    rows = [
        {**place, "kind": "local", "id": "a"},
        {**place, "kind": "e2e", "id": "b"},
        {**place, "kind": "e2e", "id": "c", "L0": 31.7},
        {**place, "kind": "ds", "id": "d"},
        {**place, "kind": "ds", "id": "e", "seed": 1},
        {**place, "kind": "e2e", "id": "f", "sae_pos": "q"},
        {**place, "kind": "mix", "id": "g"},
        {**place, "kind": "mix", "id": "h"},
    ]
    assert labels(rows) == [
        "local", "e2e, L0 16", "e2e, L0 32", "ds, L0 16, seed 0", "ds, L0 16, seed 1", "e2e", "mix, g", "mix, h"
    ]  # fmt: skip


def test_lines_of_many_saes_differ() -> None:
    import pandas as pd

    kinds = [*COLOURS, "local then e2e"]
    pairs = [(f"{architecture} {kind}".strip(), kind) for architecture in ["", *"abcdefg"] for kind in kinds]
    looks = line_looks(pd.DataFrame(pairs, columns=["label", "run_type"]))
    assert len(looks) == 32
    assert len({(look["color"], str(look["linestyle"])) for look in looks.values()}) == 32
    assert all(looks[label]["color"] == COLOURS[kind] for label, kind in pairs if kind in COLOURS)
    assert looks["a local"]["linestyle"] == looks["a e2e"]["linestyle"] != LINES[0] == looks["e2e"]["linestyle"]
