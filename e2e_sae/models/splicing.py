"""Putting functions into somebody else's forward pass, for the length of a `with` block.

One function, two adapters: a TransformerLens hook point, and the output of any `nn.Module` (the first element,
where a module returns a tuple). Hooks that were there before stay, and stay alone afterwards, whatever is
raised inside.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from e2e_sae.hooks import at_hook_point, block_of, is_skip_bypassed

SpliceFunction = Callable[[Tensor], Tensor | None]
"""Gets the activation; what it returns replaces it, None leaves it as it is."""


@contextmanager
def splice(root: nn.Module, functions: Iterable[tuple[str, SpliceFunction]]) -> Iterator[None]:
    """Sends the activation at each named site through its function while the block is open.

    Args:
        root: a TransformerLens model, or any module.
        functions: (site, function) pairs; a site is a hook name of the model, or else the dotted path of a submodule
            of `root`. At one site they run in this order.

    Raises:
        KeyError: `root` has neither a hook point nor a submodule of that name.
    """
    functions = list(functions)
    points: Mapping[str, nn.Module] = getattr(root, "hook_dict", {})
    modules = {} if all(site in points for site, _ in functions) else dict(root.named_modules())
    with ExitStack() as stack:
        for site, function in functions:
            if site in points and is_skip_bypassed(root, site):
                stack.enter_context(_beside_skip(root, site, points[site], function))
            elif site in points:
                stack.enter_context(at_hook_point(points[site], function))
            elif site in modules:
                stack.enter_context(_at_module(modules[site], function))
            else:
                raise KeyError(f"'{site}' is neither a hook point nor a submodule of {type(root).__name__}")
        yield


@contextmanager
def _beside_skip(root: Any, site: str, point: Any, function: SpliceFunction) -> Iterator[None]:
    """On a bridge `hook_resid_mid` is only the MLP's input: the change must be added to the skip connection too."""
    changes: list[Tensor] = []

    def change(activation: Tensor) -> Tensor | None:
        replaced = function(activation)
        changes[:] = [] if replaced is None else [replaced - activation]
        return replaced

    def add(output: Tensor) -> Tensor | None:
        return output + changes.pop() if changes else None

    block = root.blocks[block_of(site)].original_component
    with at_hook_point(point, change), _at_module(block, add):
        yield


@contextmanager
def _at_module(module: nn.Module, function: SpliceFunction) -> Iterator[None]:
    def hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        if not isinstance(output, tuple):
            return function(output)
        replaced = function(output[0])
        return None if replaced is None else (replaced, *output[1:])

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
