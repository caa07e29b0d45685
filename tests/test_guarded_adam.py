"""The guarded optimizer against torch's own, and what is left of a step that is not finite: nothing."""

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from e2e_sae.acts import Mean
from e2e_sae.guarded_adam import GuardedAdam, Trouble

LRS = [0.0, 0.1, 0.05, 0.2, 0.1, 0.02]
both = pytest.mark.parametrize("fused", [True, False], ids=["fused", "not fused"])


def parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in [(7, 3), (3,), (3, 7)]]


def loss_of(ps: list[nn.Parameter], step: int) -> Tensor:
    """A loss whose gradient is larger than 1 in norm, and another at each step."""
    x = torch.randn(20, 7, generator=torch.Generator().manual_seed(step))
    return 30 * ((x @ ps[0] + ps[1]).relu() @ ps[2] - x).square().mean()


def terms(**values: float) -> dict[str, Mean]:
    return {name: Mean(torch.tensor(2 * value), 2) for name, value in values.items()}


def train(optimizer: GuardedAdam, ps: list[nn.Parameter], steps: range) -> list[float]:
    norms: list[float] = []
    for step in steps:
        loss = loss_of(ps, step)
        optimizer.watch(step, loss, {"fit": Mean(loss * 4, 4)})
        loss.backward()
        norms.append(optimizer.step(step, LRS[step]).item())
    return norms


def tensors_of(state: Mapping[str, Any]) -> list[Tensor]:
    return [tensor for moments in state["state"].values() for tensor in moments.values()]


def snapshot(optimizer: GuardedAdam, ps: list[nn.Parameter]) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in [*ps, *tensors_of(optimizer.state_dict())]]


def assert_equal(a: list[Tensor], b: list[Tensor]) -> None:
    assert len(a) == len(b)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# --- finite steps ---


@both
@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
def test_every_step_is_that_of_adam_after_clip_grad_norm_to_the_last_bit(
    fused: bool, max_grad_norm: float | None
) -> None:
    ps, twins = parameters(), parameters()
    optimizer, twin = GuardedAdam(ps, max_grad_norm, fused=fused), torch.optim.Adam(twins, fused=fused)
    norms = train(optimizer, ps, range(3))
    # In the middle, it goes on from what was stored.
    stored, optimizer = optimizer.state_dict(), GuardedAdam(ps, max_grad_norm, fused=fused)
    optimizer.load_state_dict(stored)
    norms += train(optimizer, ps, range(3, 6))
    for step, (lr, norm) in enumerate(zip(LRS, norms, strict=True)):
        twin.param_groups[0]["lr"] = lr
        loss_of(twins, step).backward()
        assert torch.nn.utils.clip_grad_norm_(twins, max_grad_norm or math.inf).item() == norm > 1
        twin.step()
        twin.zero_grad()
    assert_equal([*ps, *tensors_of(optimizer.state_dict())], [*twins, *tensors_of(twin.state_dict())])
    assert optimizer.trouble() is None
    assert all(p.grad is None for p in ps)


# --- steps that are not finite ---


@both
@pytest.mark.parametrize("bad", ["a loss whose gradient is finite", "a gradient", "the loss of a batch before"])
def test_from_the_first_bad_step_on_nothing_changes(fused: bool, bad: str) -> None:
    ps = parameters()
    optimizer = GuardedAdam(ps, 1.0, fused=fused)
    train(optimizer, ps, range(2))
    before = snapshot(optimizer, ps)
    loss = loss_of(ps, 2)
    if bad == "the loss of a batch before":
        optimizer.watch(2, torch.tensor(math.inf), terms(fit=math.inf))
    optimizer.watch(2, loss + (math.nan if "finite" in bad else 0.0), terms(fit=1.0))
    loss.backward()
    if bad == "a gradient":
        assert ps[1].grad is not None
        ps[1].grad[0] = -math.inf
    optimizer.step(2, 0.1)
    assert_equal(snapshot(optimizer, ps), before)
    train(optimizer, ps, range(3, 6))
    assert_equal(snapshot(optimizer, ps), before)
    trouble = optimizer.trouble()
    assert trouble is not None
    assert trouble.step == 2


@both
def test_a_bad_first_step_leaves_the_moments_as_if_none_had_been_made(fused: bool) -> None:
    ps = parameters()
    optimizer = GuardedAdam(ps, fused=fused)
    optimizer.watch(0, torch.tensor(math.nan), {})
    loss_of(ps, 0).backward()
    optimizer.step(0, 0.1)
    assert_equal(list(ps), list(parameters()))
    assert not any(tensor.any() for tensor in tensors_of(optimizer.state_dict()))


@pytest.mark.parametrize(
    ("values", "total", "what"),
    [
        ({"fit": 2.0, "kl": math.nan}, math.nan, "loss term 'kl' is nan"),
        ({"fit": math.inf, "kl": math.nan, "l1": 0.5}, math.nan, "loss term 'fit' is inf, loss term 'kl' is nan"),
        ({"fit": 3e38, "kl": 3e38}, math.inf, "the loss is inf"),
    ],
)
def test_the_terms_that_were_not_finite_are_named_with_their_values(
    values: dict[str, float], total: float, what: str
) -> None:
    optimizer = GuardedAdam(parameters())
    # Term values are sum / count: in float64, so that 2 * 3e38 does not overflow here.
    means = {name: Mean(torch.tensor(2 * value, dtype=torch.float64), 2) for name, value in values.items()}
    optimizer.watch(4, torch.tensor(total, dtype=torch.float64), means)
    assert optimizer.trouble() == Trouble(what, 4)


def test_the_first_trouble_is_kept_whatever_comes_after() -> None:
    ps = parameters()
    optimizer = GuardedAdam(ps)
    optimizer.watch(0, torch.tensor(1.0), terms(fit=1.0))
    for p in ps:
        p.grad = torch.full_like(p, math.nan)
    optimizer.step(0, 0.1)
    optimizer.watch(1, torch.tensor(math.inf), terms(fit=math.inf))
    assert optimizer.trouble() == Trouble("the gradient's norm is nan", 0)
    assert optimizer.trouble() == Trouble("the gradient's norm is nan", 0)


def test_a_term_without_counted_tokens_is_no_trouble() -> None:
    optimizer = GuardedAdam(parameters())
    optimizer.watch(0, torch.tensor(0.0), {"kl": Mean(torch.tensor(0.0), 0)})
    assert optimizer.trouble() is None


@pytest.mark.gpu
def test_on_a_gpu_a_bad_step_is_left_out_without_waiting() -> None:
    ps = [nn.Parameter(p.detach().cuda()) for p in parameters()]
    optimizer = GuardedAdam(ps, 1.0)
    gradients = [torch.randn_like(p) for p in ps]
    bad = torch.full((), math.nan, device="cuda")
    total = torch.ones((), device="cuda")

    def step(number: int) -> None:
        for p, gradient in zip(ps, gradients, strict=True):
            p.grad = gradient.clone()
        optimizer.step(number, 0.1)

    step(0)
    before = snapshot(optimizer, ps)
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.watch(1, total, {"fit": Mean(total * 2, 2)})
        optimizer.watch(1, bad, {"fit": Mean(bad, 2)})
        step(1)
        step(2)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_equal(snapshot(optimizer, ps), before)
    assert optimizer.trouble() == Trouble("loss term 'fit' is nan", 1)
