"""The chunked KL and logit comparison against torch's own functions."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from e2e_sae.acts import Head, Output
from e2e_sae.ops.logits import compare_logits, kl_rows_plain, kl_sum, next_token_ce

B, T, V = 3, 5, 7


def logits(seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return 3 * torch.randn(B, T, V, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def kl(clean: torch.Tensor, spliced: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
    """KL of logits that are given as such."""
    return kl_sum(Output(clean), Output(spliced), *args, **options)


def some_counted() -> torch.Tensor:
    counted = torch.ones(B, T, dtype=torch.bool)
    counted[0, 0] = counted[1, 3] = counted[2, 4] = False
    return counted


def test_kl_of_two_coins_by_hand():
    # KL((1/2, 1/2) || (3/4, 1/4)) = 1/2 log(2/3) + 1/2 log 2 = 1/2 log(4/3)
    clean = torch.tensor([[[0.5, 0.5]]]).log()
    spliced = torch.tensor([[[0.75, 0.25]]]).log()
    torch.testing.assert_close(kl(clean, spliced), 0.5 * torch.tensor(4 / 3).log())


@pytest.mark.parametrize("chunk_elements", [1, V, 2 * V + 1, 10_000])
def test_kl_equals_torch_in_value_and_gradient(chunk_elements: int):
    clean, spliced = logits(0), logits(1).requires_grad_()
    ours = 2.5 * kl(clean, spliced, chunk_elements=chunk_elements)
    (gradient,) = torch.autograd.grad(ours, spliced)
    log_p, log_q = F.log_softmax(clean, -1), F.log_softmax(spliced, -1)
    theirs = 2.5 * F.kl_div(log_q, log_p, reduction="sum", log_target=True)
    (expected,) = torch.autograd.grad(theirs, spliced)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(gradient, expected)


def test_kl_of_counted_tokens_equals_the_plain_twin_on_those_rows():
    clean, spliced, counted = logits(0), logits(1).requires_grad_(), some_counted()
    ours = 0.3 * kl(clean, spliced, counted, chunk_elements=2 * V)
    (gradient,) = torch.autograd.grad(ours, spliced)
    plain = 0.3 * kl_rows_plain(clean[counted], spliced[counted]).sum()
    (expected,) = torch.autograd.grad(plain, spliced)
    torch.testing.assert_close(ours, plain)
    torch.testing.assert_close(gradient, expected)
    assert (gradient[~counted] == 0).all()


def test_an_uncounted_row_may_hold_nan():
    clean, spliced, counted = logits(0), logits(1), some_counted()
    expected = kl(clean, spliced, counted)
    spliced[~counted] = float("nan")
    spliced.requires_grad_()
    ours = kl(clean, spliced, counted)
    torch.testing.assert_close(ours, expected)
    assert torch.autograd.grad(ours, spliced)[0].isfinite().all()


def test_a_token_that_a_model_forbids_adds_nothing():
    clean, spliced = logits(0), logits(1)
    clean[..., 0] = spliced[..., 0] = -torch.inf
    expected = kl(clean[..., 1:].contiguous(), spliced[..., 1:].contiguous())
    torch.testing.assert_close(kl(clean, spliced), expected)


def test_kl_in_bfloat16_is_summed_in_float32():
    clean, spliced = logits(0).bfloat16(), logits(1).bfloat16().requires_grad_()
    ours = kl(clean, spliced)
    (gradient,) = torch.autograd.grad(ours, spliced)
    assert ours.dtype == torch.float32
    assert gradient.dtype == torch.bfloat16
    torch.testing.assert_close(ours, kl(clean.float(), spliced.float()))


@pytest.mark.parametrize("counted", [None, some_counted()])
@pytest.mark.parametrize("chunk_elements", [V, 10_000])
def test_comparison_equals_the_plain_computation(counted: torch.Tensor | None, chunk_elements: int):
    clean, spliced = logits(0), logits(1)
    tokens = torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(2))
    result = compare_logits(Output(clean), Output(spliced), tokens, counted, chunk_elements)
    keep = torch.ones(B, T, dtype=torch.bool) if counted is None else counted
    nxt = keep[:, :-1]

    def ce(x: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(x[:, :-1][nxt], tokens[:, 1:][nxt], reduction="sum")

    def hits(x: torch.Tensor) -> torch.Tensor:
        return (x[:, :-1].argmax(-1) == tokens[:, 1:])[nxt].sum().double()

    assert (result.n_tokens, result.n_predictions) == (int(keep.sum()), int(nxt.sum()))
    torch.testing.assert_close(result.clean_ce, ce(clean))
    torch.testing.assert_close(result.spliced_ce, ce(spliced))
    torch.testing.assert_close(result.clean_correct, hits(clean))
    torch.testing.assert_close(result.spliced_correct, hits(spliced))
    torch.testing.assert_close(result.clean_same_token, (clean.argmax(-1) == tokens)[keep].sum().double())
    torch.testing.assert_close(result.agree, (clean.argmax(-1) == spliced.argmax(-1))[keep].sum().double())
    variation = 0.5 * (clean.softmax(-1) - spliced.softmax(-1)).abs().sum(-1)[keep].sum()
    torch.testing.assert_close(result.total_variation, variation)
    total, n = next_token_ce(Output(spliced), tokens, counted, chunk_elements)
    torch.testing.assert_close(total, ce(spliced))
    assert n == int(nxt.sum())


def a_head(soft_cap: float | None, with_bias: bool, d: int = 4) -> Head:
    generator = torch.Generator().manual_seed(9)
    draw = [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((d, V), (V,))]
    return Head(draw[0], draw[1] if with_bias else None, soft_cap)


def hidden(seed: int, d: int = 4) -> torch.Tensor:
    return 2 * torch.randn(B, T, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("soft_cap", [None, 3.0])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("chunk_elements", [1, 2 * V + 1, 10_000])
def test_kl_through_the_unembedding_equals_torch_in_value_and_gradient(
    soft_cap: float | None, with_bias: bool, chunk_elements: int
):
    head, counted = a_head(soft_cap, with_bias), some_counted()
    clean, spliced = hidden(0), hidden(1).requires_grad_()
    ours = 2.5 * kl_sum(Output(clean, head), Output(spliced, head), counted, chunk_elements)
    (gradient,) = torch.autograd.grad(ours, spliced)

    def log_probabilities(x: torch.Tensor) -> torch.Tensor:
        z = x @ head.W_U + (head.b_U if head.b_U is not None else 0.0)
        return F.log_softmax(z if soft_cap is None else soft_cap * torch.tanh(z / soft_cap), -1)[counted]

    theirs = 2.5 * F.kl_div(log_probabilities(spliced), log_probabilities(clean), reduction="sum", log_target=True)
    (expected,) = torch.autograd.grad(theirs, spliced)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(gradient, expected)
    assert (gradient[~counted] == 0).all()


def test_comparison_through_the_unembedding_equals_that_of_the_logits():
    head = a_head(3.0, with_bias=True)
    clean, spliced = Output(hidden(0), head), Output(hidden(1), head)
    tokens = torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(2))
    ours = compare_logits(clean, spliced, tokens, some_counted(), chunk_elements=2 * V)
    theirs = compare_logits(Output(clean.logits), Output(spliced.logits), tokens, some_counted())
    torch.testing.assert_close(list(ours), list(theirs))
    torch.testing.assert_close(
        next_token_ce(spliced, tokens, None, 2 * V), next_token_ce(Output(spliced.logits), tokens)
    )


def test_no_more_logits_exist_at_once_than_a_chunk_holds(monkeypatch: pytest.MonkeyPatch):
    sizes: list[int] = []
    plain = torch.log_softmax

    def measured(x: torch.Tensor, dim: int, **options: Any) -> torch.Tensor:
        sizes.append(x.numel())
        return plain(x, dim, **options)

    monkeypatch.setattr(torch, "log_softmax", measured)
    head = a_head(None, with_bias=True)
    kl_sum(Output(hidden(0), head), Output(hidden(1).requires_grad_(), head), chunk_elements=2 * V).backward()
    assert sum(sizes) == 2 * B * T * V
    assert max(sizes) == 2 * V
