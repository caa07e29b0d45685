"""Adam with clipping, and a guard that never waits for the device: a step that is not finite changes nothing.

Whether the loss and the gradient are finite is decided on the device, and remembered there: from the first bad step
on, every step is a no-op, and `trouble`, which waits, tells. Parameters, moments and step counters then are
bit for bit what they were before the bad step. It is what a gradient scaler of mixed precision does with a bad step,
and it uses the same entrance: fused Adam's `found_inf`, a number on the device that is 1 to leave the step out.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from e2e_sae.acts import Mean


class Trouble(NamedTuple):
    """The first thing that was not finite."""

    what: str
    """What it was, with its value, e.g. "loss term 'logits_kl' is nan"."""
    step: int
    """Number of its step, counted from 0."""


class GuardedAdam:
    """Adam with torch's defaults, over some parameters."""

    def __init__(
        self, parameters: Iterable[nn.Parameter], max_grad_norm: float | None = None, *, fused: bool | None = None
    ):
        """
        Args:
            parameters: what is trained.
            max_grad_norm: gradients whose norm, over all parameters, is greater are scaled down to it.
            fused: one pass over the parameters instead of a dozen; without it, each step waits for the device.
                None: where torch's fused Adam is known to work.
        """
        self._parameters = list(parameters)
        self._max_grad_norm = max_grad_norm
        self._fused = all(p.device.type in ("cpu", "cuda") for p in self._parameters) if fused is None else fused
        self._adam = torch.optim.Adam(self._parameters, fused=self._fused)
        device = self._parameters[0].device
        self._is_bad = torch.zeros((), device=device)
        self._bad_step = torch.zeros((), dtype=torch.int64, device=device)
        self._bad_values: dict[tuple[str, ...], Tensor] = {}
        if self._fused:
            self._adam.found_inf = self._is_bad  # pyright: ignore[reportAttributeAccessIssue]

    def watch(self, step: int, total: Float[Tensor, ""], terms: Mapping[str, Mean]) -> None:
        """Notes whether a batch's loss is finite.

        Args:
            step: number of the step that the batch belongs to, counted from 0.
            total: the weighted loss, which is not finite as soon as one of the terms is not.
            terms: the unweighted ones by name, for the message.
        """
        values = {f"loss term '{name}'": mean.value for name, mean in terms.items()}
        self._note(step, {**values, "the loss": total})

    def step(self, step: int, lr: float) -> Float[Tensor, ""]:
        """Makes a step if everything so far was finite, and returns the gradient's norm before clipping.

        Args:
            step: its number, counted from 0.
            lr: learning rate.
        """
        norm = torch.nn.utils.get_total_norm([p.grad for p in self._parameters if p.grad is not None])
        self._note(step, {"the gradient's norm": norm})
        if self._max_grad_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self._parameters, self._max_grad_norm, norm)
        for group in self._adam.param_groups:
            group["lr"] = lr
        if self._fused or not self._is_bad.item():  # only the latter waits for the device
            self._adam.step()
        self._adam.zero_grad(set_to_none=True)
        return norm

    def trouble(self) -> Trouble | None:
        """Returns what was not finite first, if anything was; waits for the device."""
        if not self._is_bad.item():
            return None
        broken = [
            f"{name} is {value}"
            for names, values in self._bad_values.items()
            for name, value in zip(names, values.tolist(), strict=True)
            if not math.isfinite(value)
        ]
        # The last is what the others add up to.
        return Trouble(", ".join(broken[:-1] or broken), int(self._bad_step.item()))

    def state_dict(self) -> dict[str, Any]:
        """Returns the state of torch's Adam."""
        return self._adam.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from `state`."""
        self._adam.load_state_dict(state)

    @torch.no_grad()
    def _note(self, step: int, values: Mapping[str, Tensor]) -> None:
        """Keeps the step and the values if the last of them is not finite, and nothing before was so."""
        device = self._is_bad.device
        *_, decisive = values.values()
        stacked = torch.stack([value.to(device, decisive.dtype) for value in values.values()])
        is_first = ~stacked[-1].isfinite() & (self._is_bad == 0)
        kept = self._bad_values.get(tuple(values), torch.zeros_like(stacked))
        self._bad_values[tuple(values)] = torch.where(is_first, stacked, kept)
        self._bad_step.masked_fill_(is_first, step)
        self._is_bad.masked_fill_(is_first, 1.0)
