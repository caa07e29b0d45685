"""How the cost of a step grows: with latents, vocabulary, context, the SAE's layer, and the number of members.

One thing grows at a time, on a small model, ours beside the twin. Seconds alternate in one process; memory is the
peak above what is resident after set-up, in processes of their own.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from .measure import Case, Settings, measure
from .shapes import SMALL, Kind, Shape


class Series(NamedTuple):
    """Something that grows."""

    label: str
    """Axis of the figure, with its unit."""
    values: tuple[int, ...]
    """What it takes."""
    case: Callable[[Shape, int], Case]
    """The case of a value."""
    kinds: tuple[Kind, ...] = ("e2e+ds",)
    """Which runs."""


def _case(**changes: Callable[[int], int]) -> Callable[[Shape, int], Case]:
    def at(shape: Shape, value: int) -> Case:
        return Case(shape._replace(**{key: change(value) for key, change in changes.items()}), "e2e+ds")

    return at


SERIES = {
    "latents": Series("latents", (1024, 2048, 4096, 8192, 16384), _case(d_sae=int)),
    "vocabulary": Series("vocabulary (tokens)", (1024, 4096, 16384, 50257), _case(d_vocab=int)),
    "context": Series("context (tokens per row, 4 rows)", (64, 128, 256, 512, 1024), _case(n_ctx=int)),
    "layer": Series("block that the SAE stands before (of 6)", (0, 1, 2, 3, 4, 5), _case(layer=int)),
    "members": Series("members", (1, 2, 4, 8), lambda shape, n: Case(shape, "e2e+ds", n), kinds=("local", "e2e+ds")),
}


def grow(names: list[str], settings: Settings, shape: Shape = SMALL) -> Iterator[dict[str, Any]]:
    """Yields the results of the named series, one value after the other."""
    for name in names:
        series = SERIES[name]
        for kind in series.kinds:
            for value in series.values:
                case = series.case(shape, value)._replace(kind=kind)
                yield {"case": f"{name} {value} {kind}", "series": name, "value": value, **measure(case, settings)}
