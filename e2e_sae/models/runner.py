"""Runs of a frozen model: clean, spliced, and with an SAE's place emptied. Each gives a `Pass`.

A pass does no more than it is asked for: without logits it ends as soon as every wanted activation is there.
Nothing here knows a loss; every hook lives in a `with` block.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from e2e_sae.acts import Pass, Position, SAEActs, TokenBatch
from e2e_sae.models.splicing import SpliceFunction, splice
from e2e_sae.saes.base import SAE

SAEsAt = Mapping[Position, SAE]
"""SAEs by their position, in the model's order."""


class _Enough(Exception):
    """Raised inside a hook to end a forward pass whose rest nobody needs."""


def run_model(model: nn.Module, batch: TokenBatch) -> Float[Tensor, "batch pos d_vocab"]:
    """Returns the model's logits."""
    return model(batch.tokens, return_type="logits")


@torch.no_grad()
def run_clean(model: nn.Module, batch: TokenBatch, names: Sequence[str], *, want_logits: bool = True) -> Pass:
    """Runs the model as it is, without gradients.

    Args:
        model: a TransformerLens model.
        batch: token rows.
        names: hook points whose activations are kept.
        want_logits: False: stop as soon as the activations are there.
    """
    acts: dict[str, Tensor] = {}

    def keep(name: str) -> SpliceFunction:
        def look(activation: Tensor) -> None:
            # A copy: models may go on in place.
            acts[name] = activation.detach().clone()
            if not want_logits and len(acts) == len(wanted):
                raise _Enough

        return look

    wanted = dict.fromkeys(names)
    if not wanted and not want_logits:
        return Pass(batch)
    logits: Tensor | None = None
    with splice(model, [(name, keep(name)) for name in wanted]), suppress(_Enough):
        logits = run_model(model, batch)
    _check_fired(acts, wanted)
    return Pass(batch, acts=acts, logits=logits if want_logits else None)


def run_spliced(model: nn.Module, batch: TokenBatch, saes: SAEsAt, names: Sequence[str] = ()) -> Pass:
    """Runs the model with every SAE's output in the place of its activation, with gradients if they are on.

    All SAEs are in at once, so that a later one reads what the earlier ones have changed.

    Args:
        model: a TransformerLens model.
        batch: token rows.
        saes: what to splice in.
        names: further hook points whose activations are kept.
    """
    acts: dict[str, Tensor] = {}
    sae_acts: dict[str, SAEActs] = {}
    cached = [name for name in dict.fromkeys(names) if name not in {p.name for p in saes}]
    functions = [*((name, recorder(acts, name)) for name in cached), *splice_functions(saes, sae_acts)]
    with splice(model, functions):
        logits = run_model(model, batch)
    _check_fired(acts.keys() | sae_acts.keys(), [*cached, *(p.name for p in saes)])
    ordered = {position.name: sae_acts[position.name] for position in saes}
    return Pass(batch, acts=acts, sae_acts=ordered, logits=logits)


def run_local(clean: Pass, saes: SAEsAt) -> Pass:
    """Applies every SAE to the clean activation at its own position; the model does not run.

    Args:
        clean: a pass that holds the activations at all positions.
        saes: each is applied alone.
    """
    sae_acts = {position.name: apply_sae(sae, clean.at(position.read).detach()) for position, sae in saes.items()}
    return Pass(clean.batch, sae_acts=sae_acts)


@torch.no_grad()
def run_ablated(
    model: nn.Module, clean: Pass, positions: Sequence[Position], how: Literal["zero", "mean"]
) -> Float[Tensor, "batch pos d_vocab"]:
    """Returns the logits with the activation at every position replaced by zeros, or by its mean.

    The mean is over the counted tokens of this batch's clean activation.
    """

    def replacement(name: str) -> SpliceFunction:
        if how == "zero":
            return torch.zeros_like
        kept = clean.at(name) if clean.batch.counted is None else clean.at(name)[clean.batch.counted]
        mean = kept.mean(0) if clean.batch.counted is not None else kept.mean((0, 1))
        return lambda activation: mean.expand_as(activation).clone()

    with splice(model, [(position.write, replacement(position.write)) for position in positions]):
        return run_model(model, clean.batch)


def apply_sae(sae: SAE, x: Float[Tensor, "*tokens d_in"]) -> SAEActs:
    """Returns what an SAE makes of an activation: computed on the SAE's device and in its type, returned on x's."""
    moved = x.to(device=sae.device, dtype=sae.dtype)
    output, latents = sae(moved)
    return SAEActs(moved, latents, output)


def splice_functions(saes: SAEsAt, record: dict[str, SAEActs] | None = None) -> list[tuple[str, SpliceFunction]]:
    """Returns the (hook name, function) pairs that put SAEs in, for `splice`.

    Args:
        saes: what to put in.
        record: what each SAE saw and made is stored here, by position name.
    """

    def replace(position: Position, sae: SAE, read: Callable[[Tensor], Tensor]) -> SpliceFunction:
        def function(activation: Tensor) -> Tensor:
            acts = apply_sae(sae, read(activation))
            if record is not None:
                record[position.name] = acts
            return acts.output.to(device=activation.device, dtype=activation.dtype)

        return function

    functions: list[tuple[str, SpliceFunction]] = []
    for position, sae in saes.items():
        if position.read == position.write:
            functions.append((position.write, replace(position, sae, lambda activation: activation)))
        else:
            seen: dict[str, Tensor] = {}
            functions.append((position.read, recorder(seen, position.read)))
            functions.append((position.write, replace(position, sae, lambda _, s=seen, p=position: s[p.read])))
    return functions


def recorder(acts: dict[str, Tensor], name: str) -> SpliceFunction:
    """Returns a function for `splice` that stores the activation, graph and all, and changes nothing."""

    def look(activation: Tensor) -> None:
        acts[name] = activation

    return look


def _check_fired(fired: Any, wanted: Any) -> None:
    silent = [name for name in wanted if name not in fired]
    assert not silent, f"hook points that this forward pass never reached: {silent}"
