"""What the commands share that look at runs on data: arguments, their checks, and the study made of them."""

import argparse
from collections.abc import Callable
from typing import Any, TypeVar

from e2e_sae.errors import UserError

S = TypeVar("S")


def add_study_arguments(parser: Any, n_samples: int, seed_of: str) -> None:
    """Adds `--n-samples`, `--batch-size`, `--device` and `--seed` to a parser, or to a group of one.

    Args:
        parser: of a command that has `--out` and `--set`, too.
        n_samples: rows by default.
        seed_of: what is drawn at random.
    """
    rows = f"rows of evaluation data (default {n_samples})"
    parser.add_argument("--n-samples", type=int, default=n_samples, metavar="N", help=rows)
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="rows at a time (default 8)")
    parser.add_argument("--device", default="auto", help="where models run (default: CUDA if there is one)")
    parser.add_argument("--seed", type=int, default=0, help=f"of {seed_of} (default 0)")


def check_at_least_1(args: argparse.Namespace, *names: str) -> None:
    """Raises a `UserError` if one of these arguments is given and below 1."""
    for name in names:
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} is {value}, expected at least 1")


def study_of(args: argparse.Namespace, table: Any, kind: Callable[..., S]) -> S:
    """Returns the study (`Study`, or a subclass) of a table of runs as the arguments ask; its cache is in `--out`."""
    return kind(
        table,
        args.out / "cache",
        n_samples=args.n_samples,
        batch_size=args.batch_size,
        device=args.device,
        seed=args.seed,
        overrides=args.overrides,
    )
