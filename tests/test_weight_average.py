"""The running average of weights, by hand."""

from contextlib import suppress

import pytest
import torch
from torch import nn

from e2e_sae.acts import Pass, Position, TokenBatch
from e2e_sae.guarded_optimizer import GuardedOptimizer
from e2e_sae.saes import SAE, BatchTopKSAE, JumpReluSAE
from e2e_sae.saes.batch_topk import BatchTopKConfig
from e2e_sae.saes.jumprelu import JumpReluConfig
from e2e_sae.weight_average import AveragedSAEs, WeightAverage, in_place
from tests.saes.plain import own_pass


def weights_of(average: WeightAverage, parameter: nn.Parameter) -> list[float]:
    with in_place([parameter], average.averages):
        return parameter.tolist()


def test_the_average_by_hand() -> None:
    parameter = nn.Parameter(torch.tensor([7.0, 0.0]))
    average = WeightAverage([parameter], 0.5)
    assert weights_of(average, parameter) == [7.0, 0.0]
    # Weights 1; 1/3, 2/3; 1/7, 2/7, 4/7: what was there before the first step has no part in it.
    for value, expected in [(3.0, 3.0), (6.0, 5.0), (8.5, 7.0)]:
        parameter.data[0] = value
        average.update()
        assert weights_of(average, parameter) == pytest.approx([expected, 0.0])
        assert parameter.tolist() == [value, 0.0]


def test_weights_are_bit_for_bit_what_they_were_after_the_block_and_after_an_error_in_it() -> None:
    parameters = [nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(4))]
    average = WeightAverage(parameters, 0.9)
    for parameter in parameters:
        parameter.data.mul_(1.1)
    average.update()
    for parameter in parameters:
        parameter.data.mul_(1.1)
    before = [parameter.detach().clone() for parameter in parameters]
    with suppress(KeyError), in_place(parameters, average.averages):
        assert not any(torch.equal(p, b) for p, b in zip(parameters, before, strict=True))
        raise KeyError
    assert all(torch.equal(p, b) for p, b in zip(parameters, before, strict=True))


def test_it_goes_on_from_its_state() -> None:
    def run(average: WeightAverage, parameter: nn.Parameter, values: list[float]) -> None:
        for value in values:
            parameter.data.add_(value)
            average.update()

    whole, first, second = (nn.Parameter(torch.tensor([0.3, 1.7])) for _ in range(3))
    of_whole, of_first, of_second = (WeightAverage([p], 0.8) for p in (whole, first, second))
    run(of_whole, whole, [0.1, 0.7, -0.4])
    run(of_first, first, [0.1, 0.7])
    of_second.load_state(of_first.state())
    second.data.copy_(first)
    run(of_second, second, [-0.4])
    assert torch.equal(second, whole)
    assert weights_of(of_second, second) == weights_of(of_whole, whole) != weights_of(of_first, first)


def test_what_is_done_in_the_block_is_done_to_the_values() -> None:
    buffer, value = torch.tensor([1.0, 2.0]), torch.tensor([5.0, 6.0])
    with torch.inference_mode(), in_place([buffer], [value]):
        assert buffer.tolist() == [5.0, 6.0]
    with in_place([buffer], [value]):
        buffer.add_(1)
    assert (buffer.tolist(), value.tolist()) == ([1.0, 2.0], [6.0, 7.0])


AT = Position("blocks.1.hook_resid_pre", "blocks.1.hook_resid_pre")


def step(averaged: AveragedSAEs, sae: SAE, seed: int) -> None:
    """Moves the weights as a step of training does."""
    x = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(seed))
    acts = own_pass(sae, x)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.mul_(1.3)
    sae.after_step(acts)
    averaged.update(Pass(TokenBatch.of(torch.zeros(2, 5).long()), sae_acts={AT.name: acts}))


def test_the_threshold_of_averaged_weights_follows_their_latents_and_the_own_one_its_own() -> None:
    sae, twin = (BatchTopKSAE(6, 20, BatchTopKConfig(k=3), torch.Generator().manual_seed(0)) for _ in range(2))
    averaged = AveragedSAEs({AT: sae}, GuardedOptimizer(sae.parameters()), 0.5)
    expected: list[float] = []
    for seed in range(4):
        step(averaged, sae, seed)
        x = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(seed))
        twin.after_step(own_pass(twin, x))
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.mul_(1.3)
        with averaged.in_place():
            latents = sae.encode(x)
            expected.append(latents[latents > 0].min().item())
            assert sae.threshold.value.item() == pytest.approx(sum(expected) / len(expected))
            assert sae.threshold.n_batches == seed + 1
        assert torch.equal(sae.threshold.value, twin.threshold.value)
        assert torch.equal(sae.W_enc, twin.W_enc)


@pytest.mark.parametrize("decay", [None, 0.5])
def test_where_nothing_follows_or_nothing_is_averaged_buffers_are_the_own_ones(decay: float | None) -> None:
    topk = BatchTopKSAE(6, 20, BatchTopKConfig(k=3), torch.Generator().manual_seed(0))
    sae = topk if decay is None else JumpReluSAE(6, 20, JumpReluConfig(), torch.Generator().manual_seed(0))
    averaged = AveragedSAEs({AT: sae}, GuardedOptimizer(sae.parameters()), decay)
    step(averaged, sae, 0)
    own = [buffer.clone() for buffer in sae.buffers()]
    with averaged.in_place():
        assert all(torch.equal(a, b) for a, b in zip(own, sae.buffers(), strict=True))
    assert topk.threshold.n_batches == (decay is None)
