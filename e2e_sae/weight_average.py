"""A running average of weights, which is evaluated and saved in their place while training goes on with the weights.

After step t (from 1), with the weights theta_t:

    average_t = average_{t-1} + (1 - decay) / (1 - decay^t) * (theta_t - average_{t-1})

That is the exponential moving average, corrected as Adam's moments are (arXiv 1412.6980, section 3), so that the
weights before the first step have no part in it: at first a plain mean, later one over about 1 / (1 - decay) steps.

What follows from latents (BatchTopK's threshold) is not averaged: at each step the averaged SAE encodes the last batch
once more, and has buffers of its own that follow its latents as the trained SAE's follow theirs. After 200 steps of
`demos/local.yaml` with BatchTopK, k = 16, averaged with decay 0.99 (0.999), a held-out token then had 15.7 (15.7)
active latents, and 15.8 without averaging; with the trained SAE's threshold 14.9 (14.3), with the average of its
thresholds 14.2 (12.8): averages are less noisy than weights, and so are their pre-activations.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from e2e_sae.acts import Pass, Position
from e2e_sae.guarded_optimizer import GuardedOptimizer
from e2e_sae.saes.base import SAE


class WeightAverage:
    """The average of some parameters."""

    def __init__(self, parameters: Iterable[nn.Parameter], decay: float):
        """
        Args:
            parameters: what is averaged; before the first update they are their own average.
            decay: between 0 and 1, both excluded.
        """
        self._parameters = list(parameters)
        self._averages = [parameter.detach().clone() for parameter in self._parameters]
        self._decay = decay
        self._n_updates = 0

    @torch.no_grad()
    def update(self) -> None:
        """Takes the weights of a new step in."""
        self._n_updates += 1
        share = (1 - self._decay) / (1 - self._decay**self._n_updates)
        for average, parameter in zip(self._averages, self._parameters, strict=True):
            average.lerp_(parameter, share)

    @property
    def averages(self) -> list[Tensor]:
        """The averages, in the order of the parameters."""
        return self._averages

    def state(self) -> dict[str, Any]:
        """Returns tensors and numbers for `load_state`."""
        return {"averages": self._averages, "n_updates": self._n_updates}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continues from `state`."""
        _copy(self._averages, state["averages"])
        self._n_updates = state["n_updates"]


class AveragedSAEs:
    """The SAEs that are evaluated and saved: averages of those in training, if there are any, else these themselves."""

    def __init__(self, saes: Mapping[Position, SAE], optimizer: GuardedOptimizer, decay: float | None):
        """
        Args:
            saes: those in eval mode are left alone.
            optimizer: has their parameters, and may have averages of its own.
            decay: of an average of all parameters; None: the optimizer's own, if it has some.
        """
        self._optimizer = optimizer
        self._average = None if decay is None else WeightAverage(optimizer.parameters, decay)
        trained = {position.name: sae for position, sae in saes.items() if sae.training}
        self._following = {name: sae for name, sae in trained.items() if type(sae).follow is not SAE.follow}
        self._buffers = [buffer for sae in self._following.values() for buffer in sae.buffers()]
        self._own_buffers = [buffer.clone() for buffer in self._buffers]

    @property
    def _averages(self) -> list[Tensor] | None:
        return self._optimizer.averages if self._average is None else self._average.averages

    @torch.no_grad()
    def update(self, last: Pass) -> None:
        """Takes a step in.

        Args:
            last: the spliced pass of its last batch.
        """
        if self._average is not None:
            self._average.update()
        if self._averages is not None and self._buffers:
            with self.in_place():
                for name, sae in self._following.items():
                    sae.follow(sae.encode(last.sae_acts[name].input))

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Makes averages of the SAEs in training while the block is open."""
        averages = self._averages
        if averages is None:
            yield
            return
        with in_place([*self._optimizer.parameters, *self._buffers], [*averages, *self._own_buffers]):
            yield

    def state(self) -> dict[str, Any]:
        """Returns what `load_state` needs besides the SAEs as they are saved: what training goes on with."""
        state: dict[str, Any] = {} if self._average is None else {"average": self._average.state()}
        if self._averages is not None:
            state["weights"] = [parameter.detach().clone() for parameter in self._optimizer.parameters]
            state["buffers"] = [buffer.clone() for buffer in self._buffers]
        return state

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continues from `state`, with SAEs as they were saved."""
        if self._average is not None:
            self._average.load_state(state["average"])
        if "weights" in state:
            _copy(self._optimizer.parameters, state["weights"])
        if "buffers" in state:  # not in checkpoints of versions that averaged weights alone
            _copy(self._buffers, state["buffers"])


@contextmanager
def in_place(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> Iterator[None]:
    """Puts `values` in the place of parameters and buffers while the block is open: what is done to these in the block
    is done to the values, and afterwards they are, bit for bit, what they were."""
    own = [tensor.data for tensor in tensors]
    try:
        _put(tensors, values)
        yield
    finally:
        _put(tensors, own)


def _put(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for tensor, value in zip(tensors, values, strict=True):
        tensor.data = value


@torch.no_grad()
def _copy(targets: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for target, value in zip(targets, values, strict=True):
        target.copy_(value)
