"""The guarded optimizer against torch's own, and what is left of a step that is not finite: nothing."""

import math
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from e2e_sae.acts import Mean
from e2e_sae.errors import UserError
from e2e_sae.guarded_optimizer import GuardedOptimizer, Trouble, check_installed
from e2e_sae.optim import OptimizerName

LRS = [0.0, 0.1, 0.05, 0.2, 0.1, 0.02]
both = pytest.mark.parametrize("fused", [True, False], ids=["fused", "not fused"])
NAMES: list[OptimizerName] = ["adam", "adamw", "radam", "signum", "muon", "schedulefree_adamw"]
all_ways = pytest.mark.parametrize(
    ("name", "fused"), [*[(name, None) for name in NAMES], ("adam", False)], ids=[*NAMES, "adam, not fused"]
)


def parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in [(7, 3), (3,), (3, 7)]]


def loss_of(ps: list[nn.Parameter], step: int) -> Tensor:
    """A loss whose gradient is larger than 1 in norm, and another at each step."""
    x = torch.randn(20, 7, generator=torch.Generator().manual_seed(step))
    return 30 * ((x @ ps[0] + ps[1]).relu() @ ps[2] - x).square().mean()


def terms(**values: float) -> dict[str, Mean]:
    return {name: Mean(torch.tensor(2 * value), 2) for name, value in values.items()}


def train(optimizer: GuardedOptimizer, ps: list[nn.Parameter], steps: range) -> list[float]:
    norms: list[float] = []
    for step in steps:
        loss = loss_of(ps, step)
        optimizer.watch(step, loss, {"fit": Mean(loss * 4, 4)})
        loss.backward()
        norms.append(optimizer.step(step, LRS[step]).item())
    return norms


def tensors_of(state: Mapping[str, Any]) -> list[Tensor]:
    return [tensor for moments in state["state"].values() for tensor in moments.values()]


def snapshot(optimizer: GuardedOptimizer, ps: list[nn.Parameter]) -> list[Tensor]:
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
    optimizer, twin = GuardedOptimizer(ps, max_grad_norm, fused=fused), torch.optim.Adam(twins, fused=fused)
    norms = train(optimizer, ps, range(3))
    # In the middle, it goes on from what was stored.
    stored, optimizer = optimizer.state_dict(), GuardedOptimizer(ps, max_grad_norm, fused=fused)
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


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(("weight_decay", "of_torch"), [(None, 0.01), (0.2, 0.2), (0.0, 0.0)])
def test_adamw_is_torchs_to_the_last_bit(fused: bool, weight_decay: float | None, of_torch: float) -> None:
    ps, twins = parameters(), parameters()
    optimizer = GuardedOptimizer(ps, name="adamw", betas=(0.8, 0.9), weight_decay=weight_decay, fused=fused)
    twin = torch.optim.AdamW(twins, betas=(0.8, 0.9), weight_decay=of_torch, fused=fused)
    train(optimizer, ps, range(4))
    for step in range(4):
        twin.param_groups[0]["lr"] = LRS[step]
        loss_of(twins, step).backward()
        twin.step()
        twin.zero_grad()
    assert_equal([*ps, *tensors_of(optimizer.state_dict())], [*twins, *tensors_of(twin.state_dict())])


@pytest.mark.parametrize("name", NAMES)
def test_an_optimizer_goes_on_bit_for_bit_from_what_was_stored(name: OptimizerName, tmp_path: Path) -> None:
    ps, twins = parameters(), parameters()
    whole, first = GuardedOptimizer(ps, name=name), GuardedOptimizer(twins, name=name)
    train(whole, ps, range(6))
    train(first, twins, range(3))
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second = GuardedOptimizer(twins, name=name)
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    train(second, twins, range(3, 6))
    assert_equal(snapshot(second, twins), snapshot(whole, ps))


def test_parameters_have_the_learning_rate_times_their_factor() -> None:
    ps = parameters()
    before = [p.detach().clone() for p in ps]
    optimizer = GuardedOptimizer(ps, name="signum", lr_factors=[1.0, 0.5, 2.0])
    loss_of(ps, 0).backward()
    optimizer.step(0, 0.1)
    for p, old, lr in zip(ps, before, [0.1, 0.05, 0.2], strict=True):
        moved = (p.detach() - old).abs()
        assert moved.max().item() == pytest.approx(lr, rel=1e-5)


@pytest.mark.parametrize("name", ["adam", "radam", "muon"])
def test_forgetting_makes_moments_0_where_told_and_nowhere_else(name: OptimizerName) -> None:
    ps = parameters()
    optimizer = GuardedOptimizer(ps, name=name)
    train(optimizer, ps, range(2))
    before = snapshot(optimizer, ps)
    where = torch.tensor([False, True, False])
    optimizer.forget(ps[0], where)
    after = snapshot(optimizer, ps)
    of_first = [t for t in optimizer.state_dict()["state"][0].values() if t.shape == (7, 3)]
    assert of_first
    for moment in of_first:
        assert not moment[:, where].any()
        assert moment[:, ~where].all()
    changed = [not torch.equal(a, b) for a, b in zip(before, after, strict=True)]
    assert sum(changed) == len(of_first)


def test_forgetting_lets_an_average_begin_anew() -> None:
    ps = parameters()
    optimizer = GuardedOptimizer(ps, name="schedulefree_adamw")
    train(optimizer, ps, range(3))
    where = torch.tensor([False, True, False])
    kept = [t.clone() for t in optimizer.averages or []]
    ps[0].data[:, 1] = 5.0
    optimizer.forget(ps[0], where)
    (average, *_) = optimizer.averages or []
    assert (average[:, 1] == 5).all()
    assert torch.equal(average[:, ~where], kept[0][:, ~where])
    train(optimizer, ps, range(3, 4))
    assert (ps[0][:, 1] - 5).abs().max() < 1


# --- moments in 8 bits ---

needs_bitsandbytes = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs bitsandbytes")


def large_parameters() -> list[nn.Parameter]:
    """One of 6,000 numbers, whose moments are in 8 bits, and one of 300, whose moments are not."""
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in [(20, 300), (300,)]]


def train_large(optimizer: GuardedOptimizer, ps: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for p in ps:
            p.grad = 0.1 * torch.randn(p.shape, generator=generator) + 0.01 * p.detach()
        optimizer.step(step, 0.01)


@needs_bitsandbytes
@pytest.mark.parametrize("weight_decay", [None, 0.1])
def test_adam8bit_is_nearly_adam_and_keeps_a_byte_of_each_moment(weight_decay: float | None) -> None:
    ps, twins, start = large_parameters(), large_parameters(), large_parameters()
    optimizer = GuardedOptimizer(ps, name="adam8bit", weight_decay=weight_decay)
    twin = GuardedOptimizer(twins, name="adamw", weight_decay=weight_decay or 0.0)
    train_large(optimizer, ps, range(20))
    train_large(twin, twins, range(20))
    torch.testing.assert_close(ps[1], twins[1], rtol=1e-5, atol=1e-6)
    moved = (twins[0] - start[0]).abs()
    assert 0 < (ps[0] - twins[0]).abs().max() < 0.1 * moved.max()
    state = optimizer.state_dict()["state"][0]["__bnb_optimizer_quant_state__"]
    assert [state[name].dtype for name in ("state1", "state2")] == [torch.uint8] * 2
    assert state["state1"].shape == (20, 300)


@needs_bitsandbytes
def test_adam8bit_goes_on_to_the_same_bits_and_leaves_bad_steps_out(tmp_path: Path) -> None:
    ps, twins = large_parameters(), large_parameters()
    whole, first = GuardedOptimizer(ps, name="adam8bit"), GuardedOptimizer(twins, name="adam8bit")
    train_large(whole, ps, range(6))
    train_large(first, twins, range(3))
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second = GuardedOptimizer(twins, name="adam8bit")
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    train_large(second, twins, range(3, 6))
    assert_equal(list(ps), list(twins))
    second.watch(6, torch.tensor(math.nan), {})
    train_large(second, twins, range(6, 8))
    assert_equal(list(ps), list(twins))
    assert second.trouble() == Trouble("the loss is nan", 6)


@needs_bitsandbytes
def test_adam8bit_forgets_what_it_is_told_to_and_nothing_else() -> None:
    ps, twins = large_parameters(), large_parameters()
    optimizers = [GuardedOptimizer(each, name="adam8bit") for each in (ps, twins)]
    for optimizer, each in zip(optimizers, (ps, twins), strict=True):
        train_large(optimizer, each, range(5))
    where = torch.arange(300) < 10
    before = [p.detach().clone() for p in ps]
    for p, q in zip(ps, twins, strict=True):
        optimizers[0].forget(p, where)
        p.grad, q.grad = torch.zeros_like(p), torch.zeros_like(q)
    for optimizer in optimizers:
        optimizer.step(5, 0.01)
    # Without a gradient, weights are moved by what is remembered of older ones.
    for p, q, old in zip(ps, twins, before, strict=True):
        assert torch.equal(p[..., where], old[..., where])
        assert torch.equal(p[..., ~where], q[..., ~where])
        assert (p[..., ~where] != old[..., ~where]).float().mean() > 0.9


def test_without_bitsandbytes_the_command_that_installs_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("e2e_sae.guarded_optimizer.find_spec", lambda name: None)
    check_installed("adam")
    with pytest.raises(UserError, match=r"^optimizer: adam8bit needs bitsandbytes, .*: pip install bitsandbytes$"):
        check_installed("adam8bit")


# --- steps that are not finite ---


@all_ways
@pytest.mark.parametrize("bad", ["a loss whose gradient is finite", "a gradient", "the loss of a batch before"])
def test_from_the_first_bad_step_on_nothing_changes(name: OptimizerName, fused: bool | None, bad: str) -> None:
    ps = parameters()
    optimizer = GuardedOptimizer(ps, 1.0, name=name, fused=fused)
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


@all_ways
def test_a_bad_first_step_leaves_the_moments_as_if_none_had_been_made(name: OptimizerName, fused: bool | None) -> None:
    ps = parameters()
    optimizer = GuardedOptimizer(ps, name=name, fused=fused)
    optimizer.watch(0, torch.tensor(math.nan), {})
    loss_of(ps, 0).backward()
    optimizer.step(0, 0.1)
    assert_equal(list(ps), list(parameters()))
    kept = optimizer.state_dict()["state"]
    moments = [tensor for state in kept.values() for key, tensor in state.items() if key not in ("z", "average")]
    assert not any(tensor.any() for tensor in moments)
    assert_equal(optimizer.averages or list(ps), list(parameters()))


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
    optimizer = GuardedOptimizer(parameters())
    # Term values are sum / count: in float64, so that 2 * 3e38 does not overflow here.
    means = {name: Mean(torch.tensor(2 * value, dtype=torch.float64), 2) for name, value in values.items()}
    optimizer.watch(4, torch.tensor(total, dtype=torch.float64), means)
    assert optimizer.trouble() == Trouble(what, 4)


def test_the_first_trouble_is_kept_whatever_comes_after() -> None:
    ps = parameters()
    optimizer = GuardedOptimizer(ps)
    optimizer.watch(0, torch.tensor(1.0), terms(fit=1.0))
    for p in ps:
        p.grad = torch.full_like(p, math.nan)
    optimizer.step(0, 0.1)
    optimizer.watch(1, torch.tensor(math.inf), terms(fit=math.inf))
    assert optimizer.trouble() == Trouble("the gradient's norm is nan", 0)
    assert optimizer.trouble() == Trouble("the gradient's norm is nan", 0)


@pytest.mark.parametrize("name", ["adam", "adamw", "radam", "signum", "muon", "schedulefree_adamw"])
def test_what_is_forgotten_is_as_before_the_first_step_and_the_rest_is_kept(name: Any) -> None:
    ps = parameters()
    optimizer = GuardedOptimizer(ps, name=name)
    train(optimizer, ps, range(3))
    with torch.no_grad():
        ps[0][:, 1] = 7.0
    before = {key: kept.clone() for key, kept in optimizer.state_dict()["state"][0].items()}
    others = [kept.clone() for n in (1, 2) for kept in optimizer.state_dict()["state"][n].values()]
    where = torch.tensor([False, True, False])
    optimizer.forget(ps[0], where)
    for key, kept in optimizer.state_dict()["state"][0].items():
        if kept.shape == ps[0].shape:
            # Averages of a parameter begin with its value, everything else with 0.
            assert (kept[:, where] == (7.0 if key in ("z", "average") else 0.0)).all(), key
            assert torch.equal(kept[:, ~where], before[key][:, ~where]), key
            assert not torch.equal(kept, before[key]), key
        else:
            assert torch.equal(kept, before[key]), key
    assert_equal(others, [kept for n in (1, 2) for kept in optimizer.state_dict()["state"][n].values()])
    train(optimizer, ps, range(3, 5))
    assert optimizer.trouble() is None


def test_a_term_without_counted_tokens_is_no_trouble() -> None:
    optimizer = GuardedOptimizer(parameters())
    optimizer.watch(0, torch.tensor(0.0), {"kl": Mean(torch.tensor(0.0), 0)})
    assert optimizer.trouble() is None


@pytest.mark.gpu
def test_on_a_gpu_a_bad_step_is_left_out_without_waiting() -> None:
    ps = [nn.Parameter(p.detach().cuda()) for p in parameters()]
    optimizer = GuardedOptimizer(ps, 1.0)
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
