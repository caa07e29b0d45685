"""The lines of the table, by name."""

from fnmatch import fnmatchcase

from e2e_sae.errors import UserError, did_you_mean

from .measure import Case
from .shapes import DEMO, GPT2_SMALL, STORIES, Kind, Shape

KINDS: tuple[Kind, ...] = ("local", "e2e", "e2e+ds")
N_MEMBERS = 8


def _named() -> dict[str, Case]:
    cases = {f"{shape.name}-{kind}": Case(shape, kind) for shape in (DEMO, STORIES) for kind in KINDS}
    for layer in (2, 6, 10):
        for d_sae in (6144, 46080):
            shape = GPT2_SMALL._replace(layer=layer, d_sae=d_sae)
            cases |= {f"gpt2-L{layer}-{kind}-{d_sae}": Case(shape, kind) for kind in KINDS}
    together: dict[str, tuple[Shape, Kind]] = {
        "gpt2-L10-local-1536": (GPT2_SMALL._replace(layer=10, d_sae=1536), "local"),
        "gpt2-L6-local-6144": (GPT2_SMALL, "local"),
        "gpt2-L6-e2e-6144": (GPT2_SMALL, "e2e"),
        "demo-local": (DEMO, "local"),
        "demo-e2e": (DEMO, "e2e"),
        "stories260k-e2e": (STORIES, "e2e"),
    }
    cases |= {f"{name}-x{N_MEMBERS}": Case(*case, N_MEMBERS) for name, case in together.items()}
    return cases


CASES = _named()
CORE = [
    "demo-local", "demo-e2e+ds", "stories260k-e2e+ds",
    "gpt2-L6-local-6144", "gpt2-L2-e2e+ds-6144", "gpt2-L6-e2e+ds-6144", "gpt2-L10-e2e+ds-6144",
    "gpt2-L10-local-1536-x8", "gpt2-L6-e2e-6144-x8",
]  # fmt: skip
"""What is measured if nothing is named."""


def choose(patterns: list[str]) -> dict[str, Case]:
    """Returns the cases that are named, or match a pattern such as `gpt2-L6-*`; of no patterns, the core.

    Raises:
        UserError: a pattern matches none.
    """
    chosen: dict[str, Case] = {}
    for pattern in patterns or CORE:
        found = {name: case for name, case in CASES.items() if fnmatchcase(name, pattern)}
        if not found:
            raise UserError(f"no case is called '{pattern}'.{did_you_mean(pattern, list(CASES))} --list shows all")
        chosen |= found
    return chosen
