"""Runs of a frozen model: clean, spliced, and with an SAE's place emptied. Each gives a `Pass`.

A pass does no more than it is asked for: without logits it ends as soon as every wanted activation is there.
Nothing here knows a loss; every hook lives in a `with` block.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from e2e_sae.acts import Output, Pass, Position, SAEPass, TokenBatch
from e2e_sae.compiling import compilable
from e2e_sae.hooks import is_in_unembedding
from e2e_sae.models.fast_blocks import can_fuse, fast_blocks
from e2e_sae.models.head import head_of, run_to_unembedding
from e2e_sae.models.prefix import Replayed, recording, replaying, shared_prefix, skipped_points
from e2e_sae.models.splicing import SpliceFunction, splice
from e2e_sae.ops.logits import with_kept_logits
from e2e_sae.saes.base import SAE

SAEsAt = Mapping[Position, SAE]
"""SAEs by their position, in the model's order."""


class _Enough(Exception):
    """Raised inside a hook to end a forward pass whose rest nobody needs."""


def run_model(model: nn.Module, batch: TokenBatch, names: Iterable[str] = (), *, fused: bool = True) -> Output:
    """Runs the model; the logits are computed where they are used.

    Args:
        model: a TransformerLens model.
        batch: token rows.
        names: hook points that must fire.
        fused: False: exactly TransformerLens' own computation, to the last bit.
    """
    if not fused:
        return Output(model(batch.tokens, return_type="logits"))
    head = None if any(is_in_unembedding(name) for name in names) else head_of(model)
    with fast_blocks(model):
        if head is None:
            return Output(model(batch.tokens, return_type="logits"))
        return Output(run_to_unembedding(model, batch.tokens), head)


@torch.no_grad()
def run_clean(
    model: nn.Module,
    batch: TokenBatch,
    names: Sequence[str],
    *,
    want_logits: bool = True,
    keep_logits: bool = False,
    reuse: Iterable[Collection[Position]] = (),
) -> Pass:
    """Runs the model as it is, without gradients.

    Args:
        model: a TransformerLens model.
        batch: token rows.
        names: hook points whose activations are kept.
        want_logits: False: stop as soon as the activations are there.
        keep_logits: the logits will be needed more than once: compute them here, if there is memory for them.
        reuse: the positions of each spliced pass that will follow: what comes before them is kept for it.
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
    _get_ready(model)
    output: Output | None = None
    outputs: dict[str, Any] = {}
    prefixes = [shared_prefix(model, _reads(positions)) for positions in reuse]
    modules = dict.fromkeys(replayed.module for prefix in prefixes for replayed in prefix)
    with (
        recording(model, list(modules), outputs),
        splice(model, [(name, keep(name)) for name in wanted]),
        suppress(_Enough),
    ):
        output = run_model(model, batch, wanted)
    _check_fired(acts, wanted)
    if output is not None and want_logits and keep_logits:
        output = with_kept_logits(output)
    return Pass(batch, acts=acts, output=output if want_logits else None, outputs=outputs)


def run_spliced(
    model: nn.Module,
    batch: TokenBatch,
    saes: SAEsAt,
    names: Sequence[str] = (),
    clean: Pass | None = None,
    *,
    fused: bool = True,
) -> Pass:
    """Runs the model with every SAE's output in the place of its activation, with gradients if they are on.

    All SAEs are in at once, so that a later one reads what the earlier ones have changed.

    Args:
        model: a TransformerLens model.
        batch: token rows.
        saes: what to splice in.
        names: further hook points whose activations are kept.
        clean: the batch's clean pass, made with `reuse` of these positions (and with the `names` before them among
            its own): what comes before the SAEs is then not computed again. None: everything is.
        fused: False: exactly TransformerLens' own computation, to the last bit.
    """
    if fused:
        _get_ready(model)
    acts: dict[str, Tensor] = {}
    sae_acts: dict[str, SAEPass] = {}
    cached = [name for name in dict.fromkeys(names) if name not in {p.name for p in saes}]
    prefix = _prefix(model, saes, clean)
    skipped = skipped_points(model, prefix)
    for name in cached:
        if clean is not None and name in skipped:
            acts[name] = clean.at(name)
    functions = [(name, recorder(acts, name)) for name in cached if name not in acts]
    with (
        replaying(model, prefix, clean.outputs if clean is not None else {}),
        splice(model, [*functions, *splice_functions(saes, sae_acts)]),
    ):
        output = run_model(model, batch, [*cached, *(name for position in saes for name in position)], fused=fused)
    _check_fired(acts.keys() | sae_acts.keys(), [*cached, *(p.name for p in saes)])
    ordered = {position.name: sae_acts[position.name] for position in saes}
    return Pass(batch, acts=acts, sae_acts=ordered, output=output)


def run_local(clean: Pass, saes: SAEsAt) -> Pass:
    """Applies every SAE to the clean activation at its own position; the model does not run.

    Args:
        clean: a pass that holds the activations at all positions.
        saes: each is applied alone.
    """

    def at(name: str) -> Tensor:
        return clean.at(name).detach()

    sae_acts = {
        position.name: apply_sae(sae, at(position.read), at(position.write) if position.is_transcoder else None)
        for position, sae in saes.items()
    }
    return Pass(clean.batch, sae_acts=sae_acts)


@torch.no_grad()
def run_ablated(model: nn.Module, clean: Pass, positions: Sequence[Position], how: Literal["zero", "mean"]) -> Output:
    """Returns the output with the activation at every position replaced by zeros, or by its mean.

    The mean is over the counted tokens of this batch's clean activation. What comes before the positions is taken
    from the clean pass if that kept it (`reuse`).
    """

    def replacement(name: str) -> SpliceFunction:
        if how == "zero":
            return torch.zeros_like
        kept = clean.at(name) if clean.batch.counted is None else clean.at(name)[clean.batch.counted]
        mean = kept.mean(0) if clean.batch.counted is not None else kept.mean((0, 1))
        return lambda activation: mean.expand_as(activation).clone()

    return run_changed(model, clean, [(position, replacement(position.write)) for position in positions])


def run_changed(model: nn.Module, clean: Pass, changes: Sequence[tuple[Position, SpliceFunction]]) -> Output:
    """Returns the output with the activation at each position sent through a function, with gradients if they are on.

    Args:
        model: a TransformerLens model.
        clean: the batch's clean pass; what comes before the positions is taken from it if it kept that (`reuse`).
        changes: (position, function) pairs; functions see what is written there.
    """
    _get_ready(model)
    prefix = _prefix(model, [position for position, _ in changes], clean)
    functions = [(position.write, function) for position, function in changes]
    with replaying(model, prefix, clean.outputs), splice(model, functions):
        return run_model(model, clean.batch, [name for name, _ in functions])


def apply_sae(
    sae: SAE, x: Float[Tensor, "*tokens d_in"], replaced: Float[Tensor, "*tokens d_out"] | None = None
) -> SAEPass:
    """Returns what an SAE makes of an activation, on the SAE's device, in its type and at its scale.

    Args:
        sae: the SAE.
        x: what it reads.
        replaced: what a transcoder's output stands for; None: an SAE, whose output stands for `x`.
    """
    x = _scaled(x.to(device=sae.device, dtype=sae.dtype), sae.scales.read)
    if replaced is not None:
        replaced = _scaled(replaced.to(device=sae.device, dtype=sae.dtype), sae.scales.write)
    output, latents, pre_acts = _run_sae(sae, x)
    return SAEPass(x, latents, output, pre_acts, sae, replaced)


def _scaled(x: Float[Tensor, "*any"], scale: float) -> Float[Tensor, "*any"]:
    return x if scale == 1 else x * scale


@compilable
def _run_sae(
    sae: SAE, x: Float[Tensor, "*tokens d_in"]
) -> tuple[Float[Tensor, "*tokens d_out"], Float[Tensor, "*tokens d_sae"], Float[Tensor, "*tokens d_sae"] | None]:
    return sae.run(x)


def splice_functions(saes: SAEsAt, record: dict[str, SAEPass] | None = None) -> list[tuple[str, SpliceFunction]]:
    """Returns the (hook name, function) pairs that put SAEs in, for `splice`.

    Args:
        saes: what to put in.
        record: what each SAE saw and made is stored here, by position name.
    """

    def replace(position: Position, sae: SAE) -> SpliceFunction:
        def function(activation: Tensor) -> Tensor:
            acts = (
                apply_sae(sae, seen[position.read], activation)
                if position.is_transcoder
                else apply_sae(sae, activation)
            )
            if record is not None:
                record[position.name] = acts
            return acts.replacement.to(device=activation.device, dtype=activation.dtype)

        return function

    seen: dict[str, Tensor] = {}
    reads = dict.fromkeys(position.read for position in saes if position.is_transcoder)
    # Reading comes after writing: at a point where another SAE writes, a transcoder reads what that one made.
    return [
        *((position.write, replace(position, sae)) for position, sae in saes.items()),
        *((name, recorder(seen, name)) for name in reads),
    ]


def recorder(acts: dict[str, Tensor], name: str) -> SpliceFunction:
    """Returns a function for `splice` that stores the activation, graph and all, and changes nothing."""

    def look(activation: Tensor) -> None:
        acts[name] = activation

    return look


def _prefix(model: nn.Module, positions: Collection[Position], clean: Pass | None) -> list[Replayed]:
    """Returns what need not run again: nothing, if the clean pass did not keep all of it."""
    prefix = shared_prefix(model, _reads(positions))
    kept = clean is not None and all(replayed.module in clean.outputs for replayed in prefix)
    return prefix if kept else []


def _reads(positions: Collection[Position]) -> list[str]:
    return [position.read for position in positions]


def _get_ready(model: nn.Module) -> None:
    """Lets the model be looked at once, before there are hooks in it."""
    head_of(model)
    can_fuse(model)


def _check_fired(fired: Any, wanted: Any) -> None:
    silent = [name for name in wanted if name not in fired]
    assert not silent, f"hook points that this forward pass never reached: {silent}"
