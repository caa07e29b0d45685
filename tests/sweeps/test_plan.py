"""From a sweep file to its runs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from e2e_sae.base_config import deep_update
from e2e_sae.config import Config
from e2e_sae.errors import MissingFileError, UserError
from e2e_sae.sweeps.plan import PlannedRun, plan_sweep
from e2e_sae.sweeps.run_folder import RunFolder
from e2e_sae.sweeps.sweep_file import read_sweep
from tests.sweeps.conftest import SweepFile
from tests.tiny_runs import console

NOT_KNOWN: Callable[[PlannedRun], None] = lambda run: None  # noqa: E731


def runs_of(file: Path, overrides: list[str] | None = None, count: int | None = None) -> list[PlannedRun]:
    plan = plan_sweep(read_sweep(file, count), overrides or [], NOT_KNOWN, file.parent / "points.json")
    return list(plan.runs)


def coeffs(*values: float) -> dict[str, Any]:
    return {"loss": {"parameters": {"sparsity": {"parameters": {"coeff": {"values": list(values)}}}}}}


# --- merging ---


def test_a_runs_settings_are_the_base_with_its_nested_values_over_it(
    sweep_file: SweepFile, base_values: dict[str, Any]
) -> None:
    file = sweep_file(parameters={**coeffs(0.5, 2), "lr": {"value": "5e-3"}, "seed": {"values": [3, 4]}})
    runs = runs_of(file)
    assert [run.varied for run in runs] == [{"loss.sparsity.coeff": c, "seed": s} for c in (0.5, 2) for s in (3, 4)]
    expected = deep_update(base_values, {"loss": {"sparsity": {"coeff": 2}}, "lr": 0.005, "seed": 3, "save_dir": None})
    assert runs[2].config == Config.from_dict(expected)
    assert runs[2].label == "sweep sparsity.coeff=2 seed=3"


TOPK, BATCH = {"architecture": "topk", "k": 3}, {"architecture": "batch_topk", "k": 3}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([TOPK, BATCH, {"architecture": "relu"}], ["topk", "batch_topk", "relu"]),
        ([TOPK, {**TOPK, "k": 4}, {"architecture": "relu"}], ["topk k=3", "topk k=4", "relu"]),
        ([TOPK, {**TOPK, "k": 4}], ["sae.k=3", "sae.k=4"]),
        ([TOPK, {**TOPK, "skip": True}, BATCH], ["topk", "topk skip=True", "batch_topk"]),
        (
            [{"architecture": "hierarchical_topk", "ks": ks} for ks in ([1, 2], [2, 3])] + [TOPK],
            ["hierarchical_topk ks=1+2", "hierarchical_topk ks=2+3", "topk"],
        ),
    ],
)
def test_of_a_mapping_the_label_has_what_tells_it_from_the_sweeps_other_values(
    sweep_file: SweepFile, values: list[Any], expected: list[str]
) -> None:
    sae = {"saes": {"parameters": {"sae": {"values": values}}}}
    runs = runs_of(sweep_file(parameters=sae))
    assert [run.label for run in runs] == [f"sweep {label}" for label in expected]
    # The same sweep has the same labels, also where it has got no further than its first run; so has each folder.
    first, *_ = runs_of(sweep_file(parameters=sae), count=1)
    assert (first.label, first.key) == (runs[0].label, runs[0].key)
    names = [RunFolder.of(run, Path("out")).path.name for run in runs]
    assert names[0] == f"sweep_{expected[0].replace(' ', '_')}_{runs[0].key}"


def test_terms_that_are_there_or_not_have_short_labels_too(sweep_file: SweepFile) -> None:
    terms = [None, {"coeff": 1.5}, {"coeff": 2, "position_fraction": 0.5}]
    kl = {"loss": {"parameters": {"logits_kl": {"values": terms}}}}
    labels = [run.label for run in runs_of(sweep_file(parameters=kl))]
    assert labels == [
        "sweep loss.logits_kl=None",
        "sweep logits_kl.coeff=1.5",
        "sweep logits_kl.coeff=2 logits_kl.position_fraction=0.5",
    ]


def test_an_old_key_in_a_sweep_wins_over_todays_key_in_the_base(sweep_file: SweepFile) -> None:
    old = {
        "loss": {"parameters": {"inp_to_out": {"value": {"coeff": 7.0}}}},
        "sae_position_name": {"value": "blocks.2"},
    }
    (run,) = runs_of(sweep_file(parameters=old))
    assert run.config.loss.out_to_in is not None
    assert run.config.loss.out_to_in.coeff == 7.0
    assert run.config.saes.sae_positions == ["blocks.2"]


def test_paths_in_the_base_and_in_the_sweep_count_from_the_bases_folder(
    sweep_file: SweepFile, base_values: dict[str, Any], tmp_path: Path
) -> None:
    base_values["train_data"]["dataset_name"] = "rows.parquet"
    (tmp_path / "other.parquet").touch()
    names = {"train_data": {"parameters": {"dataset_name": {"values": ["rows.parquet", "other.parquet"]}}}}
    runs = runs_of(sweep_file(base=base_values, parameters=names))
    assert [run.config.train_data.dataset_name for run in runs] == [
        str(tmp_path / "rows.parquet"), str(tmp_path / "other.parquet"),
    ]  # fmt: skip


def test_wandb_is_off_unless_it_is_asked_for(sweep_file: SweepFile, base_values: dict[str, Any]) -> None:
    file = sweep_file(base={**base_values, "wandb_project": "p"}, parameters={"seed": {"value": 1}})
    assert runs_of(file)[0].config.wandb_project is None
    assert runs_of(file, ["wandb_project=q"])[0].config.wandb_project == "q"


def test_overrides_change_every_run_but_not_what_the_sweep_varies(sweep_file: SweepFile) -> None:
    file = sweep_file(parameters={**coeffs(1, 2), "lr": {"value": 0.1}})
    assert [run.config.lr for run in runs_of(file, ["lr=0.2"])] == [0.2, 0.2]
    for override in ("loss.sparsity.coeff=3", "loss={}"):
        with pytest.raises(UserError, match=f"--set {override}: .* varies 'loss.sparsity.coeff'"):
            runs_of(file, [override])
    with pytest.raises(UserError, match="--set save_dir: .* which --out names"):
        runs_of(file, ["save_dir=x"])


def test_the_base_is_looked_for_beside_the_sweep_then_here_then_above_it(
    sweep_file: SweepFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = sweep_file().read_text()
    here, deep = tmp_path / "here", tmp_path / "a" / "b"
    for folder in (here, deep):
        folder.mkdir(parents=True)
    (deep / "s.yaml").write_text(sweep)
    monkeypatch.chdir(here)
    assert read_sweep(deep / "s.yaml").base_file == tmp_path / "base.yaml"
    for place in (here, deep):
        (place / "base.yaml").write_text((tmp_path / "base.yaml").read_text())
        assert read_sweep(deep / "s.yaml").base_file == place / "base.yaml"


# --- which runs ---


def test_the_same_settings_are_one_run_and_have_one_key_whatever_else_varies(sweep_file: SweepFile) -> None:
    twice = runs_of(sweep_file(parameters={"lr": {"values": ["1e-2", 0.01, 0.02]}}))
    assert [run.config.lr for run in twice] == [0.01, 0.02]
    other = runs_of(sweep_file(name="other", parameters={"lr": {"value": 0.02}, "wandb_run_name": {"value": "x"}}))
    assert other[0].key == twice[1].key != twice[0].key


def test_limits_take_the_first_runs(sweep_file: SweepFile) -> None:
    file = sweep_file(parameters={"seed": {"values": [5, 4, 3, 2]}}, run_cap=3)
    assert [run.config.seed for run in runs_of(file)] == [5, 4, 3]
    assert [run.config.seed for run in runs_of(file, count=2)] == [5, 4]


def test_more_random_runs_keep_the_first_ones(sweep_file: SweepFile) -> None:
    lr = {"lr": {"distribution": "log_uniform_values", "min": 1e-4, "max": 1e-2}}
    few = runs_of(sweep_file(method="random", parameters=lr, run_cap=3))
    more = runs_of(sweep_file(method="random", parameters={**lr, "seed": {"min": 0, "max": 9}}, run_cap=5))
    assert [run.config.lr for run in more[:3]] == [run.config.lr for run in few]
    assert len({run.config.lr for run in more}) == 5
    assert all(1e-4 < run.config.lr < 1e-2 for run in more)


def test_bayes_asks_for_results_and_repeats_its_choices_from_its_memory(sweep_file: SweepFile, tmp_path: Path) -> None:
    lr = {"lr": {"min": 0.1, "max": 1.1}}
    file = sweep_file(method="bayes", parameters=lr, run_cap=6, metric={"name": "loss"})
    memory, asked = tmp_path / "points.json", []

    def cost(run: PlannedRun) -> float:
        asked.append(run.config.lr)
        return (run.config.lr - 0.2) ** 2

    first = [run.config.lr for run in plan_sweep(read_sweep(file), [], cost, memory).runs]
    assert len(set(first)) == 6
    assert set(asked) == set(first[:-1])
    asked.clear()
    assert [run.config.lr for run in plan_sweep(read_sweep(file), [], cost, memory).runs] == first
    assert asked == []
    changed = sweep_file(method="bayes", parameters={"lr": {"min": 0.1, "max": 2}}, run_cap=6, metric={"name": "loss"})
    assert [run.config.lr for run in plan_sweep(read_sweep(changed), [], cost, memory).runs] != first


def test_the_demos_sweeps_and_the_papers_are_whole(repo: Path) -> None:
    scripts = repo / "e2e_sae" / "scripts" / "train_tlens_saes"
    for name in ("local", "e2e", "e2e_ds"):
        runs = runs_of(repo / "demos" / "sweeps" / f"{name}.yaml")
        assert [run.type for run in runs] == [name.replace("_", "+")] * 3
    n_runs = {file.stem: len(runs_of(file)) for file in scripts.glob("*_sweep.yaml")}
    # seeds x coefficients; coefficients x weights; rates x coefficients x sizes
    assert n_runs["gpt2_local_sweep"] == 2 * 7
    assert n_runs["gpt2_e2e_recon_sweep"] == 3 * 2
    assert n_runs["tinystories_1M_e2e_sweep"] == 3 * 3 * 2


# --- mistakes ---


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"methd": "grid"}, "unknown config key 'methd'. Did you mean 'method'"),
        ({"method": "gird"}, "config key 'method'"),
        ({"parameters": None}, "missing config key 'parameters'"),
        ({"parameters": {"lr": {"min": 0.1, "max": 1}}}, "parameter 'lr': a grid needs `values`"),
        ({"method": "random"}, "method random goes on for ever: set run_cap, or give --count N"),
        ({"method": "bayes", "run_cap": 3}, "method bayes needs a metric"),
        ({"command": None}, "its command names no YAML file, expected the one base config"),
        ({"command": ["a.yaml", "b.yaml"]}, "names 2 YAML files .a.yaml, b.yaml., expected the one"),
        ({"parameters": {"lrr": {"value": 1}}}, "run with the one run, on 'base.yaml': unknown config key 'lrr'"),
        ({"parameters": coeffs(1, -2)}, "run with loss.sparsity.coeff=-2, on 'base.yaml': config key 'loss.sparsity.c"),
    ],
)
def test_a_wrong_sweep_is_told_in_one_line(sweep_file: SweepFile, changes: dict[str, Any], words: str) -> None:
    file = sweep_file(**changes)
    with pytest.raises(UserError, match=f"sweep '{file}'.*{words}") as caught:
        runs_of(file)
    assert "\n" not in str(caught.value)


def test_a_missing_program_or_base_is_told_with_where_it_was_looked_for(sweep_file: SweepFile, tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match=f"its program 'no.py' does not exist .looked in '{tmp_path}'"):
        runs_of(sweep_file(program="no.py"))
    with pytest.raises(MissingFileError, match="its base config 'no.yaml' does not exist"):
        runs_of(sweep_file(command=["no.yaml"]))


def test_early_terminate_is_taken_with_a_note(sweep_file: SweepFile) -> None:
    with console() as said:
        assert len(runs_of(sweep_file(early_terminate={"type": "hyperband", "min_iter": 3}))) == 2
    assert any("early_terminate" in line and "every run goes to its end" in line for line in said)


def test_a_sweep_is_what_wandb_writes_too(sweep_file: SweepFile) -> None:
    values = yaml.safe_load(sweep_file().read_text())
    extras = {
        "name": "n",
        "description": "d",
        "project": "p",
        "entity": "e",
        "metric": {"name": "loss", "goal": "maximize"},
    }
    assert len(runs_of(sweep_file(**{**values, **extras}))) == 2
