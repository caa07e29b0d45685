"""KL when a direction is resampled: a plain loop over TransformerLens' own hooks, with full log-softmaxes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from e2e_sae.acts import TokenBatch
from e2e_sae.analysis.clean_directions import directions_at
from e2e_sae.analysis.resampled_directions import _changes, resampled_kls
from e2e_sae.models.runner import run_clean
from e2e_sae.seeds import seed_for
from tests.analysis.test_clean_directions import EXCLUDED, HEADS, PRE, batches


def plain_kls(model: Any, rows: list[TokenBatch], point: str, seed: int) -> tuple[list[float], list[float]]:
    """Returns mean KL(clean || changed) and KL(changed || clean) by direction."""
    found = directions_at(model, rows, [point])[point]
    tokens = torch.cat([batch.tokens for batch in rows])
    counted = torch.cat([torch.ones_like(b.tokens, dtype=torch.bool) if b.counted is None else b.counted for b in rows])
    whole = TokenBatch.of(tokens)
    a = run_clean(model, whole, [point]).acts[point]
    log_p = F.log_softmax(model(tokens, return_type="logits"), -1)
    moved = counted.clone()
    moved[:, 0] = False
    results: tuple[list[float], list[float]] = ([], [])
    for i, axis in enumerate(found.axes):
        vectors = a[moved].reshape(-1, a.shape[-1])
        components = (vectors - found.mean) @ axis
        order = torch.randperm(
            len(components), generator=torch.Generator().manual_seed(seed_for(seed, "resampled", point, i))
        )
        vectors = vectors + (components[order] - components)[:, None] * axis
        changed = a.clone()
        changed[moved] = vectors.reshape(changed[moved].shape)
        with model.hooks(fwd_hooks=[(point, lambda x, hook, new=changed: new)]):
            log_q = F.log_softmax(model(tokens, return_type="logits"), -1)
        for result, kl in zip(
            results,
            ((log_p.exp() * (log_p - log_q)).sum(-1), (log_q.exp() * (log_q - log_p)).sum(-1)),
            strict=True,
        ):
            result.append(kl[counted].mean().item())
    return results


@pytest.mark.parametrize(
    ("point", "exclude"), [(PRE, None), (HEADS, EXCLUDED)], ids=["all tokens", "heads, some tokens excluded"]
)
def test_both_divergences_are_those_of_a_plain_loop(
    point: str, exclude: list[int] | None, lm_of: Callable[..., Any]
) -> None:
    model, rows = lm_of("gpt2", "float64"), batches(2, exclude)
    directions = directions_at(model, rows, [point])[point]
    found = resampled_kls(model, rows, point, directions, seed=3)
    with torch.no_grad():
        clean_changed, changed_clean = plain_kls(model, rows, point, seed=3)
    assert found.clean_changed.tolist() == pytest.approx(clean_changed, rel=1e-9)
    assert found.changed_clean.tolist() == pytest.approx(changed_clean, rel=1e-9)
    assert found.clean_changed[0] > 1e-4
    assert (found.clean_changed - found.changed_clean).abs().max() > 1e-6, "the two directions differ here"


def test_components_are_permuted_over_rows_and_positions_but_not_the_first(lm_of: Callable[..., Any]) -> None:
    model, rows = lm_of("gpt2", "float64"), batches()
    directions = directions_at(model, rows, [PRE])[PRE]
    before: list[Tensor] = []
    for batch in rows:
        before.append(directions.components(run_clean(model, batch, [PRE]).acts[PRE]))
    changes = [change[:, :, 0] for change in _changes(model, rows, PRE, directions, seed=0)]
    x, change = torch.cat(before), torch.cat(changes)
    assert (change[:, 0] == 0).all()
    for i in range(x.shape[-1]):
        values, after = x[:, 1:, i].flatten(), (x + change)[:, 1:, i].flatten()
        torch.testing.assert_close(values.sort().values, after.sort().values)
        assert (values != after).float().mean() > 0.5
    orders = [(x + change)[:, 1:, i].flatten().argsort().argsort() for i in (0, 1)]
    assert not torch.equal(*orders), "each direction has its own permutation"
    assert not torch.equal(torch.cat(_changes(model, rows, PRE, directions, seed=1))[:, :, 0], change)


def test_one_row_of_one_token_changes_nothing(lm_of: Callable[..., Any]) -> None:
    """There is no token but the first."""
    model, rows = lm_of("gpt2", "float64"), batches()
    directions = directions_at(model, rows, [PRE])[PRE]
    found = resampled_kls(model, [TokenBatch.of(rows[0].tokens[:, :1])], PRE, directions)
    assert found.clean_changed.abs().max() < 1e-12
    assert found.changed_clean.abs().max() < 1e-12
