"""`e2e-sae pages`: from runs to files."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from e2e_sae.analysis.feature_pages import nearest_others_of
from e2e_sae.analysis.study import Study
from e2e_sae.checkpoint import load_run
from e2e_sae.checkpoint.files import write_json
from e2e_sae.scripts.cli import main
from tests.analysis.tiny_studies import train_with_eval_data
from tests.tiny_models import D_MODEL
from tests.tiny_runs import N_CTX, write_rows

NAME = "blocks.1.hook_resid_pre"


@pytest.fixture(scope="module")
def run(tiny_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_with_eval_data(tiny_folder("gpt2"), tmp_path_factory.mktemp("run"))


def write_saelens(folder: Path, d_in: int = D_MODEL, d_sae: int = 8) -> Path:
    """Writes a SAELens folder with an SAE at the same place, of a model that cannot be had."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"W_enc": (d_in, d_sae), "b_enc": (d_sae,), "W_dec": (d_sae, d_in), "b_dec": (d_in,)}
    folder.mkdir()
    save_file({k: torch.randn(s, generator=generator) for k, s in shapes.items()}, folder / "sae_weights.safetensors")
    config = {"architecture": "standard", "model_name": "no-such-model", "hook_name": NAME}
    write_json(folder / "cfg.json", {**config, "apply_b_dec_to_input": False})
    return folder


def model_and_data(model: Path, folder: Path) -> list[str]:
    """Returns arguments that say which."""
    rows = write_rows(folder / "rows.parquet", 4)
    settings = [f"tlens_model_path={model}", f"eval_data.dataset_name={rows}", f"eval_data.n_ctx={N_CTX}"]
    return [part for setting in settings for part in ("--set", setting)]


def numbers(folder: Path) -> list[int]:
    return sorted(int(file.stem) for file in (folder / "latents").glob("*.html"))


def complaint(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    assert main(["pages", *map(str, arguments)]) == 2
    return capsys.readouterr().err


def test_a_run_gets_a_page_for_each_latent_that_is_ever_active(run: Path, tmp_path: Path):
    out = tmp_path / "pages"
    assert main(["pages", str(run), "--out", str(out), "--n-samples", "6"]) == 0
    made = numbers(out)
    (sae,) = load_run(run).saes.values()
    assert 0 < len(made) <= sae.info.d_sae
    assert sorted(p.name for p in out.iterdir()) == ["cache", "index.html", "latents"]
    page = (out / "latents" / f"{made[0]}.html").read_text(encoding="utf-8")
    assert "48 tokens" in page  # 6 rows of 8
    for link in re.findall(r'href="([^"]*)"', page):
        assert (out / "latents" / link).resolve().is_file()


def test_another_sae_gets_the_pages_of_its_nearest_latents(
    run: Path, tiny_folder: Callable[[str], Path], tmp_path: Path
):
    """Of any format, and with data and model from the command line."""
    out, other = tmp_path / "pages", write_saelens(tmp_path / "other")
    arguments = ["--other", str(other), "--out", str(out), "--latents", "3,1"]
    assert main(["pages", str(run), *arguments, *model_and_data(tiny_folder("gpt2"), tmp_path)]) == 0
    a, b = out / "A-blocks-1-hook_resid_pre", out / "B-blocks-1-hook_resid_pre"
    assert numbers(a) == [1, 3]
    W, V = (next(iter(load_run(path).saes.values())).tensors["W_dec"] for path in (run, other))
    cosines = torch.nn.functional.cosine_similarity(W[[1, 3], None], V[None], dim=-1)
    assert numbers(b) == sorted(set(cosines.topk(8, dim=1).indices.flatten().tolist()))
    best = int(cosines[0].argmax())
    assert f'href="../../B-blocks-1-hook_resid_pre/latents/{best}.html"' in (a / "latents" / "1.html").read_text()
    for index in (out, a, b):
        assert (index / "index.html").is_file()


def test_the_nearest_others_are_those_with_the_largest_cosines_without_themselves():
    directions = torch.nn.functional.normalize(torch.randn(20, 4, generator=torch.Generator().manual_seed(0)), dim=1)
    directions[7] = directions[3]  # a twin, which is as near as a latent is to itself
    latents = torch.tensor([3, 7, 11])
    found = nearest_others_of(directions, latents)
    cosines = directions @ directions.T
    cosines.fill_diagonal_(-2)
    expected = cosines[latents].topk(8, dim=1)
    assert torch.equal(found.indices, expected.indices)
    torch.testing.assert_close(found.cosines, expected.values)


def test_top_limits_the_pages(run: Path, tmp_path: Path):
    assert main(["pages", str(run), "--out", str(tmp_path / "p"), "--top", "3"]) == 0
    assert len(numbers(tmp_path / "p")) == 3


def test_pages_that_were_interrupted_go_on_where_they_were(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    computed: list[str] = []
    last, cached = 3, Study.cached

    def counting(self: Study, name: str, key: Any, compute: Any) -> dict[str, Tensor]:
        def count() -> Any:
            if len(computed) == last:
                raise KeyboardInterrupt
            computed.append(name)
            return compute()

        return cached(self, name, key, count)

    monkeypatch.setattr("e2e_sae.analysis.feature_effects.PART_PLACES", 64)
    monkeypatch.setattr(Study, "cached", counting)
    arguments = [str(run), "--n-samples", "6", "--out"]
    assert main(["pages", *arguments, str(tmp_path / "p")]) == 130
    assert not (tmp_path / "p" / "index.html").exists()
    last = -1
    assert main(["pages", *arguments, str(tmp_path / "p")]) == 0
    assert computed[0] == "activities"
    assert computed.count("activities") == 1
    in_two, computed[:] = computed[:], []
    assert main(["pages", *arguments, str(tmp_path / "whole")]) == 0
    assert computed == in_two
    assert len(computed) > 4
    made = numbers(tmp_path / "p")
    assert made == numbers(tmp_path / "whole")
    for name in ("index.html", *(f"latents/{n}.html" for n in made)):
        assert (tmp_path / "p" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert "is there already" in complaint(capsys, run, "--out", tmp_path / "p")


def test_the_pages_do_not_depend_on_the_size_of_batches(run: Path, tmp_path: Path):
    for size in ("1", "4"):
        arguments = ["--out", str(tmp_path / size), "--batch-size", size, "--n-samples", "4"]
        assert main(["pages", str(run), *arguments]) == 0
    assert numbers(tmp_path / "1") == numbers(tmp_path / "4")
    for name in ("index.html", f"latents/{numbers(tmp_path / '1')[0]}.html"):
        one, four = ((tmp_path / size / name).read_text(encoding="utf-8") for size in ("1", "4"))
        # The last digits shown may round otherwise.
        assert re.sub(r"\d+\.\d+(e-?\d+)?", "", one) == re.sub(r"\d+\.\d+(e-?\d+)?", "", four)


def test_mistakes_are_told_in_one_line(
    run: Path, tiny_folder: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    full, out = tmp_path / "full", tmp_path / "out"
    full.mkdir()
    (full / "x").touch()
    assert f"'{full}' is there already" in complaint(capsys, run, "--out", full)
    assert "--latents is '1,x', expected numbers with commas" in complaint(capsys, run, "--latents", "1,x")
    assert "there is no latent 32: the SAE has 32, from 0 to 31" in complaint(
        capsys, run, "--out", out, "--latents", "32"
    )
    assert "--top is 0, expected at least 1" in complaint(capsys, run, "--top", "0")
    assert "is neither a file or folder nor a W&B run" in complaint(capsys, "no_such_run", "--out", out)
    narrow, given = write_saelens(tmp_path / "narrow", d_in=4), model_and_data(tiny_folder("gpt2"), tmp_path)
    assert "has width 4, this model's activation" in complaint(capsys, run, "--other", narrow, "--out", out, *given)
    assert not out.exists()


def test_a_lone_sae_asks_for_data(
    tiny_folder: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    lone = write_saelens(tmp_path / "lone")
    said = complaint(capsys, lone, "--out", tmp_path / "out", "--set", f"tlens_model_path={tiny_folder('gpt2')}")
    assert "does not say which data to look at: give --set eval_data.dataset_name=..." in said
