"""Names that a module offers and another one defines, looked up on first use.

Two reasons: `import e2e_sae` stays light, and the paper's library's import paths (`e2e_sae.losses.calc_loss`) reach
`e2e_sae/legacy`, which is built on those same modules, so that an ordinary import would go in a circle.
"""

import importlib
from collections.abc import Callable, Mapping
from typing import Any


def lazy_names(module: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """Returns a function to be a module's `__getattr__`.

    Args:
        module: the module's own name, for the message.
        homes: which module defines each name: `package.module`, or `package.module:other_name`.

    >>> find = lazy_names("here", {"root": "math:sqrt"})
    >>> find("root")(9.0)
    3.0
    """

    def find(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module '{module}' has no attribute '{name}'")
        home, _, other = homes[name].partition(":")
        return getattr(importlib.import_module(home), other or name)

    return find
