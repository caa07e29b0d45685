"""The benchmark of geometry on small dictionaries, and, slowly, its bound at the paper's size."""

import json
from pathlib import Path

import pytest

from benchmarks.geometry import LAYERS, LOSSES, main, make, measure
from e2e_sae.analysis.runs import runs_table


def test_the_runs_are_the_papers_nine(tmp_path: Path):
    folders = make(tmp_path, d_sae=20, d_in=4)
    table = runs_table([tmp_path])
    assert len(folders) == len(table) == 9
    assert set(zip(table["layer"], table["kind"], strict=True)) == {
        (layer, kind) for layer in LAYERS for kind in LOSSES
    }
    assert set(table["d_sae"]) == {20}
    weights = folders[0] / "samples_400000.pt"
    before = weights.stat().st_mtime_ns
    make(tmp_path, d_sae=20, d_in=4)
    assert weights.stat().st_mtime_ns == before, "what is there is not written again"


@pytest.mark.slow
def test_every_analysis_is_measured_in_a_process_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    main(["make", str(tmp_path / "runs"), "--runs", "2", "--d-sae", "64", "--d-in", "8"])
    capsys.readouterr()
    main(["measure", str(tmp_path / "runs")])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["analysis"] for line in lines] == ["within_similarity", "cross_type_similarity"]
    assert all(50 < line["peak_mb"] < 1500 and line["seconds"] > 0 for line in lines)
    out = tmp_path / "runs_out"
    assert (out / "within_similarity.csv").is_file()
    assert (out / "cross_type_similarity.png").is_file()


@pytest.mark.slow
def test_two_dictionaries_of_the_papers_size_take_less_than_two_gigabytes(tmp_path: Path):
    make(tmp_path / "runs", n_runs=2)
    for found in measure(tmp_path / "runs", device="cpu"):
        assert found["peak_mb"] < 2000, found
