"""The learning-rate schedules of `e2e_sae.utils` of the paper's library."""

from collections.abc import Callable

import torch
from torch.optim.lr_scheduler import LambdaLR

from e2e_sae.errors import UserError
from e2e_sae.legacy.errors import LegacyAssertion
from e2e_sae.optim import cosine_factor, make_schedule


def get_linear_lr_schedule(
    warmup_samples: int,
    cooldown_samples: int,
    n_samples: int | None,
    effective_batch_size: int,
    min_lr_factor: float = 0.0,
) -> Callable[[int], float]:
    """Returns a function from the optimizer step (from 0) to the factor of the learning rate; see `optim.Schedule`.

    Raises:
        LegacyAssertion: a cool-down without `n_samples`, or one that overlaps with the warm-up.
    """
    try:
        schedule = make_schedule(
            "linear",
            n_samples=n_samples,
            effective_batch_size=effective_batch_size,
            warmup_samples=warmup_samples,
            cooldown_samples=cooldown_samples,
            min_factor=min_lr_factor,
        )
    except UserError as error:
        raise LegacyAssertion(str(error)) from None
    return schedule.factor


def get_cosine_schedule_with_warmup(
    optimizer: torch.optim.Optimizer,
    num_warmup_steps: int,
    num_training_steps: int,
    num_cycles: float = 0.5,
    min_lr_factor: float = 0.0,
    last_epoch: int = -1,
) -> LambdaLR:
    """Returns a scheduler: a line from 0 up, then cosines of `num_cycles` periods.

    Past `num_training_steps` the cosine goes on, and the learning rate rises again; `optim.Schedule` stays below.
    """

    def factor(step: int) -> float:
        if step < num_warmup_steps:
            return step / max(1, num_warmup_steps)
        progress = (step - num_warmup_steps) / max(1, num_training_steps - num_warmup_steps)
        return cosine_factor(progress, min_lr_factor, num_cycles)

    return LambdaLR(optimizer, factor, last_epoch)
