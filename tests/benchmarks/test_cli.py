"""The benchmarks' command line: tiny cases through the real program."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import growth, memory
from benchmarks.cases import CASES, CORE, choose
from benchmarks.cli import main
from benchmarks.figure import draw
from benchmarks.growth import SERIES, grow
from benchmarks.measure import Settings
from benchmarks.results import Results
from benchmarks.shapes import GPT2_SMALL, STORIES, gpt2_style, with_model
from e2e_sae.errors import UserError
from e2e_sae.scripts.cli import main as command

TINY = gpt2_style("tiny", 2, 16, 2, d_vocab=64, n_ctx=8, batch_size=2, layer=1, d_sae=32)
FEW = ["--rounds", "1", "--context", "8", "--rows", "2", "--device", "cpu"]


def run(*arguments: str) -> int:
    return main(arguments)


def test_a_case_is_measured_printed_and_written(
    tiny_folder: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    file = tmp_path / "results.json"
    code = run("demo-e2e+ds", *FEW, "--model", str(tiny_folder("llama")), "--json", str(file), "--set", "lr=0.002")
    assert code == 0, capsys.readouterr().err
    head, line = capsys.readouterr().out.splitlines()
    assert head.split()[:3] == ["case", "ours", "plain"]
    assert line.startswith("demo-e2e+ds")
    document = json.loads(file.read_text())
    (result,) = document["results"]
    assert document["machine"]["device"] == "cpu"
    assert document["settings"] == {
        "products": "float32", "overrides": {"lr": 0.002}, "rounds": 1, "steps_per_round": 1, "twin_rows": None
    }  # fmt: skip
    assert result["shape"]["style"] == "llama"
    assert result["shape"]["d_vocab"] == 50
    assert result["tokens_per_s"] == pytest.approx(16 / result["seconds"]["ours"])
    assert result["ratio"] == pytest.approx(result["seconds"]["twin"] / result["seconds"]["ours"])
    assert result["share_of_floor"] == pytest.approx(result["floor_seconds"] / result["seconds"]["ours"])


def test_members_are_measured_beside_one(
    tiny_folder: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    file = tmp_path / "results.json"
    assert run("demo-local-x8", *FEW, "--model", str(tiny_folder("gpt2")), "--json", str(file)) == 0
    (result,) = json.loads(file.read_text())["results"]
    assert result["times_one"] == pytest.approx(result["seconds"]["ours"] / result["seconds"]["one"])
    assert 1 < result["floor_times_one"] < 8
    assert "8 members" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["gpt3"], "no case is called 'gpt3'"),
        (["demo-e2e-ds"], "Did you mean 'demo-e2e+ds'"),
        (["growth", "layers"], "Did you mean 'layer'"),
        (["growth", "--model", "somewhere"], "leave --model out"),
        (["figure"], "figure needs one FILE"),
        (["figure", "nowhere.json"], "nowhere.json"),
        (["demo-local", "--json", "nowhere/results.json"], "the folder 'nowhere' does not exist"),
        (["demo-local", "--set", "lr"], "override 'lr' is malformed"),
        (["demo-local", "--model", "nowhere"], "no Hugging Face model folder"),
    ],
)
def test_mistakes_are_told_in_one_line_before_anything_is_measured(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str], in_tmp_dir: Path
):
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert words in error
    assert len(error.splitlines()) == 1


def test_counts_are_positive_whole_numbers(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit, match="2"):
        run("demo-local", "--rounds", "0")
    assert "'0' is no positive whole number" in capsys.readouterr().err


def test_cases_are_chosen_by_name_pattern_or_core():
    assert list(choose([])) == CORE
    assert list(choose(["gpt2-L6-*-46080"])) == [f"gpt2-L6-{kind}-46080" for kind in ("local", "e2e", "e2e+ds")]
    assert {case.n_members for name, case in CASES.items() if name.endswith("-x8")} == {8}


def test_a_models_own_sizes_are_measured(tiny_folder: Callable[[str], Path], shared: Path):
    shape = with_model(GPT2_SMALL._replace(layer=2, n_ctx=16), tiny_folder("gpt2"))
    assert (shape.n_layers, shape.d_model, shape.d_mlp, shape.d_vocab, shape.layer) == (3, 16, 64, 50, 2)
    with pytest.raises(UserError, match="3 blocks: no SAE fits before block 6"):
        with_model(GPT2_SMALL, tiny_folder("gpt2"))
    with pytest.raises(UserError, match="rows of 16 tokens at most, not 256"):
        with_model(GPT2_SMALL._replace(layer=2), tiny_folder("gpt2"))
    with pytest.raises(UserError, match="'gpt_neox' model are not known here"):
        with_model(GPT2_SMALL, tiny_folder("neox"))
    stories = with_model(STORIES, shared / "data" / "lm" / "stories260K")
    assert stories == STORIES._replace(name="stories260K", folder=stories.folder)


def test_results_are_on_disk_after_each_case(tmp_path: Path):
    results = Results(Settings(overrides=("autocast=bfloat16",)), tmp_path / "results.json")
    for n in (1, 2):
        results.add({"case": f"case {n}"})
        document = json.loads((tmp_path / "results.json").read_text())
        assert [entry["case"] for entry in document["results"]] == ["case 1", "case 2"][:n]
        assert document["settings"]["products"] == "bfloat16"
    assert {"commit", "processor", "threads", "torch", "transformer_lens"} <= document["machine"].keys()


def test_growth_gives_a_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(SERIES, "latents", SERIES["latents"]._replace(values=(32, 64)))
    monkeypatch.setitem(SERIES, "members", SERIES["members"]._replace(values=(1, 2), kinds=("local",)))
    results = Results(Settings(n_rounds=1), tmp_path / "growth.json")
    for entry in grow(["latents", "members"], Settings(n_rounds=1), TINY):
        results.add(entry)
    assert [entry["shape"]["d_sae"] for entry in results.entries[:2]] == [32, 64]
    assert [entry["members"] for entry in results.entries[2:]] == [1, 2]
    assert run("figure", str(tmp_path / "growth.json")) == 0
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")
    Results(Settings(), tmp_path / "empty.json").add({"case": "demo"})
    with pytest.raises(UserError, match="holds no series"):
        draw(tmp_path / "empty.json", tmp_path / "empty.png")
    assert not (tmp_path / "empty.png").exists()


def test_every_series_changes_what_it_says():
    for name, series in growth.SERIES.items():
        cases = [series.case(GPT2_SMALL, value) for value in series.values]
        changed = {
            "latents": [c.shape.d_sae for c in cases],
            "vocabulary": [c.shape.d_vocab for c in cases],
            "context": [c.shape.n_ctx for c in cases],
            "layer": [c.shape.layer for c in cases],
            "members": [c.n_members for c in cases],
        }[name]
        assert tuple(changed) == series.values


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
@pytest.mark.smoke
def test_memory_of_a_step_is_measured_in_a_process_of_its_own():
    # Two matrices of 2^23 numbers: 64 MB of weights, as much of gradients, twice as much of Adam's moments.
    large = TINY._replace(d_sae=2**18, d_model=32, d_mlp=128)
    taken = memory.peak_of(large, "local", "ours", "cpu")
    assert taken.set_up_peak_mb >= taken.resident_mb > 64
    assert 3 * 64 <= taken.step_mb <= 15 * 64
    with pytest.raises(RuntimeError, match="measuring memory failed: .*unknown config key 'nonsense'"):
        memory.peak_of(TINY, "local", "ours", "cpu", overrides=("nonsense=1",))


def test_the_librarys_command_is_the_same_program(capsys: pytest.CaptureFixture[str], in_tmp_dir: Path):
    with pytest.raises(SystemExit, match="0"):
        command(["bench", "--list"])
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(CASES)
    with pytest.raises(SystemExit, match="2"):
        command(["bench", "gpt3", "--rounds", "1"])
    assert capsys.readouterr().err.startswith("error: no case is called 'gpt3'")
