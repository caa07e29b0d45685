"""Every analysis there is, in the order in which they are made."""

import importlib

from e2e_sae.analysis.item import Analysis
from e2e_sae.errors import UserError, did_you_mean

MODULES: tuple[str, ...] = (
    "performance",
    "comparisons",
    "per_layer",
    "training_costs",
    "geometry",
    "umaps",
    "norms",
    "principal_directions",
    "resampled_directions",
    "agreement",
)
"""Modules of `e2e_sae.analysis`; each one's `ANALYSES` lists its own."""


def all_analyses() -> dict[str, Analysis]:
    """Returns all analyses by name."""
    modules = [importlib.import_module(f"e2e_sae.analysis.{name}") for name in MODULES]
    return {analysis.name: analysis for module in modules for analysis in module.ANALYSES}


def chosen(names: list[str]) -> list[Analysis]:
    """Returns the analyses of these names, or all of them if none is named, in the order in which they are made.

    Raises:
        UserError: there is no such analysis.
    """
    analyses = all_analyses()
    for name in names:
        if name not in analyses:
            raise UserError(f"there is no analysis '{name}'.{did_you_mean(name, analyses)} (e2e-sae analyse --list)")
    return [analysis for name, analysis in analyses.items() if not names or name in names]
