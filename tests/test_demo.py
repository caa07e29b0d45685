"""`e2e-sae demo` on the embedded model, a few steps each: the table is the log's, the figure is drawn."""

from pathlib import Path

import pytest

from e2e_sae.demo import COLOURS, RUNS, DemoRow, run_demo, table
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


def test_without_the_repository_the_demo_says_so(tmp_path: Path):
    with pytest.raises(MissingFileError, match="the demo needs the repository, see README.md"):
        run_demo(tmp_path, demo_dir=tmp_path / "nowhere")
