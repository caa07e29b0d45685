"""`e2e-sae demo` on the embedded model, a few steps each: the table is the log's, the figure is drawn."""

from pathlib import Path

import pytest

from e2e_sae import demo
from e2e_sae.demo import COLOURS, RUNS, DemoRow, demo_dir, run_demo, table
from e2e_sae.errors import MissingFileError
from e2e_sae.trackers import read_metrics


def test_the_demo_trains_three_saes_and_shows_what_their_logs_say(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level("INFO", logger="e2e_sae")
    rows = run_demo(tmp_path, overrides=["n_samples=32", "eval_n_samples=16", "act_frequency_n_tokens=2000"])
    assert [row.kind for row in rows] == list(RUNS) == list(COLOURS)
    for row in rows:
        last = read_metrics(row.run_dir / "metrics.jsonl")[-1]
        assert row.ce_increase == last["performance/eval/ce_increase"]
        assert row.kl == last["loss/eval/logits_kl"]
        assert row.ev_here == last["quality/eval/explained_variance/blocks.2.hook_resid_pre"]
        assert row.ev_by_layer[3] == last["quality/eval/explained_variance/blocks.3.hook_resid_post"]
        # The embedded model is a good one: its held-out cross-entropy is far below the unigram entropy of 6.35 nats.
        assert last["performance/eval/orig_model_ce_loss"] < 3.0
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert table(rows) in caplog.messages


def test_the_table_is_aligned():
    rows = [
        DemoRow(kind, l0, 10, 0.1, 0.1, 0.9, {2: 0.8, 3: 0.75}, 1234.5, Path())
        for kind, l0 in [("local", 7.0), ("e2e+ds", 123.4)]
    ]
    lines = table(rows).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[1].split() == ["local", "7.0", "10", "0.100", "0.100", "0.900", "0.750", "1,234"]
    assert lines[2].split()[1] == "123.4"


def _package_at(folder: Path, *demos: Path) -> Path:
    """Makes empty demo folders and returns the place of an imagined `e2e_sae/demo.py` in `folder`."""
    for place in demos:
        (place / "stdlib_gpt2").mkdir(parents=True)
    return folder / "e2e_sae" / "demo.py"


def test_an_installed_demo_comes_before_a_folder_demos_beside_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    shipped, beside = tmp_path / "e2e_sae" / "demos", tmp_path / "demos"
    monkeypatch.setattr(demo, "REPO_ROOT", tmp_path)
    monkeypatch.setattr(demo, "__file__", str(_package_at(tmp_path, beside)))
    assert demo_dir() == beside
    _package_at(tmp_path, shipped)
    assert demo_dir() == shipped


def test_another_packages_folder_demos_is_not_taken_for_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "demos").mkdir()
    monkeypatch.setattr(demo, "REPO_ROOT", tmp_path)
    monkeypatch.setattr(demo, "__file__", str(_package_at(tmp_path)))
    with pytest.raises(MissingFileError, match="the demo's files are in neither .*: install e2e_sae again"):
        run_demo(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_clones_demo_dir_holds_what_the_demo_runs(repo: Path):
    assert demo_dir() == repo / "demos"
    assert all((demo_dir() / file).is_file() for file in RUNS.values())
