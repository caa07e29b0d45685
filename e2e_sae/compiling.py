"""torch.compile of the parts that are pure functions of tensors, where a run asks for it; never required.

Hooks, splicing and replaying stay as they are: only functions marked `compilable` are compiled, each on its own. Shapes
are compiled as they come (a last, shorter batch once more), so that what runs does not depend on what ran before.
"""

import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

from e2e_sae.log import logger

P = ParamSpec("P")
R = TypeVar("R")

N_VARIANTS = 64
"""Variants of one function (shapes, types, with and without gradients) that are compiled; further ones run plainly."""

_WANTED: ContextVar[bool] = ContextVar("compile", default=False)
_FAILED = False
"""Whether the compiler has failed in this process: it is not asked again."""


@contextmanager
def compiling(wanted: bool) -> Iterator[None]:
    """Lets `compilable` functions run compiled, or forbids it, while the block is open."""
    token = _WANTED.set(wanted)
    try:
        with ExitStack() as settings:
            if wanted and not _FAILED:
                _patch_compiler(settings)
            yield
    finally:
        _WANTED.reset(token)


def compilable(function: Callable[P, R]) -> Callable[P, R]:
    """Marks a pure function of tensors: inside `compiling(True)` its compiled twin runs.

    Where that cannot be compiled (no C++ compiler, no Triton), one warning says so, and the plain functions run from
    there on.
    """
    compiled: list[Callable[P, R]] = []

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        if _FAILED or not _WANTED.get():
            return function(*args, **kwargs)
        try:
            with warnings.catch_warnings():
                # The compiler warns about parts of its own, and touches what no user would.
                warnings.simplefilter("ignore")
                if not compiled:
                    # Of a function whose shapes are checked on every call, what is inside the checks.
                    compiled.append(torch.compile(inspect.unwrap(function), dynamic=False))
                return compiled[0](*args, **kwargs)
        except _compiler_errors() as error:
            _give_up(error)
            return function(*args, **kwargs)

    return run


def _patch_compiler(stack: ExitStack) -> None:
    import torch._dynamo.config as tracing
    import torch._functorch.config as differentiating

    stack.enter_context(tracing.patch(cache_size_limit=N_VARIANTS))
    if hasattr(differentiating, "force_non_lazy_backward_lowering"):
        # Backward passes are compiled with the forward pass, so that a failure shows where it can be caught.
        stack.enter_context(differentiating.patch(force_non_lazy_backward_lowering=True))


def _compiler_errors() -> type[Exception]:
    from torch._dynamo.exc import TorchDynamoException

    return TorchDynamoException


def _give_up(error: Exception) -> None:
    global _FAILED
    _FAILED = True
    reason = str(error).strip().partition("\n")[0]
    logger.warning(f"compile: true has no effect here, torch.compile fails: {reason}")
