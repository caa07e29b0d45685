"""The table and the figure of a sweep, from summaries written by hand."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from e2e_sae.config import Config
from e2e_sae.sweeps.plan import PlannedRun
from e2e_sae.sweeps.report import describe, draw_pareto, note_missing, save_table, table_text
from e2e_sae.sweeps.run_folder import RunFolder
from tests.sweeps.conftest import SweepFile
from tests.sweeps.test_plan import coeffs, runs_of
from tests.tiny_runs import console

A, B = "blocks.1.hook_resid_pre", "blocks.2.hook_resid_pre"


def finish(run: PlannedRun, sweep_dir: Path, positions: list[str], **values: Any) -> None:
    """Writes what a finished run leaves; `l0`, `alive` and `ev` are lists, one number for each position."""
    folder = RunFolder.of(run, sweep_dir)
    folder.prepare(run)
    (folder.path / "r").mkdir()
    (folder.path / "r" / "final_config.yaml").touch()
    names = {"l0": "sparsity/L_0_final", "alive": "sparsity/alive_dict_elements_final"}
    names |= {"ev": "quality/eval/explained_variance"}
    summary: dict[str, Any] = {"samples": 8}
    for key, stem in names.items():
        summary |= {f"{stem}/{p}": n for p, n in zip(positions, values.get(key, []), strict=key != "ev")}
    for key, name in {"ce": "performance/eval/ce_increase", "kl": "loss/eval/logits_kl"}.items():
        if key in values:
            summary[name] = values[key]
    (folder.path / "r" / "summary.json").write_text(json.dumps(summary))


def as_config(run: PlannedRun, **changes: Any) -> PlannedRun:
    return run._replace(config=Config.from_dict({**run.config.to_dict(), **changes}))


def test_a_row_has_the_sums_over_positions_the_mean_variance_and_blanks_where_there_is_nothing(
    sweep_file: SweepFile, tmp_path: Path
) -> None:
    runs = runs_of(sweep_file(parameters=coeffs(1, 2, 3, 4)))
    finish(runs[0], tmp_path, [A, B], l0=[10.5, 2.0], alive=[30, 31], ev=[0.5, 0.75], ce=0.25, kl=0.125)
    finish(runs[1], tmp_path, [A], l0=[8.0], alive=[20])
    finish(runs[2], tmp_path, [A], l0=[7.0], alive=[20], ce=None, kl=None)
    path = save_table(runs, tmp_path)
    table = pd.read_csv(path)
    assert table["position"].tolist() == [f"{A} + {B}", A, A, A]
    assert table["loss.sparsity.coeff"].tolist() == [1, 2, 3, 4]
    assert table["status"].tolist() == ["finished", "finished", "finished", "not started"]
    first = table.iloc[0]
    assert (first["l0"], first["alive"], first["explained_variance"]) == (12.5, 61, 0.625)
    assert (first["ce_increase"], first["kl"], first["samples"]) == (0.25, 0.125, 8)
    assert table["ce_increase"].isna().tolist() == [False, True, True, True]
    assert table["l0"].isna().tolist() == [False, False, False, True]
    lines = [line.split() for line in table_text(path).splitlines()]
    assert lines[1][:9] == ["sweep", "local", "1", "12.5", "61", "0.250", "0.125", "0.625", "8"]
    assert lines[2][2:6] == ["2", "8.0", "20", "8"]
    with console() as said:
        note_missing(path)
    assert said[0].startswith("note: 2 finished runs have no evaluation")
    assert describe(runs[1], RunFolder.of(runs[1], tmp_path)) == "sweep sparsity.coeff=2: L0 8.0, 20 alive"


def test_a_value_that_only_some_sweeps_vary_is_filled_in_for_all(sweep_file: SweepFile, tmp_path: Path) -> None:
    runs = [
        *runs_of(sweep_file(name="a", parameters={"lr": {"values": [0.5, 0.25]}})),
        *runs_of(sweep_file(name="b", parameters=coeffs(3, 4))),
    ]
    table = pd.read_csv(save_table(runs, tmp_path))
    assert table["lr"].tolist() == [0.5, 0.25, 0.01, 0.01]
    assert table["loss.sparsity.coeff"].tolist() == [0.1, 0.1, 3, 4]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that are made, left open."""
    import matplotlib.pyplot as plt

    figures: list[Any] = []
    monkeypatch.setattr(plt, "close", lambda figure=None: figures.append(figure))
    return figures


def test_the_figure_is_made_from_the_table_alone(
    sweep_file: SweepFile, base_values: dict[str, Any], tmp_path: Path, drawn: list[Any]
) -> None:
    local = runs_of(sweep_file(name="a", parameters=coeffs(1, 2, 3)))
    base_values["loss"] = {"sparsity": {"coeff": 1}, "logits_kl": {"coeff": 1.0}}
    e2e = runs_of(sweep_file(name="b", base=base_values, parameters=coeffs(0.5)))
    for n, run in enumerate(local):
        # Not in the order of L0: the line is to be.
        finish(run, tmp_path, [A], l0=[[20.0, 40.0, 30.0][n]], alive=[50 - n], ce=[0.3, 0.1, 0.2][n])
    finish(e2e[0], tmp_path, [A], l0=[25.0], alive=[40], ce=0.05)
    table = save_table([*local, *e2e], tmp_path)
    moved = tmp_path / "elsewhere" / "sweep.csv"
    moved.parent.mkdir()
    table.rename(moved)
    assert draw_pareto(moved, moved.parent / "pareto.png")
    assert (moved.parent / "pareto.png").read_bytes().startswith(b"\x89PNG")
    (figure,) = drawn
    left, right = figure.axes
    lines = {line.get_label(): line for line in left.lines}
    assert list(lines) == ["local", "e2e"]
    assert lines["local"].get_xydata().tolist() == [[20.0, 0.3], [30.0, 0.2], [40.0, 0.1]]
    assert lines["e2e"].get_xydata().tolist() == [[25.0, 0.05]]
    assert right.lines[0].get_xydata().tolist() == [[50, 0.3], [48, 0.2], [49, 0.1]]
    assert sorted(text.get_text() for text in left.texts) == ["0.5", "1", "2", "3"]
    bottom, top = left.get_ylim()
    assert bottom > 0.3 > 0.0 >= top, "less cost is higher"
    assert [text.get_text() for text in figure.legends[0].texts] == ["local", "e2e"]


def test_what_a_grid_varies_besides_sparsity_makes_lines_and_positions_make_panels(
    sweep_file: SweepFile, tmp_path: Path, drawn: list[Any]
) -> None:
    parameters = {
        **coeffs(1, 2),
        "lr": {"values": [0.1, 0.2]},
        "saes": {"parameters": {"sae_positions": {"values": [A, B]}}},
    }
    runs = runs_of(sweep_file(parameters=parameters))
    for run in runs:
        finish(run, tmp_path, [str(p) for p in run.config.saes.sae_positions], l0=[5.0], alive=[9], ce=0.1)
    assert draw_pareto(save_table(runs, tmp_path), tmp_path / "p.png")
    assert len(drawn[0].axes) == 4
    assert [line.get_label() for line in drawn[0].axes[0].lines] == ["local, lr=0.1", "local, lr=0.2"]
    styles = [(line.get_color(), line.get_linestyle()) for line in drawn[0].axes[0].lines]
    assert styles[0][0] == styles[1][0]
    assert styles[0][1] != styles[1][1]


def test_how_sparse_saes_are_to_be_runs_along_the_lines_whatever_says_it(
    sweep_file: SweepFile, tmp_path: Path, drawn: list[Any]
) -> None:
    def grid(name: str, loss: dict[str, Any], sae: Any) -> list[PlannedRun]:
        parameters = {"saes": {"parameters": {"sae": {"values": sae}}}, "loss": {"parameters": {"sparsity": loss}}}
        return runs_of(sweep_file(name=name, parameters=parameters))

    targets = {"parameters": {"target_l0": {"values": [4, 8]}}}
    kinds = [{"architecture": "topk", "k": k} for k in (2, 4)] + [{"architecture": "hierarchical_topk", "ks": [2, 4]}]
    runs = [
        *grid("a", {"value": {"coeff": 0}}, kinds),
        *grid("b", targets, [{"architecture": "gated"}, {"architecture": "relu"}]),
    ]
    for n, run in enumerate(runs):
        finish(run, tmp_path, [A], l0=[5.0 + n], alive=[9], ce=0.1)
    path = save_table(runs, tmp_path)
    table = pd.read_csv(path, dtype=str)
    assert table["saes.sae"].tolist() == ["topk k=2", "topk k=4", "hierarchical_topk", *["gated", "relu"] * 2]
    assert table["number"].tolist() == ["2", "4", "0", "4", "4", "8", "8"]
    lines = ["topk", "topk", "hierarchical_topk", "gated", "relu", "gated", "relu"]
    assert table["line"].tolist() == [f"local, {line}" for line in lines]
    assert "number" not in table_text(path)
    draw_pareto(path, tmp_path / "p.png")
    assert [len(line.get_xydata()) for line in drawn[0].axes[0].lines] == [2, 1, 2, 2]


def test_dozens_of_lines_look_all_different_and_leave_room_for_the_panels(tmp_path: Path, drawn: list[Any]) -> None:
    """Warnings are errors here."""
    kinds = ["local", "e2e", "e2e+ds", "local then e2e+local"]
    table = pd.DataFrame(
        {"type": kind, "line": f"{kind}, an_architecture_with_a_name k={n}", "position": position, "is_joined": True}
        | {"l0": 10.0 + n + x, "alive": 100 + x, "ce_increase": 1 / (1 + n + x), "number": n}
        for kind in kinds
        for n in range(10)
        for position in (A, B)
        for x in range(3)
    )
    table.to_csv(tmp_path / "sweep.csv", index=False)
    assert draw_pareto(tmp_path / "sweep.csv", tmp_path / "pareto.png")
    (figure,) = drawn
    looks = {(line.get_color(), line.get_linestyle(), line.get_marker()) for line in figure.axes[0].lines}
    assert len(looks) == 40
    assert len(figure.legends[0].texts) == 40
    for ax in figure.axes:
        assert ax.get_window_extent().height > 2.5 * figure.dpi
        assert not ax.texts
    legend = figure.legends[0].get_window_extent()
    assert legend.x0 >= 0
    assert legend.x1 <= figure.bbox.x1
    assert legend.y1 < min(ax.get_tightbbox().y0 for ax in figure.axes) + 5  # text is not as large at every resolution


def test_random_runs_are_points_and_sweeps_of_one_type_are_told_apart(
    sweep_file: SweepFile, tmp_path: Path, drawn: list[Any]
) -> None:
    spread = {"lr": {"min": 0.1, "max": 0.2}}
    runs = [
        *runs_of(sweep_file(name="a", method="random", run_cap=2, parameters=spread)),
        *runs_of(sweep_file(name="b", parameters=coeffs(1, 2))),
    ]
    for run in runs:
        finish(run, tmp_path, [A], l0=[5.0], alive=[9], ce=0.1)
    draw_pareto(save_table(runs, tmp_path), tmp_path / "p.png")
    looks = {line.get_label(): line.get_linestyle() for line in drawn[0].axes[0].lines}
    assert list(looks) == ["a: local", "b: local"]
    assert looks["a: local"] == "None"
    assert looks["b: local"] != "None"


def test_without_an_evaluation_there_is_no_figure(sweep_file: SweepFile, tmp_path: Path) -> None:
    (run,) = runs_of(sweep_file(parameters=coeffs(1)))
    assert not draw_pareto(save_table([run], tmp_path), tmp_path / "p.png")
    assert not (tmp_path / "p.png").exists()
