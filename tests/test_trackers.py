import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from e2e_sae.trackers import JsonlTracker, WandbTracker, cut_back, read_metrics
from tests.tiny_runs import console


def test_a_line_is_on_disk_as_soon_as_it_is_logged(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tracker = JsonlTracker(path)
    tracker.log({"samples": 2, "loss": 1.5})
    assert path.read_text() == '{"samples": 2, "loss": 1.5}\n'
    tracker.log({"samples": 4, "loss": 1.25})
    assert read_metrics(path) == [{"samples": 2, "loss": 1.5}, {"samples": 4, "loss": 1.25}]
    tracker.close()


def test_what_is_not_finite_becomes_null_at_any_depth(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tracker = JsonlTracker(path)
    tracker.log({"samples": 2, "a": math.nan, "b": math.inf, "h": {"edges": [-math.inf, 0.0], "counts": [3]}})
    tracker.close()
    # Strict JSON: Python's own reader would take NaN and Infinity.
    line = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert line == {"samples": 2, "a": None, "b": None, "h": {"edges": [None, 0.0], "counts": [3]}}


def test_a_log_is_appended_to(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"samples": 2}\n')
    tracker = JsonlTracker(path)
    tracker.log({"samples": 4})
    tracker.close()
    assert [line["samples"] for line in read_metrics(path)] == [2, 4]


def test_cutting_back_drops_later_lines_and_a_line_that_is_not_whole(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"samples": 2}\n{"samples": 4}\n{"samples": 6}\n{"samp')
    cut_back(path, 4)
    assert path.read_text() == '{"samples": 2}\n{"samples": 4}\n'
    cut_back(path, 0)
    assert path.read_text() == ""
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_cutting_back_a_log_that_never_was_does_nothing(tmp_path: Path) -> None:
    cut_back(tmp_path / "metrics.jsonl", 4)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def offline_wandb(in_tmp_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(in_tmp_dir))
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("HOME", str(in_tmp_dir))
    wandb.teardown()  # it keeps the settings of whatever came before
    yield in_tmp_dir
    wandb.teardown()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # W&B's own
def test_wandb_takes_lines_histograms_and_checkpoints_offline_and_its_trouble_is_only_counted(
    offline_wandb: Path,
) -> None:
    tracker = WandbTracker("project", "name", {"lr": 1.0})
    tracker.log({"samples": 2, "loss": 1.5, "hist": {"edges": [0.0, 1.0], "counts": [3]}})
    run = offline_wandb / "run"
    checkpoint = run / "samples_2"
    checkpoint.mkdir(parents=True)
    for file in (run / "final_config.yaml", checkpoint / "resume.pt", checkpoint / "sae.safetensors"):
        file.write_text("content")
    tracker.save(checkpoint)
    uploaded = {p.name for p in (offline_wandb / "wandb").rglob("files/**/*") if p.is_file() or p.is_symlink()}
    assert {"final_config.yaml", "sae.safetensors"} <= uploaded
    assert "resume.pt" not in uploaded

    real_run = tracker._run

    class LineIsDown:
        def log(self, *_: Any, **__: Any) -> None:
            raise ConnectionError("the line is down")

        def finish(self) -> None:
            real_run.finish()

    tracker._run = LineIsDown()
    tracker.log({"samples": 4, "loss": 1.0})
    with console() as said:
        tracker.close()
    assert said == ["W&B: 1 calls failed; everything is in the run folder"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # W&B's own
def test_without_a_wandb_login_the_run_goes_on_without_wandb(
    offline_wandb: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")
    with console() as said:
        tracker = WandbTracker("project", "name", {})
        tracker.log({"samples": 2, "loss": 1.5})
        tracker.save(offline_wandb)
        tracker.close()
    assert "W&B could not be started" in said[0]
    assert "the run goes on without it" in said[0]
    assert len(said) == 1
