"""The evidence: its sweeps plan the whole grid, and its report says of each run what it was and what it cost."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.evidence import BY_K, BY_PENALTY, START, Grid, Model, demo, recipes, write_sweeps
from benchmarks.evidence_report import evidence_table, of_lengths, reach, write_report
from e2e_sae.analysis.runs import runs_table
from e2e_sae.checkpoint.records import CheckpointInfo, StoredModel, StoredSAEInfo
from e2e_sae.errors import UserError
from e2e_sae.sweeps.sweep_file import read_sweep
from tests.sweeps.test_plan import runs_of

LATER = ["blocks.3.hook_resid_post"]
PLACE = "blocks.2.hook_resid_pre"


@pytest.fixture(scope="module")
def model() -> Model:
    return demo()


def finished(config: Any, folder: Path, ce: float, l0: float, **timing: float) -> None:
    """Writes what a finished run leaves."""
    folder.mkdir(parents=True)
    (folder / "final_config.yaml").write_text(yaml.safe_dump(config.to_dict()))
    summary = {
        f"sparsity/L_0_final/{PLACE}": l0,
        f"sparsity/alive_dict_elements_final/{PLACE}": 900,
        "performance/eval/ce_increase": ce,
        "loss/eval/logits_kl": 0.2,
        f"quality/eval/explained_variance/{PLACE}": 0.9,
        "quality/eval/explained_variance/blocks.2.hook_resid_post": 0.85,
        "quality/eval/explained_variance/blocks.3.hook_resid_post": 0.8,
        "samples": config.n_samples,
        "total_tokens": config.n_samples * 128,
        "firing_data": "held-out data",
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    # Of a checkpoint only what says which SAE it holds is read.
    sae = StoredSAEInfo(architecture=config.saes.sae.architecture, read=PLACE, write=PLACE, d_in=128, d_sae=1024)
    lm = StoredModel(
        model_class="bridge", processing=None, dtype="float32", d_model=128, n_layers=4, d_vocab=512, path="lm"
    )
    info = CheckpointInfo(
        library_version="0", n_samples=config.n_samples, n_steps=1, model=lm, saes={PLACE: sae},
        firing_data="held-out data", firing_n_tokens=1, files={},
    )  # fmt: skip
    checkpoint = folder / f"samples_{config.n_samples}"
    checkpoint.mkdir()
    (checkpoint / "checkpoint.json").write_text(json.dumps(info.to_dict()))
    if timing:
        (folder / "timing.json").write_text(json.dumps(timing))


def test_the_sweeps_are_every_architecture_in_every_recipe_at_every_l0(model: Model, tmp_path: Path) -> None:
    sweeps = write_sweeps(model, tmp_path / "evidence", Grid())
    runs = [run.config for path in sweeps for run in runs_of(path)]
    assert len(runs) == (len(BY_K) + len(BY_PENALTY)) * 3 * len(START)
    asked: set[tuple[Any, ...]] = set()
    for n, config in enumerate(runs):
        sae, final = config.saes.sae, config.final_loss
        own: Any = sae
        finished(config, tmp_path / "runs" / str(n), 1.0, 1.0)
        l0 = final.sparsity.target_l0 or (own.ks[-1] if sae.architecture == "hierarchical_topk" else own.k)
        assert (final.sparsity.target_l0 is not None) == (sae.architecture in BY_PENALTY)
        assert config.saes.d_sae == 1024
        assert config.batch_size * 128 == 1024
        assert config.n_samples == 3200
        asked.add((sae.architecture, l0))
    assert asked == {(kind, l0) for l0 in (16, 32, 64) for kind in [*BY_K, *BY_PENALTY]}
    assert START.keys() == recipes(LATER).keys()
    table = evidence_table([tmp_path / "runs"])
    found = {(row.recipe, row.architecture, row.l0_wanted) for row in table.itertuples()}
    assert found == {(recipe, *pair) for recipe in START for pair in asked}


def test_what_is_chosen_is_what_is_swept(model: Model, tmp_path: Path) -> None:
    (sweep,) = write_sweeps(model, tmp_path, Grid(["e2e"], ["topk"], seeds=[0, 1, 2]))
    assert len(runs_of(sweep)) == 3 * 3
    assert read_sweep(sweep).config.name == "e2e_k"
    short, long = write_sweeps(model, tmp_path / "lengths", Grid(["local"], ["topk"], [32], tokens=[102_400, 204_800]))
    assert [run.config.n_samples for path in (short, long) for run in runs_of(path)] == [800, 1600]
    with pytest.raises(UserError, match="'top' is no architecture of the grid: expected topk, batch_topk"):
        write_sweeps(model, tmp_path, Grid(architectures=["top"]))
    with pytest.raises(UserError, match=r"'e2e_ds' is no recipe of the grid: expected local, e2e, e2e\+ds"):
        write_sweeps(model, tmp_path, Grid(["e2e_ds"]))


def test_the_report_of_a_grid_with_seeds(model: Model, tmp_path: Path) -> None:
    grid = Grid(["local", "local then KL"], ["relu"], seeds=[0, 1])
    configs = [run.config for path in write_sweeps(model, tmp_path / "evidence", grid) for run in runs_of(path)]
    assert len(configs) == 12
    for n, config in enumerate(configs):
        wanted, is_first = config.final_loss.sparsity.target_l0, config.seed == 0
        assert wanted is not None
        ce = (10 if config.phases else 20) / wanted + (0 if is_first else 0.1)
        finished(config, tmp_path / "runs" / str(n), ce, wanted - 1)
    files = {file.name: file for file in write_report([tmp_path / "runs"], tmp_path / "out")}
    assert files.keys() == {"evidence.csv", "grid.md", "grid.png", "grid.svg", "seeds.md"}
    assert files["grid.png"].read_bytes().startswith(b"\x89PNG")
    lines = files["grid.md"].read_text().splitlines()
    assert lines[0] == "| architecture | local | local then KL |"
    assert lines[2] == "| relu | 1.250 (15), 0.625 (31), 0.312 (63) | 0.625 (15), 0.312 (31), 0.156 (63) |"
    lines = files["seeds.md"].read_text().splitlines()
    # Means of c and c + 0.1, whose standard deviation is 0.1 / sqrt(2); from the lowest on.
    assert lines[2].startswith(
        "| relu | local then KL | 64 | 2 | 63.0 ± 0.0 | 0.206 ± 0.071 | 900 ± 0 | 0.90 ± 0.00 | 0.80"
    )
    assert len(lines) == 8


def test_the_report_of_lengths(model: Model, tmp_path: Path) -> None:
    grid = Grid(["local", "e2e+ds"], ["relu"], [32], tokens=[102_400, 204_800, 409_600])
    configs = [run.config for path in write_sweeps(model, tmp_path / "evidence", grid) for run in runs_of(path)]
    for n, config in enumerate(configs):
        assert config.n_samples is not None
        is_local = config.final_loss.logits_kl is None
        million = config.n_samples * 128 / 1e6
        ce, cost = (0.04 / million, 10.0) if is_local else (0.16 / million, 30.0)
        # What a token costs is only known from a run that was trained alone: the shortest one here.
        alone = million < 0.11
        seconds = cost * million if alone else 1.0
        timing = {"seconds": seconds, "members": 1 if alone else 8, "tokens_per_second": 1}
        finished(config, tmp_path / "runs" / str(n), ce, 32, **timing)
    lengths = of_lengths(evidence_table([tmp_path / "runs"]))
    assert len(lengths) == 6
    assert lengths["seconds"].tolist() == pytest.approx([3.072, 6.144, 12.288, 1.024, 2.048, 4.096])
    files = {file.name: file for file in write_report([tmp_path / "runs"], tmp_path / "out")}
    lines = files["lengths.md"].read_text().splitlines()
    assert lines[2:] == [
        # 0.16 / 0.4096 = 0.391 is reached by the local runs at a quarter of the tokens, which cost a third each.
        "| relu, e2e+ds | 30 | 1.562 | 0.781 | 0.391 | 1.00 | 1.00 |",
        "| relu, local | 10 | 0.391 | 0.195 | 0.098 | < 0.25 | < 0.08 |",
    ]
    assert files["lengths.png"].read_bytes().startswith(b"\x89PNG")


def test_where_a_curve_comes_down_to_a_value() -> None:
    x, ce = [1.0, 4.0, 16.0], [1.0, 0.25, 0.0625]
    assert reach(x, ce, 0.5) == pytest.approx(2.0)
    assert reach(x, ce, 0.0625) == pytest.approx(16.0)
    assert reach(x, ce, 1.0) == -1.0
    assert math.isnan(reach(x, ce, 0.01))


def test_runs_of_all_recipes_have_a_name(model: Model, tmp_path: Path) -> None:
    configs = [
        run.config for path in write_sweeps(model, tmp_path / "e", Grid([], ["topk"], [32])) for run in runs_of(path)
    ]
    for n, config in enumerate(configs):
        finished(config, tmp_path / "runs" / str(n), 1.0, 32)
    assert set(runs_table([str(tmp_path / "runs")])["run_type"]) == {
        "local", "e2e", "e2e+ds", "e2e+local", "local then e2e+local",
    }  # fmt: skip
