"""The paper's runs: the file that names them, and what is made of a project like theirs."""

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from e2e_sae.analysis.matching import main_runs, matched
from e2e_sae.analysis.paper import FILE, PaperProject, PaperRuns, chosen_as_published, published_colours
from e2e_sae.run_types import COLOURS
from e2e_sae.scripts.cli import main
from tests.analysis.run_tables import runs, table_of
from tests.wandb_client import as_client
from tests.wandb_server import WandbServer


def test_the_file_names_a_run_of_each_type_at_each_layer() -> None:
    paper = PaperRuns.from_file(FILE)
    gpt2 = paper.projects[0]
    assert set(gpt2.matched) == {"CE", "L0", "alive"}
    for by_block in gpt2.matched.values():
        assert set(by_block) == {2, 6, 10}
        assert all(set(ids) == set(COLOURS) == set(paper.colours) for ids in by_block.values())
    run_ids = [run_id for by_block in gpt2.matched.values() for ids in by_block.values() for run_id in ids.values()]
    assert all(len(run_id) == 8 and run_id.isalnum() for run_id in run_ids)
    # Three rows are the same runs in tables 2 and 3 (appendix A of the paper).
    both = {(block, kind) for block, ids in gpt2.matched["CE"].items() for kind in ids}
    same = {(b, kind) for b, kind in both if gpt2.matched["CE"][b][kind] == gpt2.matched["L0"][b][kind]}
    assert same == {(6, "e2e+ds"), (10, "e2e"), (10, "e2e+ds")}


def project(**changes: Any) -> PaperProject:
    values: dict[str, Any] = {
        "project": "a/b",
        "max_L0": 50,
        "main": [{"ratio": 60, "seed": 0}],
        "max_main_L0": {2: 25},
        "words": ["comparison"],
        "matched": {"CE": {2: {"local": "chosen", "e2e": "other"}}},
    }
    return PaperProject.from_dict({**values, **changes})


def test_a_projects_runs_are_chosen_as_published() -> None:
    table = table_of(
        runs("local", [(10.0, 1.0)]),
        runs("local", [(20.0, 0.5)], id="chosen", ratio=5.0),
        runs("local", [(30.0, 0.4)]),  # too dense for the layer
        runs("local", [(30.0, 0.4)], layer=6, sae_pos="blocks.6.hook_resid_pre"),
        runs("local", [(60.0, 0.1)]),  # left out
        runs("e2e", [(10.0, 0.6)], name="lr-comparison 3"),
        runs("e2e", [(12.0, 0.5)], seed=1),
        runs("e2e", [(14.0, 0.6)], id="other"),
        runs("e2e", [(15.0, 0.5)]),
    )
    found = chosen_as_published(table, project())
    assert found["L0"].max() == 30
    assert found["is_main"].tolist() == [True, True, False, True, False, False, True, True]
    assert found[found["matched_CE"]]["id"].tolist() == ["chosen", "other"]
    pairs = chosen_as_published(table, project(seed_pairs=[("chosen", "left_out"), ("other", "elsewhere")]))
    assert pairs.dropna(subset=["seed_pair"])[["id", "seed_pair"]].to_numpy().tolist() == [["chosen", 0], ["other", 1]]
    assert len(main_runs(found)) == 5
    assert matched(found, "CE")["id"].tolist()[:2] == ["chosen", "other"]


def test_any_of_several_lines_makes_a_run_a_main_one() -> None:
    table = table_of(runs("local", [(10.0, 1.0)], lr=0.01), runs("e2e", [(10.0, 1.0)], lr=0.01))
    lines = [{"run_type": "local", "lr": 0.01}, {"run_type": "e2e", "lr": 0.001}]
    assert chosen_as_published(table, project(main=lines))["is_main"].tolist() == [True, False]


def test_the_published_colours_are_for_the_block_alone() -> None:
    ours = dict(COLOURS)
    with published_colours(PaperRuns.from_file(FILE)):
        assert COLOURS == {"local": "#f0a70a", "e2e": "#518c31", "e2e+ds": "#6b6ecf"}
    assert ours == COLOURS


def test_without_wandb_the_papers_runs_are_one_clear_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with as_client(tmp_path, "http://127.0.0.1:9"):
        assert main(["analyse", "--paper", "--only", "pareto"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: W&B cannot be reached (no connection to http://127.0.0.1:9)")
    assert main(["analyse", "--paper", "runs"]) == 2
    assert "--paper stands for the paper's runs: leave out runs" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore")  # W&B's own
def test_the_papers_runs_become_its_figures(tmp_path: Path) -> None:
    point = "blocks.6.hook_resid_pre"
    local, e2e = {"out_to_in": {"coeff": 1.0}}, {"logits_kl": {"coeff": 1.0}}
    served = [
        ("sparsify/gpt2/1jy3m5j0", local, 400_000, 69.4, -0.145),
        ("sparsify/gpt2/zgdpkafo", e2e, 400_000, 27.5, -0.144),
        ("sparsify/gpt2/toodense", e2e, 400_000, 800.0, -0.001),
        ("sparsify/gpt2/shortone", e2e, 50_000, 30.0, -0.2),
        ("sparsify/tinystories-1m-2/aaaaaaaa", local, 1, 10.0, -0.3),
    ]
    with WandbServer() as server, as_client(tmp_path, server.url):
        for path, terms, n_samples, l0, ce in served:
            run = server.add_run(path, {})
            saes = {"sae_positions": [point], "dict_size_to_input_ratio": 60}
            loss = {"sparsity": {"coeff": 3.0}, **terms}
            config = {"tlens_model_name": "gpt2-small", "lr": 5e-4, "seed": 0, "n_samples": n_samples}
            run.config = {key: {"value": value} for key, value in {**config, "saes": saes, "loss": loss}.items()}
            run.summary = {"performance/eval/difference_ce_loss": ce, f"sparsity/eval/L_0/{point}": l0}
            run.summary[f"sparsity/alive_dict_elements/{point}"] = 26_000
        assert (
            main(["analyse", "--paper", "--only", "pareto", "--only", "matched_ce", "--out", str(tmp_path / "out")])
            == 0
        )
    assert len(pd.read_csv(tmp_path / "out" / "runs.csv")) == 4
    assert pd.read_csv(tmp_path / "out" / "pareto.csv")["id"].tolist() == ["1jy3m5j0", "zgdpkafo"]
    table = (tmp_path / "out" / "matched_ce.md").read_text().splitlines()
    assert table[2:] == [
        f"| {point} | local | λ = 3 | 69.4 | 26000 | – | 0.145 |",
        f"| {point} | e2e | λ = 3 | 27.5 | 26000 | – | 0.144 |",
    ]
    assert "#518c31" in (tmp_path / "out" / "pareto.svg").read_text()
