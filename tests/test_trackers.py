import json
import math
from pathlib import Path

import pytest

from e2e_sae.trackers import JsonlTracker, cut_back, read_metrics


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
