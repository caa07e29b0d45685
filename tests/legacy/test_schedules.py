"""The schedules of `e2e_sae.utils`; [ran] marks what runs of the paper's library gave."""

from typing import Any

import pytest
import torch
from torch import nn


def test_linear_schedule_has_the_recorded_values():
    from e2e_sae.utils import get_linear_lr_schedule

    f = get_linear_lr_schedule(100, 100, 1000, 10, 0.1)
    expected = {0: 0.1, 5: 0.6, 9: 1, 91: 1, 92: 0.9, 100: 0.1, 101: 0.1}  # [ran]
    assert {step: f(step) for step in expected} == pytest.approx(expected)
    assert [get_linear_lr_schedule(0, 0, 1000, 10)(step) for step in range(100)] == [1.0] * 100
    for arguments, step, value in [
        ((100, 0, None, 10), 5, 0.6),
        ((100, 200, 1000, 10), 50, 1.0),
        ((100, 100, 1000, 10), 92, 0.9),
        ((100, 100, 1000, 10), 101, 0.0),
    ]:
        assert get_linear_lr_schedule(*arguments)(step) == pytest.approx(value)


@pytest.mark.parametrize("arguments", [(100, 50, None, 10), (100, 100, 150, 10)])
def test_linear_schedule_refuses_what_it_refused(arguments: Any):
    from e2e_sae.utils import get_linear_lr_schedule

    with pytest.raises(AssertionError):
        get_linear_lr_schedule(*arguments)


def test_cosine_schedule_has_the_recorded_values():
    from e2e_sae.utils import get_cosine_schedule_with_warmup

    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = get_cosine_schedule_with_warmup(optimizer, 10, 100, min_lr_factor=0.1)
    found: list[Any] = []
    for _ in range(103):
        found += scheduler.get_last_lr()
        optimizer.step()
        scheduler.step()
    expected = {0: 0.0, 1: 0.1, 9: 0.9, 10: 1.0, 55: 0.55, 99: 0.100274, 100: 0.1, 102: 0.101096}  # [ran]
    assert {step: found[step] for step in expected} == pytest.approx(expected, abs=1e-6)


def test_cosine_schedule_with_whole_cycles_ends_where_it_began():
    from e2e_sae.utils import get_cosine_schedule_with_warmup

    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    factor = get_cosine_schedule_with_warmup(optimizer, 0, 8, num_cycles=1.0).lr_lambdas[0]
    assert [factor(step) for step in (0, 2, 4, 8)] == pytest.approx([1.0, 0.5, 0.0, 1.0])
