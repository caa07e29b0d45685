"""Contexts of latents beside a plain twin that holds everything in memory."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from e2e_sae.analysis.interpret.examples import (
    MIN_CONTEXTS,
    N_TOKENS_NAMED,
    PRIOR_TOKENS,
    Context,
    LatentExamples,
    Wanted,
    collect_examples,
    token_texts,
)
from e2e_sae.analysis.study import Study
from e2e_sae.errors import UserError
from e2e_sae.models.runner import run_clean
from e2e_sae.train import train
from tests.tiny_models import make_tokenizer
from tests.tiny_runs import N_CTX, run_config, write_rows

NAME = "blocks.1.hook_resid_pre"
N_ROWS = 60
N_CONTEXT = 4


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Callable[[str], Path]) -> Path:
    """The folder of a small trained run, with evaluation data."""
    folder = tmp_path_factory.mktemp("run")
    rows = write_rows(folder / "rows.parquet", 8)
    write_rows(folder / "eval.parquet", N_ROWS, seed=1)
    data = {"dataset_name": str(folder / "eval.parquet"), "n_ctx": N_CTX, "exclude_token_ids": [0]}
    made = train(run_config(tiny_folder("gpt2"), rows, folder / "out", eval_data=data, eval_every_n_samples=None))
    assert made is not None
    return made


def study_of(run: Path, cache: Path, n_samples: int = N_ROWS, batch_size: int = 7) -> Study:
    table = pd.DataFrame([{"id": "r", "source": str(run), "sae_pos": NAME}])
    return Study(table, cache, n_samples=n_samples, batch_size=batch_size, device="cpu")


def twin(study: Study) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns ids [row, context, token] and activations [row, context, token, latent], those of id 0 set to 0."""
    model = study.open("r")
    (sae,) = model.saes_at().values()
    ids, acts = [], []
    for batch in study.batches("r"):
        x = run_clean(model.tlens_model, batch, [NAME]).at(NAME)
        ids.append(batch.tokens)
        acts.append((sae.encode(x) * (batch.tokens != 0)[..., None]).detach())
    cut = (N_ROWS, N_CTX // N_CONTEXT, N_CONTEXT)
    return torch.cat(ids).view(cut), torch.cat(acts).view(*cut, -1)


def contexts(ids: torch.Tensor, acts: torch.Tensor, half: int, latent: int) -> list[tuple[list[int], list[float]]]:
    """Returns one half's contexts of a latent."""
    flat_ids, flat_acts = ids[half::2].flatten(0, 1), acts[half::2, ..., latent].flatten(0, 1)
    return list(zip(flat_ids.tolist(), flat_acts.tolist(), strict=True))


def pairs(found: Any) -> list[tuple[list[int], Any]]:
    return [(list(context.ids), pytest.approx(list(context.acts), abs=1e-5)) for context in found]


@pytest.fixture(scope="module")
def found(run: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[LatentExamples], Study]:
    """Examples of four latents."""
    study = study_of(run, tmp_path_factory.mktemp("cache"))
    wanted = Wanted(latents=(9, 3, 17, 3), n_top=5, n_held_out=6, n_context=N_CONTEXT)
    return collect_examples(study, "r", NAME, wanted), study


def test_examples_are_those_of_a_plain_search(found: tuple[list[LatentExamples], Study]) -> None:
    examples, study = found
    ids, acts = twin(study)
    assert [one.latent for one in examples] == [3, 9, 17]
    for one in examples:
        training, held_out = (contexts(ids, acts, half, one.latent) for half in (0, 1))
        active = [sorted((c for c in half if max(c[1]) > 0), key=lambda c: -max(c[1])) for half in (training, held_out)]
        assert active[0][:5] == pairs(one.top)
        # All of them are in the sample: the middle one of each sixth.
        n = len(active[1])
        assert n >= 6
        middle = [max(active[1][math.floor((i + 0.5) * n / 6)][1]) for i in range(6)]
        assert [max(context.acts) for context in one.activating] == pytest.approx(middle, abs=1e-5)
        assert all(context in active[1] for context in pairs(one.activating))
        silent = [c[0] for c in held_out if max(c[1]) == 0]
        assert len(one.silent) == min(6, len(silent))
        assert all(list(context.ids) in silent and not any(context.acts) for context in one.silent)


def test_token_means_are_those_of_the_explaining_half(found: tuple[list[LatentExamples], Study]) -> None:
    examples, study = found
    ids, acts = twin(study)
    for one in examples:
        seen: dict[int, list[float]] = {}
        for some_ids, some_acts in contexts(ids, acts, 0, one.latent):
            for id, act in zip(some_ids, some_acts, strict=True):
                if id != 0:
                    seen.setdefault(id, []).append(act)
        values = [act for of_id in seen.values() for act in of_id]
        overall = sum(values) / len(values)
        means = {id: (sum(of_id) + PRIOR_TOKENS * overall) / (len(of_id) + PRIOR_TOKENS) for id, of_id in seen.items()}
        best = sorted(means, key=lambda id: -means[id])[:N_TOKENS_NAMED]
        assert [token.id for token in one.tokens] == best
        assert [token.mean for token in one.tokens] == pytest.approx([means[id] for id in best], rel=1e-4)
        assert [token.lift for token in one.tokens] == pytest.approx([means[id] / overall for id in best], rel=1e-4)
        assert one.tokens[0].text == make_tokenizer().decode([best[0]])


def test_the_batch_size_changes_nothing_and_a_second_call_computes_nothing(
    found: tuple[list[LatentExamples], Study], run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = Wanted(latents=(9, 3, 17, 3), n_top=5, n_held_out=6, n_context=N_CONTEXT)
    study = study_of(run, tmp_path, batch_size=N_ROWS)
    again = collect_examples(study, "r", NAME, wanted)

    for one, other in zip(found[0], again, strict=True):
        assert [context.ids for context in one.silent] == [context.ids for context in other.silent]
        greatest = [[max(c.acts) for c in (*some.top, *some.activating)] for some in (one, other)]
        assert greatest[0] == pytest.approx(greatest[1], abs=1e-5)
    monkeypatch.setattr(Study, "batches", lambda *_: pytest.fail("the data were looked at again"))
    assert collect_examples(study, "r", NAME, wanted) == again


def test_latents_are_drawn_among_those_active_often_enough(run: Path, tmp_path: Path) -> None:
    study = study_of(run, tmp_path)
    ids, acts = twin(study)
    often = [
        latent
        for latent in range(acts.shape[-1])
        if all(sum(max(c[1]) > 0 for c in contexts(ids, acts, half, latent)) >= MIN_CONTEXTS for half in (0, 1))
    ]
    wanted = Wanted(latents=1000, n_top=1, n_held_out=1, n_context=N_CONTEXT)
    assert [one.latent for one in collect_examples(study, "r", NAME, wanted)] == often
    assert len(often) > 5
    drawn = [one.latent for one in collect_examples(study, "r", NAME, wanted._replace(latents=5))]
    assert len(set(drawn)) == 5
    assert set(drawn) <= set(often)
    with pytest.raises(UserError, match=r"no latent of the SAE .* is active in 10 contexts of either half of 4 rows"):
        collect_examples(study_of(run, tmp_path, n_samples=4), "r", NAME, wanted)


def test_latents_that_there_are_not_are_named(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has latents 0 to 31, not \[32\]"):
        collect_examples(study_of(run, tmp_path), "r", NAME, Wanted(latents=(3, 32)))


def test_texts_of_tokens_make_up_the_whole_text_and_characters_stay_whole(repo: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(repo / "demos" / "stdlib_gpt2")
    text = "def naïve(x): return '⟦日本⟧'  # λ"
    ids = tokenizer.encode(text, add_special_tokens=False)
    texts = token_texts(tokenizer, ids)
    assert len(texts) == len(ids) > len("日本")
    assert "".join(texts) == text
    assert not any("\ufffd" in piece for piece in texts)
    assert Context(texts, tuple(ids), (0.0,) * len(ids)).text == text
