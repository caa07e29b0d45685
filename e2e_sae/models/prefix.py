"""Not running twice what the clean and the spliced pass have in common: everything before the first SAE.

The clean pass keeps the outputs of the last modules that the SAEs cannot reach (a block; in the first SAE's block
its attention or MLP), and the spliced pass replays them: those modules, and every block below, return what they
returned before, without computing. Replayed numbers are the same tensors, so that nothing changes by a bit.
One mechanism for both model classes: they name blocks, `attn` and `mlp` alike.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn

from e2e_sae.hooks import block_of, in_block, is_after_blocks, is_ranked


class Replayed(NamedTuple):
    """A module that does not run in the spliced pass."""

    module: str
    """Its path in the model."""
    point: str | None
    """The hook point at its output, if an SAE is there: it fires on the replayed output. None: nothing in it fires."""


def shared_prefix(model: nn.Module, reads: Sequence[str]) -> list[Replayed]:
    """Returns the modules whose outputs no SAE can change, innermost last; empty if there are none.

    Args:
        model: a TransformerLens model.
        reads: hook points that the SAEs read.
    """
    n_layers = len(model.blocks)  # pyright: ignore[reportArgumentType]
    blocks = [n_layers if is_after_blocks(name) else block_of(name) for name in reads]
    known = [block for block in blocks if block is not None]
    if len(known) < len(blocks) or not known:
        return []
    k = min(known)
    below = [Replayed(f"blocks.{k - 1}", None)] if k else []
    if k == n_layers:
        return below
    block = f"blocks.{k}"
    here = [name.removeprefix(f"{block}.") for name, b in zip(reads, blocks, strict=True) if b == k]
    if not all(is_ranked(f"{block}.{point}") for point in here):
        return below
    first = min(here, key=in_block)
    if first == "hook_resid_post":
        return [Replayed(block, f"{block}.{first}")]
    # Whatever comes after the attention's output (in parallel blocks: beside it) leaves the attention as it was.
    done = [
        Replayed(f"{block}.{name}", f"{block}.{end}" if first == end else None)
        for name, end in (("attn", "hook_attn_out"), ("mlp", "hook_mlp_out"))
        if in_block(first) >= in_block(end)
    ]
    modules = dict(model.get_submodule(block).named_children())
    return below + [replayed for replayed in done if replayed.module.rpartition(".")[2] in modules]


def skipped_points(model: Any, prefix: Sequence[Replayed]) -> set[str]:
    """Returns the hook points that do not fire while `prefix` is replayed."""
    silent: set[int] = set()
    for replayed in prefix:
        for module in _modules_replaying(model, replayed):
            silent |= {id(part) for part in module.modules()}
    heard = {id(model.hook_dict[replayed.point]) for replayed in prefix if replayed.point is not None}
    return {name for name, point in model.hook_dict.items() if id(point) in silent - heard}


@contextmanager
def recording(model: nn.Module, modules: Sequence[str], outputs: dict[str, Any]) -> Iterator[None]:
    """Keeps what each named module returns in `outputs`, while the block is open."""

    def keep(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            outputs[name] = _with_first(output, _first(output).detach().clone())

        return hook

    handles = [model.get_submodule(name).register_forward_hook(keep(name)) for name in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def replaying(model: Any, prefix: Sequence[Replayed], outputs: Mapping[str, Any]) -> Iterator[None]:
    """Makes the modules of `prefix`, and the blocks below, return the recorded outputs while the block is open."""
    with ExitStack() as stack:
        for replayed in prefix:
            for module in _modules_replaying(model, replayed):
                inside = {id(part) for part in module.modules()}
                point = model.hook_dict[replayed.point] if replayed.point is not None else None
                # HookedTransformer's attention and MLP have their output's hook point outside, in the block.
                fires = point if id(point) in inside else None
                stack.enter_context(_returning(module, outputs[replayed.module], fires))
        yield


def _modules_replaying(model: Any, replayed: Replayed) -> list[nn.Module]:
    kind, _, rest = replayed.module.partition(".")
    assert kind == "blocks", replayed
    if "." in rest:
        return [model.get_submodule(replayed.module)]
    return [model.blocks[i] for i in range(int(rest) + 1)]


@contextmanager
def _returning(module: nn.Module, output: Any, point: nn.Module | None) -> Iterator[None]:
    def forward(*_: Any, **__: Any) -> Any:
        return output if point is None else _with_first(output, point(_first(output)))

    # Not by assignment: a bridge hands what it is assigned on to the module that it wraps.
    own = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        if own is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = own


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _with_first(output: Any, first: Tensor) -> Any:
    return (first, *output[1:]) if isinstance(output, tuple) else first
