"""Subject-verb agreement through an SAE: plain twins over TransformerLens' own hooks."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from e2e_sae.acts import Position, TokenBatch
from e2e_sae.analysis import agreement
from e2e_sae.analysis.agreement import _lines, agreement_scores, can_agree
from e2e_sae.analysis.agreement_sentences import Sentences, agreement_sentences
from e2e_sae.models.runner import run_clean, run_spliced
from e2e_sae.saes import SAE, GatedSAE, ReluSAE, TopKSAE
from e2e_sae.saes.topk import TopKConfig
from tests.analysis.test_agreement_sentences import FEW_WORDS
from tests.tiny_models import make_word_tokenizer

PRE, HEADS = "blocks.1.hook_resid_pre", "blocks.1.attn.hook_z"


@pytest.fixture(scope="module")
def sentences() -> Sentences:
    found = agreement_sentences(make_word_tokenizer(FEW_WORDS), n=64)["rc"]
    assert found.tokens.shape == (64, 7)
    return found


@pytest.fixture(autouse=True)
def some_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three chunks of sentences, the last one shorter."""
    monkeypatch.setattr(agreement, "LATENTS_AT_ONCE", 7 * 24 * 30)


def saes() -> Iterator[tuple[str, SAE]]:
    generator = torch.Generator().manual_seed(0)
    yield PRE, ReluSAE(16, 24, generator=generator).double()
    yield PRE, GatedSAE(16, 24, generator=generator).double()
    yield PRE, TopKSAE(16, 24, TopKConfig(k=4), generator=generator).double()
    yield HEADS, ReluSAE(8, 24, generator=generator).double()


def plain_differences(model: Any, sentences: Sentences, point: str, new: Tensor | None) -> Tensor:
    """Returns z[correct] - z[wrong] of each sentence, with the activation replaced by `new`, if it is given."""
    hooks = [] if new is None else [(point, lambda x, hook: new)]
    with model.hooks(fwd_hooks=hooks):
        logits = model(sentences.tokens, return_type="logits")[:, -1]
    n = torch.arange(len(logits))
    return logits[n, sentences.correct] - logits[n, sentences.wrong]


@pytest.mark.parametrize(("point", "sae"), list(saes()), ids=lambda x: x if isinstance(x, str) else x.architecture)
@torch.no_grad()
def test_scores_are_those_of_a_plain_twin(
    point: str, sae: SAE, sentences: Sentences, lm_of: Callable[..., Any]
) -> None:
    model = lm_of("gpt2", "float64")
    sae.eval()
    found = agreement_scores(model, sae, point, sentences)
    torch.testing.assert_close(found.model, plain_differences(model, sentences, point, None))
    a = run_clean(model, TokenBatch.of(sentences.tokens), [point]).acts[point]
    latents = sae.encode(a)
    mean = latents.mean(0, keepdim=True).expand_as(latents)
    order = found.effects.abs().argsort(descending=True)
    for n_kept, kept in zip(found.n_kept, found.kept, strict=True):
        changed = mean.clone()
        chosen = order[: int(n_kept)]
        changed[..., chosen] = latents[..., chosen]
        torch.testing.assert_close(kept, plain_differences(model, sentences, point, sae.decode(changed)))
    assert found.n_kept[-1] == (latents != latents[:1]).any(0).flatten(0, -2).any(0).sum()
    spliced = run_spliced(model, TokenBatch.of(sentences.tokens), {Position(point, point): sae})
    assert spliced.logits is not None
    n = torch.arange(len(sentences.tokens))
    last = spliced.logits[:, -1]
    torch.testing.assert_close(found.kept[-1], last[n, sentences.correct] - last[n, sentences.wrong])


@torch.no_grad()
def test_effects_are_the_slopes_of_the_difference_towards_the_means(
    sentences: Sentences, lm_of: Callable[..., Any]
) -> None:
    """Latent j moved by a millionth of its way to its mean, every position towards its own."""
    model, step = lm_of("gpt2", "float64"), 1e-6
    for point, sae in list(saes())[1::2]:
        sae.eval()
        found = agreement_scores(model, sae, point, sentences)
        a = run_clean(model, TokenBatch.of(sentences.tokens), [point]).acts[point]
        latents = sae.encode(a)
        way = latents.mean(0, keepdim=True) - latents
        before = plain_differences(model, sentences, point, sae.decode(latents)).mean()
        moving = way.flatten(0, -2).abs().sum(0).nonzero()[:4, 0]
        for j in moving:
            moved = latents.clone()
            moved[..., j] += step * way[..., j]
            after = plain_differences(model, sentences, point, sae.decode(moved)).mean()
            assert found.effects[j].item() == pytest.approx((after - before).item() / step, rel=1e-3, abs=1e-7)
        assert found.effects.abs().max() > 1e-5


def test_both_definitions_of_faithfulness() -> None:
    """m(0) = 1, m(1) = 2, m(all) = 2.5, m(model) = 3: by the paper's formula 1/2 and 3/4, by its code's 2/3 and 5/6."""
    from e2e_sae.analysis.agreement import Scores

    scores = Scores(
        n_kept=torch.tensor([0.0, 1.0, 7.0]),
        kept=torch.tensor([[2.0, 0.0], [5.0, -1.0], [6.0, -1.0]]),
        model=torch.tensor([4.0, 2.0]),
        effects=torch.zeros(9),
    )
    nothing = torch.zeros(2, 3, dtype=torch.long)
    lines = _lines(scores, Sentences(nothing, nothing[:, 0], nothing[:, 0], "The boys are/is"))
    assert lines["faithfulness"].tolist() == pytest.approx([0, 1 / 2, 3 / 4])
    assert lines["share_of_model"].tolist() == pytest.approx([1 / 3, 2 / 3, 5 / 6])
    assert lines["right"].tolist() == [0.5, 0.5, 0.5]
    assert set(lines["model_right"]) == {1.0}
    assert lines["is_all"].tolist() == [False, False, True]


def test_chance_is_a_half_within_two_standard_errors() -> None:
    """100 sentences: 0.5 + 2 x 0.05."""
    assert not can_agree(0.6, 100)
    assert can_agree(0.61, 100)
    assert not can_agree(0.3, 10_000)
