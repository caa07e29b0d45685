"""An optimizer with clipping, and a guard that never waits for the device: a step that is not finite changes nothing.

Whether the loss and the gradient are finite is decided on the device, and remembered there: from the first bad step
on, every step is a no-op, and `trouble`, which waits, tells. Parameters, moments and step counters then are
bit for bit what they were before the bad step. It is what a gradient scaler of mixed precision does with a bad step,
and it uses the same entrance: `found_inf` of torch's fused Adam and AdamW, a number on the device that is 1 to leave
the step out; `update_rules.py` has it too. `adam8bit` has no such entrance: there each step waits.

`adam8bit` is bitsandbytes' Adam (Dettmers et al. 2022, arXiv 2110.02861): both moments as 8-bit codes, with a scale for
each block of 256; those of parameters with fewer than 4,096 numbers stay float32.
"""

import importlib
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from e2e_sae.acts import Mean
from e2e_sae.errors import UserError
from e2e_sae.optim import OptimizerName
from e2e_sae.update_rules import Muon, RAdam, ScheduleFreeAdamW, Signum, UpdateRule

UPDATE_RULES: dict[OptimizerName, type[UpdateRule]] = {
    "radam": RAdam,
    "signum": Signum,
    "muon": Muon,
    "schedulefree_adamw": ScheduleFreeAdamW,
}
"""Optimizers that are not torch's, by name."""


class Trouble(NamedTuple):
    """The first thing that was not finite."""

    what: str
    """What it was, with its value, e.g. "loss term 'logits_kl' is nan"."""
    step: int
    """Number of its step, counted from 0."""


class GuardedOptimizer:
    """Adam with torch's defaults, or another optimizer, over some parameters."""

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        max_grad_norm: float | None = None,
        *,
        name: OptimizerName = "adam",
        betas: tuple[float, float] | None = None,
        weight_decay: float | None = None,
        lr_factors: Sequence[float] | None = None,
        fused: bool | None = None,
    ):
        """
        Args:
            parameters: what is trained.
            max_grad_norm: gradients whose norm, over all parameters, is greater are scaled down to it.
            name: which optimizer.
            betas: its betas; None: its own.
            weight_decay: decoupled; None: 0.01 for AdamW as in torch, 0 for the others.
            lr_factors: what the learning rate is multiplied by for each parameter; None: 1.
            fused: torch's own only: one pass over the parameters instead of a dozen; without it, each step waits for
                the device. None: where torch's fused Adam is known to work.
        """
        self._parameters = list(parameters)
        self._max_grad_norm = max_grad_norm
        groups: dict[float, list[nn.Parameter]] = {}
        for parameter, factor in zip(self._parameters, lr_factors or [1.0] * len(self._parameters), strict=True):
            groups.setdefault(factor, []).append(parameter)
        self._lr_factors = list(groups)
        wanted = {"betas": betas, "weight_decay": weight_decay}
        options: dict[str, Any] = {key: value for key, value in wanted.items() if value is not None}
        of_groups = [{"params": group} for group in groups.values()]
        if name in UPDATE_RULES:
            self._never_waits = True
            self._optimizer: torch.optim.Optimizer = UPDATE_RULES[name](of_groups, **options)
        elif name == "adam8bit":
            self._never_waits = False
            self._optimizer = _bitsandbytes().optim.Adam8bit(of_groups, **options)
        else:
            can_fuse = all(p.device.type in ("cpu", "cuda") for p in self._parameters)
            self._never_waits = can_fuse if fused is None else fused
            own = torch.optim.AdamW if name == "adamw" else torch.optim.Adam
            self._optimizer = own(of_groups, fused=self._never_waits, **options)
        device = self._parameters[0].device
        self._is_bad = torch.zeros((), device=device)
        self._bad_step = torch.zeros((), dtype=torch.int64, device=device)
        self._bad_values: dict[tuple[str, ...], Tensor] = {}
        if self._never_waits:
            self._optimizer.found_inf = self._is_bad  # pyright: ignore[reportAttributeAccessIssue]

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
        for group, factor in zip(self._optimizer.param_groups, self._lr_factors, strict=True):
            group["lr"] = lr * factor
        if self._never_waits or not self._is_bad.item():  # only the latter waits for the device
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
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

    @torch.no_grad()
    def forget(self, parameter: nn.Parameter, where: Bool[Tensor, "*any"]) -> None:
        """Sets what is kept of some elements of a parameter to what it would be before the first step.

        Args:
            parameter: one of those that are trained, with its new values.
            where: which elements, to be broadcast over it.
        """
        initial = self._optimizer.initial(parameter) if isinstance(self._optimizer, UpdateRule) else {}
        state = self._optimizer.state[parameter]
        for name, kept in state.items():
            if isinstance(kept, Tensor) and kept.shape == parameter.shape:
                # In 8 bits it is the code of 0 that stands for 0.
                zero = state[name.replace("state", "qmap")].abs().argmin() if kept.dtype == torch.uint8 else 0
                kept.copy_(torch.where(where, initial.get(name, zero), kept))

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What is trained."""
        return self._parameters

    @property
    def averages(self) -> list[Tensor] | None:
        """What the optimizer gives as the result, in the order of the parameters; None where that is the parameters."""
        states = [self._optimizer.state.get(parameter, {}) for parameter in self._parameters]
        return [state["average"] for state in states] if all("average" in state for state in states) else None

    def state_dict(self) -> dict[str, Any]:
        """Returns the state of the optimizer, in torch's form."""
        return self._optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from `state`."""
        self._optimizer.load_state_dict(state)

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


def check_installed(name: OptimizerName) -> None:
    """Checks that an optimizer's library is there.

    Raises:
        UserError: it is not.
    """
    if name == "adam8bit" and find_spec("bitsandbytes") is None:
        raise UserError("optimizer: adam8bit needs bitsandbytes, which is not installed here: pip install bitsandbytes")


def _bitsandbytes() -> Any:
    """Returns the module; what it says of kernels for other things than this is left unsaid."""
    log = logging.getLogger("bitsandbytes")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        return importlib.import_module("bitsandbytes")
    finally:
        log.setLevel(level)
